"""Preparation of a run: its mesh, frozen parameters and the first state.

Arrays are made on the mesh, or not at all: `abstract_run` gives the shapes and shardings of a whole run
for a mesh of devices that need not exist.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoints.weights import find_branch, find_weights, load_trunk
from ..core.config import Config
from ..core.errors import UserError
from ..core.fingerprint import fingerprint
from ..core.storage import absolute, as_path, local_copy
from ..data.feed import Data, batch_shapes
from ..interop.discriminator import load_heads
from ..models.blocks import compute_params
from ..models.control import Control, new_branch
from ..models.discriminator import init_heads
from ..models.sana import from_fields
from ..parallel.sharding import (
    batch_sharding,
    batch_ways,
    make_mesh,
    place_shapes,
    replicated,
    state_shardings,
)
from .nets import OWN, build_nets, check_same, check_world, find_teacher
from .stages import stage_of
from .state import Nets, TrainState, overlay, trained_of

Tree = Any
PREPARED = "prepared"  # where `prepare_teacher` puts the weights that a run starts from


def mesh_from(c: Config, devices=None) -> jax.sharding.Mesh:
    """The mesh of ``config.mesh`` over the given devices, by default all."""
    return make_mesh(**{key: c.mesh[key] for key in c.mesh}, devices=devices)


def load_frozen(c: Config, data: Data, mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    """Arguments of the updates that never change, and the record of where they came from.

    Returns:
      ``frozen``: null_text [L, D], null_mask [L], the seed, in stage 'distill' the teacher's EMA params, and
        the trunk's where a control branch learns alone;
      ``origin``: for checkpoints: the teacher's path, step (None without one) and hash; ``trunk``: the same of
        the trunk.
    """
    frozen = {"null_text": data.null_text, "null_mask": data.null_mask, "seed": np.uint32(c.seed)}
    frozen, origin = jax.device_put(frozen, replicated(mesh)), {}

    def described(path: str, params: Tree, step: int | None) -> dict:
        place = as_path(path)
        place = absolute(place) if place.exists() else path
        return {"path": str(place), "step": step, "hash": fingerprint(params)}

    def shardings(tree):
        return state_shardings(mesh, tree)

    if stage_of(c).distills:
        params, step = find_teacher(c).load(shardings)
        params = {name: part for name, part in params.items() if name != "logvar_linear"}
        frozen["teacher"] = params
        origin = described(c.teacher, params, step)
    if c.trunk:
        frozen["trunk"], step = load_trunk(c.trunk, shardings)
        origin["trunk"] = described(c.trunk, frozen["trunk"], step)
    return frozen, origin


def init_state(
    c: Config, nets: Nets, batch: dict, frozen: dict, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state at step 0, on the mesh: fresh, or from the teacher, or warm-started from ``init``.

    Args:
      batch: example arrays; only shapes matter.
    """
    warm = {}
    if c.init and c.trunk:
        branch = find_branch(c.init, dict(c.model))
        for name in ("control_blocks", "control_wiring"):
            if branch.fields[name] != c.model[name]:
                raise UserError(
                    f"config.model.{name}={c.model[name]}, but {branch.fields[name]} in --config.init={c.init}"
                )
        warm = {"control": branch.load(jnp.float32, lambda tree: state_shardings(mesh, tree))}
    elif c.init:
        found, branch = find_weights(c.init), ("control_blocks", "control_wiring")
        own = OWN if found.fields.get(branch[0]) else OWN + branch
        check_same(c, nets.model, from_fields(found.fields), f"--config.init={c.init}", own)
        check_world(c, found, f"--config.init={c.init}")
        warm, _ = found.load(lambda tree: state_shardings(mesh, tree))
    heads = _published_heads(c, mesh) if nets.heads and c.ladd.init else None
    init = _initializer(c, nets, batch)
    key = jax.random.key(c.seed)
    arguments = (frozen.get("teacher"), frozen.get("trunk"), warm, key, heads)
    shardings = state_shardings(mesh, jax.eval_shape(init, *arguments))
    state = jax.jit(init, out_shardings=shardings)(*arguments)
    if nets.teacher is not None and not (c.init or c.trunk):
        check_start(nets, state.params, frozen["teacher"], mesh)
    return state


