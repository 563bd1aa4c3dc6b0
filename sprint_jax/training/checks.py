"""Checks of a run before anything is computed: its workdir, its counts and its batch."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from ..checkpoints.workdir import BEAT_FILE, LOCK_FILE, LOG_FILE, claim, read_workdir_config
from ..core.config import Config, flatten
from ..core.errors import UserError
from ..core.storage import AnyPath
from ..parallel.peers import Peers
from ..parallel.sharding import batch_ways
from .setup import PREPARED
from .stages import stage_of

# What stays in a run: it decides which records a step sees, or what a checkpoint holds.
FIXED = ("stage", "seed", "sigma_d", "model.", "data.", "optimizer.name")
FIXED += ("ladd.features", "ladd.taps", "ladd.kernel", "ladd.token_norm")
FREE = (
    "model.dtype",
    "model.remat",
    "model.scan",
    "data.dir",
    "data.prefetch",
    "data.loaded_sizes",
    "data.max_rejected",
)
FREE += ("data.latents", "data.images", "data.encoders")  # places: checkpoints know what was there
FREE += ("data.control_maps", "data.control_weights")
# At 0 a checkpoint holds nothing of theirs, or holds the optimizer in another form.
SWITCHES = ("ladd.weight", "dmd.weight", "optimizer.clip_norm", "optimizer.weight_decay")


def check_workdir(workdir: AnyPath, c: Config) -> dict[str, list]:
    """Refuses a workdir that is not this run's, and finds what this run changes in it.

    Some files may be there before the run: `LOG_FILE`, which sweeps and batch systems write, the weights of
    `prepare_teacher`, the list of rejected images, and what is there while it starts. A run may go on with
    other values of all keys but the `FIXED` ones. Keys that only one version of the code has are no obstacle: a
    new one has its value from now.

    Returns:
      {dotted key: [old, new]} of a run that goes on, with "absent" for a key that was or is not there.

    Raises:
      UserError: for a file in its place, a directory of something else, or a fixed key that differs.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a directory")
    early = {LOG_FILE, LOCK_FILE, BEAT_FILE, PREPARED, f"{PREPARED}.partial", "config.json.tmp"}
    found = list(workdir.iterdir()) if workdir.is_dir() else []
    if workdir / "checkpoints" in found and not any((workdir / "checkpoints").iterdir()):
        early.add("checkpoints")  # of older versions, killed before they wrote config.json
    if all(path.name in early or path.match("rejected*.jsonl*") for path in found):
        return {}
    old, new = flatten(read_workdir_config(workdir)), flatten(c)
    keys = [key for key in sorted(old | new) if old.get(key, ()) != new.get(key, ())]
    changes = {key: [old.get(key, "absent"), new.get(key, "absent")] for key in keys}
    fixed = [
        f"{key} is {old[key]!r} there and {new[key]!r} here"
        for key in changes
        if key in old and key in new and not _may_change(key, *changes[key])
    ]
    if fixed:
        more = f" (and {len(fixed) - 1} more)" if fixed[1:] else ""
        raise UserError(
            f"--workdir {workdir} holds a run of another config: {fixed[0]}{more}; "
            "use another --workdir, or the old values",
            exit_code=2,
        )
    return changes


def _may_change(key: str, old: Any, new: Any) -> bool:
    if key.endswith(SWITCHES):
        return (old > 0) == (new > 0)
    return not key.startswith(FIXED) or key.startswith(FREE)


