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
    """``fresh`` params with every leaf that ``pretrained`` has; the rest stays fresh.

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
    """``ema + (1 - decay_t) (params - ema)`` with ``decay_t = min(decay, (1 + step) / (10 + step))``.

    The ramp forgets the initial parameters within a few updates and then costs nothing.
    """
    rate = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)


def select(finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """``new`` where the update was finite, else ``old``, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def tree_norm(tree: Tree) -> jax.Array:
    """Global Euclidean norm, float32."""
    return jnp.sqrt(sum(jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(tree)))


def apply_gradients(
    optimizer: optax.GradientTransformation, ema_decay: float, state: TrainState, value, grads
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Optimizer and EMA, and one step more; a non-finite update leaves all else but counters as it was.

    Returns:
      ``(state, metrics)``.
    """
    norm = tree_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = ema_update(state.ema, params, ema_decay, state.step)
    params, ema, opt_state = select(
        finite, (params, ema, opt_state), (state.params, state.ema, state.opt_state)
    )
    state = _count(state, 0, finite).replace(
        step=state.step + 1, params=params, ema=ema, opt_state=opt_state
    )
    distance = tree_norm(jax.tree.map(jnp.subtract, ema, params)) / tree_norm(params)
    return state, {"grad/student": norm, "ema/distance": distance}


def apply_head_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, spectral: Tree, value, grads
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The heads' part of `apply_gradients`; ``spectral`` replaces the old vectors with it."""
    norm = tree_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    updates, opt_state = optimizer.update(grads, state.disc_opt_state, state.disc["params"])
    params = optax.apply_updates(state.disc["params"], updates)
    new = ({"params": params, "spectral": spectral}, opt_state)
    disc, disc_opt_state = select(finite, new, (state.disc, state.disc_opt_state))
    state = _count(state, 1, finite).replace(disc=disc, disc_opt_state=disc_opt_state)
    counts = {"health/skipped": state.skipped, "health/in_a_row": state.in_a_row.max()}
    return state, {"grad/heads": norm} | counts


def _count(state: TrainState, which: int, finite: jax.Array) -> TrainState:
    """Counts a skipped update of the student (0) or the heads (1)."""
    in_a_row = jnp.where(finite, 0, state.in_a_row[which] + 1)
    return state.replace(
        skipped=state.skipped + (~finite).astype(jnp.int32),
        in_a_row=state.in_a_row.at[which].set(in_a_row),
    )


def health(loss: jax.Array, state: TrainState) -> dict[str, jax.Array]:
    """Share of samples whose loss [B] is not finite, and the counters."""
    bad = 1 - jnp.isfinite(loss).astype(jnp.float32)
    return {
        "health/nonfinite_samples": bad.mean(),
        "health/skipped": state.skipped,
        "health/in_a_row": state.in_a_row.max(),
    }