def _published_heads(c: Config, mesh: jax.sharding.Mesh) -> dict:
    """The heads in the file ``c.ladd.init``; UserError if it has not as many as there are taps."""
    path = local_copy(c.ladd.init)
    heads = load_heads(path, shardings=functools.partial(state_shardings, mesh))
    if len(heads["params"]) != len(c.ladd.taps):
        raise UserError(
            f"--config.ladd.init={c.ladd.init} has {len(heads['params'])} heads, but config.ladd.taps="
            f"{tuple(c.ladd.taps)} wants {len(c.ladd.taps)}"
        )
    return heads


def check_start(nets: Nets, params: Tree, teacher: Tree, mesh: jax.sharding.Mesh) -> None:
    """Asserts that a student that starts from its teacher computes what the teacher does, in float32.

    Args:
      params, teacher: of the student, and of the teacher as they were loaded.

    Raises:
      UserError: outputs for one small random batch differ by more than roundings.
    """
    exact = dict(dtype=jnp.float32, remat="none")

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def compare(params, teacher):
        keys = jax.random.split(jax.random.key(0), 3)
        rows, side = batch_ways(mesh), 2 * nets.model.patch_size
        x = jax.random.normal(keys[0], (rows, side, side, nets.model.in_channels))
        control = Control(jnp.sin(3 * x)) if nets.model.control_blocks else None
        t = jax.random.uniform(keys[1], (rows,))
        text = jax.random.normal(keys[2], (rows, 4, nets.model.caption_channels))
        inputs = x, t, text, jnp.ones((rows, 4), jnp.int32)
        student, frozen = (net.clone(**exact) for net in (nets.model, nets.teacher))
        mine = student.apply({"params": params}, *inputs, jnp.full(rows, 0.45), control=control)
        theirs = frozen.apply({"params": teacher}, *inputs, control=control)
        return jnp.abs(mine - theirs).max(), jnp.abs(theirs).max()

    with jax.default_matmul_precision("float32"):
        difference, largest = map(float, compare(params, teacher))
    if not difference <= 1e-3 * largest:
        raise UserError(
            "the student does not start as its teacher: outputs of up to "
            f"{largest:.3g} differ by {difference:.3g}"
        )