def check_values(c: Config) -> None:
    """Refuses values of a student that cannot work together; the range of each alone: `core.ranges`."""
    _check_decay(c)
    made = {"weights": "", "maps": (), "thickness": -1, "variants": 1}
    for option, unset in made.items():
        if c.data.source == "latents" and c.data[f"control_{option}"] != unset:
            raise UserError(
                f"config.data.control_{option} is for `encode`: latents hold their conditions; leave it out",
                exit_code=2,
            )
    if c.trunk and not c.model.control_blocks:
        raise UserError(
            "config.trunk is frozen beneath a control branch: set config.model.control_blocks", 2
        )
    if c.model.control_blocks and not c.data.control:
        raise UserError(
            "config.model.control_blocks: a control branch learns from conditions: set config.data.control",
            2,
        )
    if not stage_of(c).distills:
        if c.model.control_blocks and not (c.trunk or c.init):
            raise UserError(
                "a control branch needs a trained network: --config.trunk=DIR freezes it, --config.init=DIR "
                "trains it as well",
                exit_code=2,
            )
        if c.model.flow_map:
            raise UserError("config.model.flow_map is of a student: stage 'distill' trains it", 2)
        return
    if not c.scm.guidance:
        raise UserError("config.scm.guidance is empty: give at least one scale", exit_code=2)
    weights = [
        f"{name}.weight" for name in ("scm", "ladd", "dmd", "twinflow", "meanflow", "trajectory")
    ]
    if not any(c[name.partition(".")[0]].weight for name in weights):
        raise UserError(f"no loss is left: one of config.{', '.join(weights)} must be above 0", 2)
    if c.meanflow.weight and not c.model.flow_map:
        raise UserError("config.meanflow trains a flow map: set config.model.flow_map", exit_code=2)
    if not c.ladd.weight:
        return
    if c.ladd.loss == "relativistic" and not c.ladd.paired:
        raise UserError("config.ladd.loss=relativistic needs pairs: set config.ladd.paired", 2)
    if c.ladd.misaligned and c.data.batch_size == c.accumulate:
        raise UserError(
            "config.ladd.misaligned pairs images with captions of others, and a microbatch of "
            f"config.data.batch_size / config.accumulate = {c.data.batch_size} / {c.accumulate} has no other: "
            "make it larger, or set config.ladd.misaligned=false",
            exit_code=2,
        )
    if (c.ladd.r1 or c.ladd.r2) and not c.ladd.token_norm:
        raise UserError(
            "config.ladd.r1 and r2 are of each image by itself, batch norm is not: set config.ladd.token_norm",
            exit_code=2,
        )


def _check_decay(c: Config) -> None:
    """Refuses a learning rate that reaches 0 before the last step: what follows would train nothing."""
    learners = [("optimizer", c.optimizer, 1)]
    if stage_of(c).distills and c.ladd.weight:
        learners.append(("ladd.optimizer", c.ladd.optimizer, c.ladd.updates))
    if stage_of(c).distills and c.dmd.weight:
        learners.append(("dmd.optimizer", c.dmd.optimizer, c.dmd.fake_updates))
    for name, section, updates in learners:
        end, total = section.warmup_steps + section.decay_steps, c.steps * updates
        if section.decay_steps > 0 and end < total:
            raise UserError(
                f"config.{name}.decay_steps={section.decay_steps} lets the learning rate reach 0 at update "
                f"{end} of {total}: set it to -1, for all of config.steps, or higher",
                exit_code=2,
            )


@contextlib.contextmanager
def hold_workdir(workdir: AnyPath, peers: Peers | None) -> Iterator[None]:
    """Holds a workdir for this run, once all its processes have proved that they see the same one.

    Raises:
      UserError: see `checkpoints.workdir.claim` and `Peers.see_same`.
    """
    if peers is not None and peers.index:
        peers.see_same(workdir / LOCK_FILE)
        yield
        return
    with claim(workdir) as mark:
        if peers is not None:
            peers.see_same(workdir / LOCK_FILE, mark)
        yield


def check_sizes(c: Config, sizes: Iterable[tuple[int, int]]) -> None:
    """Refuses data of which some latents do not split into the network's patches."""
    p = c.model.patch_size
    if wrong := [f"{h}x{w}" for h, w in sizes if h % p or w % p]:
        raise UserError(
            f"config.model.patch_size={p} does not divide latents of {', '.join(wrong)}",
            exit_code=2,
        )


def check_batch(c: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that does not split evenly over microbatches and devices."""
    ways = batch_ways(mesh)
    if c.data.batch_size % (c.accumulate * ways):
        raise UserError(
            f"config.data.batch_size={c.data.batch_size} is not divisible by config.accumulate="
            f"{c.accumulate} x {ways} devices (mesh data x fsdp)",
            exit_code=2,
        )
