"""Checks of a run before anything is computed: its workdir, its counts and its batch."""

from pathlib import Path

import jax

from ..checkpoints.workdir import LOG_FILE, read_workdir_config
from ..core.config import Config, diff
from ..core.errors import UserError
from ..parallel.sharding import batch_ways
from .setup import PREPARED
from .stages import stage_of

FREE = ("steps", "teacher", "mesh.", "log.", "sampler.", "encode.threads")
FREE += ("data.dir", "data.prefetch", "data.latents", "data.encoders")

# Of the losses of a student.
NOT_NEGATIVE = ("ladd.r1", "ladd.r2", "ladd.penalty_noise", "images.rollout", "log.exam")
NOT_NEGATIVE += ("twinflow.twin_weight", "trajectory.power", "meanflow.power")
SHARES = ("images.max_time_probability", "meanflow.same_time")


def check_workdir(workdir: Path, c: Config) -> None:
    """Refuses a workdir that is not this run's.

    Some files may be there before the run: `LOG_FILE`, which sweeps and batch systems write, the weights of
    `prepare_teacher` and the list of rejected images. A run may go on with other values of the `FREE` keys
    (the teacher's hash is compared); every other key decides its numbers.

    Raises:
      UserError: for a file in its place, a directory of something else, or another config.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a directory")
    early = {LOG_FILE, PREPARED, f"{PREPARED}.partial"}
    found = list(workdir.iterdir()) if workdir.is_dir() else []
    if all(path.name in early or path.match("rejected*.jsonl*") for path in found):
        return
    old = read_workdir_config(workdir).to_dict()
    changed = [key for key in diff(old, c.to_dict()) if not key.startswith(FREE)]
    if changed:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise UserError(
            f"--workdir {workdir} holds a run of another config: {changed[0]}{more} differ; "
            "use another --workdir, or the old values"
        )


def check_values(c: Config) -> None:
    """Refuses counts and intervals below one, and losses of a student that cannot work together."""
    if c.model.flow_map and not stage_of(c).distills:
        raise UserError("config.model.flow_map is of a student: stage 'distill' trains it", 2)
    counts = ["steps", "max_nonfinite", "accumulate", "data.batch_size", "data.prefetch"]
    counts += [f"log.{key}" for key in ("every", "sample_every", "checkpoint_every", "keep")]
    if stage_of(c).distills:
        counts += ["log.diagnostics_every", "dmd.fake_updates", "ladd.updates", "ladd.kernel"]
        counts += ["trajectory.steps", "trajectory.spread"]
        _check_losses(c)
        if not c.scm.guidance:
            raise UserError("config.scm.guidance is empty: give at least one scale", exit_code=2)
    for name in counts:
        section, _, key = name.rpartition(".")
        value = (c[section] if section else c)[key]
        if value < 1:
            raise UserError(f"config.{name}={value} must be at least 1", exit_code=2)


def _check_losses(c: Config) -> None:
    weights = [
        f"{name}.weight" for name in ("scm", "ladd", "dmd", "twinflow", "meanflow", "trajectory")
    ]
    value = {
        name: c[name.split(".")[0]][name.split(".")[1]]
        for name in (*weights, *NOT_NEGATIVE, *SHARES)
    }
    for name in (*weights, *NOT_NEGATIVE):
        if value[name] < 0:
            raise UserError(f"config.{name}={value[name]} must not be negative", exit_code=2)
    for name in SHARES:
        if not 0 <= value[name] <= 1:
            raise UserError(f"config.{name}={value[name]} must be between 0 and 1", exit_code=2)
    for name in ("dmd", "twinflow"):
        if c[name].shift <= 0:
            raise UserError(f"config.{name}.shift={c[name].shift} must be above 0", exit_code=2)
    if not any(value[name] for name in weights):
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


def check_batch(c: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that does not split evenly over microbatches and devices."""
    ways = batch_ways(mesh)
    if c.data.batch_size % (c.accumulate * ways):
        raise UserError(
            f"config.data.batch_size={c.data.batch_size} is not divisible by config.accumulate="
            f"{c.accumulate} x {ways} devices (mesh data x fsdp)",
            exit_code=2,
        )
