"""The state of a run, and the few pure functions that build and change it."""

from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

from ..core.errors import UserError
from ..models.discriminator import DiscriminatorHeads
from ..models.sana import SanaTransformer

Tree = Any


class Nets(NamedTuple):
    """The static half of a run: definitions and optimizers, no arrays.

    Attributes:
      model: what is trained; its optimizer is ``optimizer``.
      teacher: frozen; also the architecture of a critic that is a copy of it.
      heads: of the critic; None without one.
      fake: the fake score: the teacher's network, and told the guidance as the student is; None without one.
    """

    model: SanaTransformer
    teacher: SanaTransformer | None
    heads: DiscriminatorHeads | None
    optimizer: optax.GradientTransformation
    disc_optimizer: optax.GradientTransformation | None
    fake_optimizer: optax.GradientTransformation | None = None
    fake: SanaTransformer | None = None


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint holds; frozen networks are arguments of the updates, not state.

    Attributes:
      step: count of generator updates and of nothing else, int32 scalar.
      params, ema: the trained network and the exponential moving average of its parameters, float32.
      opt_state: optimizer state of ``params``.
      disc, disc_opt_state: the critic and its optimizer; None without. ``{'params', 'spectral'}`` of its
        heads, their count of updates, and with a critic of its own 'backbone', a copy of the teacher.
      fake, fake_opt_state: the fake score ``{'params', 'updates'}`` and its optimizer; None without.
      skipped: count of updates skipped for not being finite; in_a_row: how many of them just now, of the
        student, the critic and the fake score.
    """

    step: jax.Array
    params: Tree
    ema: Tree
    opt_state: Tree
    disc: Tree
    disc_opt_state: Tree
    fake: Tree
    fake_opt_state: Tree
    skipped: jax.Array
    in_a_row: jax.Array


def overlay(fresh: Tree, pretrained: Tree, origin: str) -> Tree:
    """Returns ``fresh`` params with every leaf that ``pretrained`` has; the rest stays fresh.

    Used to start a student from its teacher, which lacks the guidance embedder and the logvar head.

    Raises:
      UserError: if a pretrained leaf has no place in ``fresh``, or another shape.
    """
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(pretrained)
    }

    def choose(path, leaf):
        name = jax.tree_util.keystr(path)
        other = leaves.pop(name, leaf)
        if other.shape != leaf.shape:
            raise UserError(
                f"{origin}: {name} has shape {other.shape}, but the model needs {leaf.shape}"
            )
        return jnp.asarray(other, leaf.dtype)

    result = jax.tree_util.tree_map_with_path(choose, fresh)
    if leaves:
        raise UserError(
            f"{origin}: the model has no parameter {next(iter(leaves))}; is the size the same?"
        )
    return result


def ema_update(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
    """Returns ``ema + (1 - decay_t) (params - ema)``, ``decay_t = min(decay, (1 + step) / (10 + step))``.

    The ramp forgets the initial parameters within a few updates and then costs nothing.
    (`optax.incremental_update` sums two products, which rounds otherwise.)
    """
    rate = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)


def apply_student(
    optimizer: optax.GradientTransformation, state: TrainState, value, grads, ema_decay: float
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies an update to the student and its average, and counts the step.

    An update whose loss or gradients are not finite changes nothing but the counters. (Optax's
    `apply_if_finite` looks at the gradients alone, knows no average, and gives in after some updates.)

    Returns:
      ``(state, metrics)``.
    """
    norm, params, opt_state = _step(optimizer, grads, state.params, state.opt_state)
    ema = ema_update(state.ema, params, ema_decay, state.step)
    new = {"params": params, "ema": ema, "opt_state": opt_state}
    state = _keep_if_finite(state, 0, norm, value, new).replace(step=state.step + 1)
    difference = optax.tree.sub(state.ema, state.params)
    distance = optax.tree.norm(difference) / optax.tree.norm(state.params)
    return state, {"grad/student": norm, "ema/distance": distance}


def apply_critic(
    optimizer: optax.GradientTransformation, state: TrainState, value, grads, spectral: Tree
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies an update to the critic's trained part, as `apply_student`; ``spectral`` replaces its vectors."""
    norm, trained, opt_state = _step(optimizer, grads, trained_of(state.disc), state.disc_opt_state)
    disc = state.disc | trained | {"spectral": spectral, "updates": state.disc["updates"] + 1}
    state = _keep_if_finite(state, 1, norm, value, {"disc": disc, "disc_opt_state": opt_state})
    return state, {"grad/heads": norm, **_counters(state)}


def apply_fake(
    optimizer: optax.GradientTransformation, state: TrainState, value, grads
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies an update to the fake score, as `apply_student`."""
    norm, params, opt_state = _step(optimizer, grads, state.fake["params"], state.fake_opt_state)
    fake = {"params": params, "updates": state.fake["updates"] + 1}
    state = _keep_if_finite(state, 2, norm, value, {"fake": fake, "fake_opt_state": opt_state})
    return state, {"grad/fake": norm, **_counters(state)}


def trained_of(disc: Tree) -> Tree:
    """The part of a critic that its optimizer trains: heads, and the backbone of a critic of its own."""
    return {name: disc[name] for name in ("params", "backbone") if name in disc}


def _step(optimizer, grads, params, opt_state):
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    return optax.tree.norm(grads), optax.apply_updates(params, updates), new_opt_state


def _keep_if_finite(state: TrainState, which: int, norm, value, new: dict) -> TrainState:
    """Takes new fields where an update was finite, and counts it where it was not."""
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    kept = {name: getattr(state, name) for name in new}
    in_a_row = jnp.where(finite, 0, state.in_a_row[which] + 1)
    return state.replace(
        skipped=state.skipped + (~finite).astype(jnp.int32),
        in_a_row=state.in_a_row.at[which].set(in_a_row),
        **optax.tree.where(finite, new, kept),
    )


def health(loss: jax.Array, state: TrainState) -> dict[str, jax.Array]:
    """Returns the share of samples whose loss [B] is not finite, and the counters."""
    bad = 1 - jnp.isfinite(loss).astype(jnp.float32)
    return {"health/nonfinite_samples": bad.mean(), **_counters(state)}


def _counters(state: TrainState) -> dict[str, jax.Array]:
    return {"health/skipped": state.skipped, "health/in_a_row": state.in_a_row.max()}
