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
    """The static half of a run: definitions and optimizers, no arrays."""

    model: SanaTransformer
    teacher: SanaTransformer | None
    heads: DiscriminatorHeads | None
    optimizer: optax.GradientTransformation
    disc_optimizer: optax.GradientTransformation | None


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint holds; frozen networks are arguments of the updates, not state.

    Attributes:
      step: count of generator updates and of nothing else, int32 scalar.
      params, ema: the trained network and the exponential moving average of its parameters, float32.
      opt_state: optimizer state of ``params``.
      disc, disc_opt_state: LADD heads ``{'params', 'spectral'}`` and their optimizer; None without.
      skipped: count of updates skipped for not being finite; in_a_row: how many of them just now.
    """

    step: jax.Array
    params: Tree
    ema: Tree
    opt_state: Tree
    disc: Tree
    disc_opt_state: Tree
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


def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    value: jax.Array,
    grads: Tree,
    *,
    ema_decay: float | None = None,
    spectral: Tree = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies one update to the student, or to the heads if ``spectral`` is given.

    An update whose loss or gradients are not finite changes nothing but the counters. (Optax's
    `apply_if_finite` looks at the gradients alone, knows no average, and gives in after some updates.)

    Args:
      value, grads: the loss and its gradients.
      ema_decay: of the student's average; its update is counted as a step.
      spectral: replaces the heads' spectral vectors.

    Returns:
      ``(state, metrics)``.
    """
    heads = spectral is not None
    old = (state.disc["params"], state.disc_opt_state) if heads else (state.params, state.opt_state)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    updates, opt_state = optimizer.update(grads, old[1], old[0])
    params = optax.apply_updates(old[0], updates)
    if heads:
        new = {"disc": {"params": params, "spectral": spectral}, "disc_opt_state": opt_state}
    else:
        ema = ema_update(state.ema, params, ema_decay, state.step)
        new = {"params": params, "ema": ema, "opt_state": opt_state}
    kept = {name: getattr(state, name) for name in new}
    in_a_row = jnp.where(finite, 0, state.in_a_row[int(heads)] + 1)
    state = state.replace(
        step=state.step if heads else state.step + 1,
        skipped=state.skipped + (~finite).astype(jnp.int32),
        in_a_row=state.in_a_row.at[int(heads)].set(in_a_row),
        **optax.tree.where(finite, new, kept),
    )
    if heads:
        return state, {"grad/heads": norm, **_counters(state)}
    difference = optax.tree.sub(state.ema, state.params)
    distance = optax.tree.norm(difference) / optax.tree.norm(state.params)
    return state, {"grad/student": norm, "ema/distance": distance}


def health(loss: jax.Array, state: TrainState) -> dict[str, jax.Array]:
    """Returns the share of samples whose loss [B] is not finite, and the counters."""
    bad = 1 - jnp.isfinite(loss).astype(jnp.float32)
    return {"health/nonfinite_samples": bad.mean(), **_counters(state)}


def _counters(state: TrainState) -> dict[str, jax.Array]:
    return {"health/skipped": state.skipped, "health/in_a_row": state.in_a_row.max()}