def state_shapes(
    c: Config, nets: Nets, batch: dict, frozen: dict, mesh: jax.sharding.Mesh
) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`'s result; nothing is read or made."""
    init, key = _initializer(c, nets, batch), jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(init, frozen.get("teacher"), frozen.get("trunk"), {}, key)
    return place_shapes(state, state_shardings(mesh, state))


def _initializer(c: Config, nets: Nets, batch: dict) -> Callable[..., TrainState]:
    """``init(teacher, trunk, warm, key, heads)``: the state at step 0; of ``batch`` only shapes matter.

    ``warm``, ``heads``: trees of a warm start, or nothing.
    """

    def init(teacher, trunk, warm, key, heads=None):
        inputs = _example(batch)
        keys = jax.random.split(key)
        params = nets.model.init(keys[0], *inputs, *([jnp.zeros(1)] if nets.teacher else []))[
            "params"
        ]
        start = teacher or {}
        if trunk is not None:
            params = overlay(params, trunk, f"--config.trunk={c.trunk}")
            start = {name: start[name] for name in start if name == "control"}
        params = overlay(params, start, f"--config.teacher={c.teacher}")
        params = overlay(params, warm, f"--config.init={c.init}")
        blocks = nets.model.control_blocks
        if blocks and "control" not in (start | warm):
            params = params | {"control": new_branch(params, blocks, nets.model.control_wiring)}
        # What is frozen is no state: of a branch that learns alone, the trunk.
        params = {name: params[name] for name in params if name not in (trunk or {})}
        disc = disc_opt_state = fake = fake_opt_state = None
        zero = jnp.zeros((), jnp.int32)
        if nets.heads:
            features = nets.teacher.apply({"params": teacher}, *inputs, taps=tuple(c.ladd.taps))
            disc = init_heads(features, keys[1], c.ladd.kernel)
            disc = overlay(disc, heads, f"--config.ladd.init={c.ladd.init}") | {"updates": zero}
            if c.ladd.features == "copy":
                disc["backbone"] = jax.tree.map(jnp.copy, teacher)
            disc_opt_state = nets.disc_optimizer.init(trained_of(disc))
        if nets.fake:
            fresh = nets.fake.init(keys[0], *inputs, jnp.zeros(1))["params"]
            fresh = overlay(fresh, teacher, f"--config.teacher={c.teacher}")
            fake = {"params": jax.tree.map(jnp.copy, fresh), "updates": zero}
            fake_opt_state = nets.fake_optimizer.init(fake["params"])
        return TrainState(
            step=zero,
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=nets.optimizer.init(params),
            disc=disc,
            disc_opt_state=disc_opt_state,
            fake=fake,
            fake_opt_state=fake_opt_state,
            skipped=zero,
            in_a_row=jnp.zeros(3, jnp.int32),
        )

    return init


def _example(batch: dict) -> tuple:
    """One row of zeros as a network's inputs: x, t, text, mask."""
    rows = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), batch)
    return rows["latents"], jnp.zeros(1), rows["text"], rows["mask"]


def at_compute_precision(c: Config, nets: Nets, frozen: dict) -> dict:
    """``frozen`` with the networks' weights in the dtype of their matmuls, which changes no result.

    In bfloat16 this halves their memory and what travels between devices. The originals are freed. A trunk
    keeps its weights where the tangent is computed in another dtype (``scm.jvp_dtype``).
    """
    cast = jax.jit(compute_params, static_argnums=1, donate_argnums=0)
    other = c.scm.jvp_dtype not in ("", jnp.dtype(nets.model.dtype).name)
    networks = [name for name in ("teacher", *(() if other else ("trunk",))) if name in frozen]
    return frozen | {name: cast(frozen[name], nets.model.dtype) for name in networks}


def abstract_run(c: Config, mesh: jax.sharding.Mesh) -> tuple[Nets, TrainState, dict, dict]:
    """A run's networks and the shapes, dtypes and shardings of its arrays; nothing is read or made.

    The teacher of a distillation is taken to be of the student's architecture.

    Args:
      mesh: may be of devices that are described only, as by `jax.experimental.topologies`.

    Returns:
      ``(nets, state, batch, frozen)``, as `stages.lower_updates` takes them.
    """
    teacher_fields = dict(c.model) | {"guidance_embeds": False, "flow_map": False}
    nets = build_nets(c, mesh, teacher_fields)
    batch = batch_shapes(c)
    text, mask = batch["text"], batch["mask"]
    frozen = {
        "null_text": jax.ShapeDtypeStruct(text.shape[1:], text.dtype),
        "null_mask": jax.ShapeDtypeStruct(mask.shape[1:], mask.dtype),
        "seed": jax.ShapeDtypeStruct((), jnp.uint32),
    }
    key, teacher, trunk = jax.eval_shape(lambda: jax.random.key(0)), None, None
    if nets.teacher is not None:
        example = jax.eval_shape(lambda: _example(batch))
        frozen["teacher"] = teacher = jax.eval_shape(nets.teacher.init, key, *example)["params"]
    if c.trunk:
        inputs = *jax.eval_shape(lambda: _example(batch)), *([jnp.zeros(1)] if nets.teacher else [])
        trunk = jax.eval_shape(nets.model.init, key, *inputs)["params"]
        trunk = {name: trunk[name] for name in trunk if name not in ("control", "logvar_linear")}
        frozen["trunk"] = trunk
    state = jax.eval_shape(_initializer(c, nets, batch), teacher, trunk, {}, key)
    frozen = jax.eval_shape(functools.partial(at_compute_precision, c, nets), frozen)

    laid = {name: replicated(mesh) for name in ("null_text", "null_mask", "seed")}
    for name in ("teacher", "trunk"):
        if name in frozen:
            laid[name] = state_shardings(mesh, frozen[name])
    return (
        nets,
        place_shapes(state, state_shardings(mesh, state)),
        place_shapes(batch, batch_sharding(mesh)),
        place_shapes(frozen, laid),
    )


def describe(c: Config, state: TrainState, mesh: jax.sharding.Mesh) -> str:
    """A run in a few words: stage, parameters, devices."""
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6
    return f"{c.stage}: {size:.2f} M parameters, {mesh.size} device(s)"
