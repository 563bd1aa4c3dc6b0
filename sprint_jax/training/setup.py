"""What a run needs before its first step: networks, data, frozen parameters, state."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from .. import sampling, trigflow
from ..config import Config, diff
from ..data.digits import get_world, held_out_prompts, open_digits
from ..data.loader import encode_online, make_batches
from ..errors import UserError
from ..interop.diffusers import load_transformer
from ..models.discriminator import DiscriminatorHeads, init_heads
from ..models.sana import SanaTransformer, from_fields
from ..models.toy import SpaceToDepth, WordEncoder
from .checkpoint import load_params
from .fingerprint import fingerprint
from .optim import make_optimizer
from .sharding import replicated, state_shardings
from .state import TrainState, overlay

Tree = Any
LOG_FILE = "log.txt"  # what a run prints, where nobody watches it


class Nets(NamedTuple):
    """The static half of a run: definitions and optimizers, no arrays."""

    model: SanaTransformer
    teacher: SanaTransformer | None
    heads: DiscriminatorHeads | None
    optimizer: optax.GradientTransformation
    disc_optimizer: optax.GradientTransformation | None


class Data(NamedTuple):
    """Where batches come from, and what stands between pictures, prompts and the network.

    ``batches(i)`` is this host's rows of global batch ``i``: latents [B, h, w, C], text [B, L, D],
    mask [B, L]; ``size`` is the pictures' (height, width).
    """

    batches: Callable[[int], dict[str, np.ndarray]]
    text_encoder: Any
    autoencoder: Any
    size: tuple[int, int]


def toy_parts(world: str) -> tuple[SpaceToDepth, WordEncoder, tuple[int, int]]:
    """Autoencoder, text encoder and picture size (height, width) of a digits world."""
    rows, columns = get_world(world).cells
    return SpaceToDepth(), WordEncoder(), (8 * rows, 8 * columns)


def open_data(c: Config) -> Data:
    """The training data that a config's ``data`` section describes."""
    autoencoder, text_encoder, size = toy_parts(c.data.world)
    batches = make_batches(
        open_digits(c.data.dir, c.data.world, "train"),
        encode_online(autoencoder, text_encoder),
        batch_size=c.data.batch_size,
        seed=c.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Data(batches, text_encoder, autoencoder, size)


def read_workdir_config(workdir: str | Path) -> Config:
    """The resolved config of a training workdir.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a training workdir: it has no config.json")
    try:
        return Config(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); is it damaged?") from error


def check_workdir(workdir: Path, c: Config) -> None:
    """Refuses a workdir that is not this run's, before anything is computed.

    `LOG_FILE`, into which a sweep or a batch system writes, may be there before the run is. A run may
    go on with other values of ``steps``, ``mesh``, ``log``, ``sampler`` and of where data and teacher
    lie (the teacher's hash is compared); every other key decides its numbers.

    Raises:
      UserError: for a file in its place, a directory of something else, or another config.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a directory")
    if not workdir.is_dir() or {path.name for path in workdir.iterdir()} <= {LOG_FILE}:
        return
    old = read_workdir_config(workdir).to_dict()
    free = ("steps", "teacher", "mesh.", "log.", "sampler.", "data.dir", "data.prefetch")
    changed = [key for key in diff(old, c.to_dict()) if not key.startswith(free)]
    if changed:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise UserError(
            f"--workdir {workdir} holds a run of another config: {changed[0]}{more} differ; "
            "use another --workdir, or the old values"
        )


def check_values(c: Config) -> None:
    """Refuses counts and intervals below one, and an empty choice of guidance scales."""
    counts = ["steps", "max_nonfinite", "accumulate", "data.batch_size", "data.prefetch"]
    counts += [f"log.{key}" for key in ("every", "sample_every", "checkpoint_every", "keep")]
    if c.stage == "distill":
        counts.append("log.diagnostics_every")
        if not c.scm.guidance:
            raise UserError("config.scm.guidance is empty: give at least one scale", exit_code=2)
    for name in counts:
        section, _, key = name.rpartition(".")
        value = (c[section] if section else c)[key]
        if value < 1:
            raise UserError(f"config.{name}={value} must be at least 1", exit_code=2)


def check_overridden(c: Config, names: list[str]) -> None:
    """Refuses keys, set by hand, that nothing has read; call it when all that reads them has run."""
    unread = sorted(set(c.unread()) & set(names))
    if unread:
        raise UserError(
            f"config.{unread[0]} is not read by stage '{c.stage}'; leave it out", exit_code=2
        )


def check_batch(c: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that does not split evenly over microbatches and devices."""
    parts = c.accumulate * mesh.size
    if c.data.batch_size % parts:
        raise UserError(
            f"config.data.batch_size={c.data.batch_size} is not divisible by config.accumulate="
            f"{c.accumulate} x {mesh.size} devices",
            exit_code=2,
        )


def build_nets(c: Config) -> Nets:
    """Networks and optimizers of a run.

    Raises:
      UserError: for an unknown stage, a distillation without a teacher, or taps out of range.
    """
    optimizer = make_optimizer(c.optimizer.name, **_without(c.optimizer, "name"))
    if c.stage == "flow":
        return Nets(from_fields(c.model, guidance_embeds=False), None, None, optimizer, None)
    if c.stage != "distill":
        raise UserError(f"config.stage '{c.stage}' is not one of flow, distill", exit_code=2)
    if not c.teacher:
        raise UserError(
            "stage 'distill' needs --config.teacher=DIR, the workdir of a teacher", exit_code=2
        )
    teacher_config = read_workdir_config(c.teacher)
    if teacher_config.stage != "flow":
        raise UserError(
            f"--config.teacher={c.teacher} is no teacher: its stage is '{teacher_config.stage}'"
        )
    # Frozen weights, but this run's own precision and memory choices.
    runtime = {key: c.model[key] for key in ("dtype", "remat", "scan")}
    teacher = from_fields(dict(teacher_config.model) | runtime)
    model = from_fields(c.model, guidance_embeds=True, logvar=True)
    if not c.ladd.weight:
        return Nets(model, teacher, None, optimizer, None)
    taps = tuple(c.ladd.taps)
    if (
        not taps
        or list(taps) != sorted(set(taps))
        or not 0 <= taps[0] <= taps[-1] < teacher.num_layers
    ):
        raise UserError(
            f"config.ladd.taps={taps} must be increasing block indices below {teacher.num_layers}",
            exit_code=2,
        )
    heads = DiscriminatorHeads(model.dtype, c.ladd.token_norm)
    return Nets(
        model, teacher, heads, optimizer, make_optimizer(c.optimizer.name, **c.ladd.optimizer)
    )


def _without(section: Config, *keys: str) -> dict:
    return {key: section[key] for key in section if key not in keys}


def load_frozen(c: Config, data: Data, mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    """Arguments of the updates that never change, and the record of where they came from.

    Returns:
      ``frozen``: null_text [L, D], null_mask [L], and in stage 'distill' the teacher's EMA params;
      ``origin``: for checkpoints: the teacher's path, step and hash.
    """
    text, mask = data.text_encoder.encode([""])
    frozen = jax.device_put({"null_text": text[0], "null_mask": mask[0]}, replicated(mesh))
    if c.stage == "flow":
        return frozen, {}
    params, meta = load_params(c.teacher, "ema", shardings=lambda tree: state_shardings(mesh, tree))
    frozen["teacher"] = params
    origin = {
        "path": str(Path(c.teacher).resolve()),
        "step": meta["step"],
        "hash": fingerprint(params),
    }
    return frozen, origin


def make_preview(
    c: Config, nets: Nets, data: Data, count: int = 16
) -> Callable[[Tree, dict], np.ndarray]:
    """A function of (params, frozen) to a picture: always the same prompts from the same noise.

    Columns are prompts. Rows are 1, 2 and 4 steps for a student; for a teacher, DPM-Solver++ with 20
    steps and CFG.

    Returns:
      ``preview(params, frozen) -> uint8 [rows * H, columns * W, 3]``, pictures enlarged to 64 pixels.
    """
    height, width = data.size
    text, mask = data.text_encoder.encode(held_out_prompts(c.data.world, count, 0))
    factor, channels = data.autoencoder.factor, nets.model.in_channels
    noise = sampling.noise_for(
        c.seed, np.arange(count), (height // factor, width // factor, channels)
    )
    guidance, sigma_d, shift = c.log.sample_guidance, c.sigma_d, c.flow.shift
    midpoint = c.sampler.midpoint

    def student(params, steps):
        def velocity(x, t):
            return nets.model.apply(
                {"params": params}, x, t, text, mask, jnp.full(count, guidance * 0.1)
            )

        return sampling.consistency_sample(
            trigflow.to_trigflow(velocity),
            noise,
            schedule=trigflow.step_schedule(steps, midpoint=midpoint),
            sigma_d=sigma_d,
            key=jax.random.key(c.seed),
        )

    def teacher(params, frozen):
        def velocity(x, t, text, mask):
            return nets.model.apply({"params": params}, x, t, text, mask)

        guided = sampling.with_cfg(
            velocity, guidance, frozen["null_text"][None], frozen["null_mask"][None]
        )
        return sampling.dpm_solver_sample(
            lambda x, t: guided(x, t, text, mask), noise, steps=20, shift=shift
        )

    @jax.jit
    def sample(params, frozen):
        rows = (
            [teacher(params, frozen)]
            if nets.teacher is None
            else [student(params, n) for n in (1, 2, 4)]
        )
        return jnp.stack([data.autoencoder.decode(row) for row in rows])

    def preview(params, frozen):
        pixels = np.asarray(jax.device_get(sample(params, frozen)))
        pixels = np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
        scale = max(1, 64 // height)
        return rearrange(pixels, "r n h w c -> (r h) (n w) c").repeat(scale, 0).repeat(scale, 1)

    return preview


def warm_params(path: str, shardings: Callable[[Tree], Tree] | None = None) -> Tree:
    """Parameters to start from: a workdir's EMA, or those of a pipeline folder such as an export's."""
    folder = Path(path) / "transformer"
    if folder.is_dir():
        return load_transformer(folder, shardings=shardings)[1]
    return load_params(path, "ema", shardings=shardings)[0]


def init_state(
    c: Config, nets: Nets, batch: dict, frozen: dict, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state at step 0, on the mesh: fresh, or from the teacher, or warm-started from ``init``.

    Args:
      batch: example arrays; only shapes matter.
    """
    warm = {}
    if c.init:
        warm = warm_params(c.init, lambda tree: state_shardings(mesh, tree))

    def init(teacher, warm, key):
        rows = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), batch)
        inputs = (rows["latents"], jnp.zeros(1), rows["text"], rows["mask"])
        keys = jax.random.split(key)
        params = nets.model.init(keys[0], *inputs, *([jnp.zeros(1)] if nets.teacher else []))[
            "params"
        ]
        if teacher is not None:
            params = overlay(params, teacher, f"--config.teacher={c.teacher}")
        params = overlay(params, warm, f"--config.init={c.init}")
        disc = disc_opt_state = None
        if nets.heads:
            features = nets.teacher.apply({"params": teacher}, *inputs, taps=tuple(c.ladd.taps))
            disc = init_heads(features, keys[1])
            disc_opt_state = nets.disc_optimizer.init(disc["params"])
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=nets.optimizer.init(params),
            disc=disc,
            disc_opt_state=disc_opt_state,
            skipped=zero,
            in_a_row=jnp.zeros(2, jnp.int32),
        )

    arguments = (frozen.get("teacher"), warm, jax.random.key(c.seed))
    shardings = state_shardings(mesh, jax.eval_shape(init, *arguments))
    return jax.jit(init, out_shardings=shardings)(*arguments)


def describe(c: Config, state: TrainState, mesh: jax.sharding.Mesh) -> str:
    """A run in a few words: stage, parameters, devices."""
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6
    return f"{c.stage}: {size:.2f} M parameters, {mesh.size} device(s)"
