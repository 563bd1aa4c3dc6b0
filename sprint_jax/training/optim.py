"""Optimizers: AdamW and CAME with clipping, weight decay, warm-up and learning rate decay.

CAME (Luo et al., 2023, arXiv 2307.02047) is written here as SANA's training code runs it: linear
layers and 1x1 convolutions keep factored second moments, everything else a full one, there is no
bias correction, and the confidence term applies to factored leaves only.

The transformer's blocks are one stacked tree: a leaf [num_layers, in, out] is num_layers matrices,
not one tensor. Which leaves are stacked is a pure function of their path in the tree, given as
``stacked``; such leaves are treated layer by layer, with the same result as separate leaves.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.errors import UserError

Array = jax.Array
Tree = Any
Path = tuple[str, ...]
Moments = dict[str, Array]

UNDECAYED = ("bias", "scale", "norm", "table", "embedding")


def in_transformer_blocks(path: Path) -> bool:
    """True for leaves under a ``transformer_blocks`` key, which are stacked on a leading axis."""
    return "transformer_blocks" in path


def path_names(key_path: tuple) -> Path:
    """A jax key path as the tuple of its keys, attribute names and indices, each a string."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in key_path)


class CameState(NamedTuple):
    """State of `scale_by_came`, float32.

    Attributes:
      momentum: a tree like the params, with their shapes.
      moments: a tree like the params whose leaves are dicts: ``row``, ``column``,
        ``residual_row`` and ``residual_column`` of a factored matrix [in, out] (shapes [in] and
        [out]), or ``full`` with the shape of the leaf. Stacked leaves keep their leading axis.
    """

    momentum: Tree
    moments: Tree


def is_factored(shape: tuple[int, ...]) -> bool:
    """True for matrices [in, out] and 1x1 convolution kernels [1, 1, in, out] of one layer."""
    return len(shape) == 2 or (len(shape) == 4 and shape[:2] == (1, 1))


def _root_mean_square(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _inverse_root(row: Array, column: Array, shape: tuple[int, ...]) -> Array:
    """1 / sqrt of the rank-one matrix with the given row [in] and column [out] means."""
    row_factor = jax.lax.rsqrt(row / jnp.mean(row))
    return (row_factor[:, None] * jax.lax.rsqrt(column)[None, :]).reshape(shape)


def scale_by_came(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    *,
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    stacked: Callable[[Path], bool] = in_transformer_blocks,
) -> optax.GradientTransformation:
    """The CAME update direction (to be multiplied by minus the learning rate).

    Args:
      b1, b2, b3: decay of the momentum, of the second moment and of the residual. Without momentum, b1 = 0,
        there is no residual either.
      eps: added to the squared gradient and to the squared residual.
      clip_threshold: an update whose root mean square over one layer's leaf is larger is shrunk to
        it, before momentum.
      stacked: tells from a leaf's path whether its leading axis numbers layers.
    """

    def zeros(shape: tuple[int, ...], leading: tuple[int, ...]) -> Moments:
        if not is_factored(shape):
            return {"full": jnp.zeros(leading + shape, jnp.float32)}
        row = jnp.zeros(leading + shape[-2:-1], jnp.float32)
        column = jnp.zeros(leading + shape[-1:], jnp.float32)
        return {"row": row, "column": column, "residual_row": row, "residual_column": column}

    def init(params: Tree) -> CameState:
        def moments(key_path, leaf):
            split = 1 if stacked(path_names(key_path)) else 0
            return zeros(leaf.shape[split:], leaf.shape[:split])

        momentum = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return CameState(momentum, jax.tree_util.tree_map_with_path(moments, params))

    def update_layer(gradient: Array, momentum: Array, moments: Moments):
        """One layer's leaf: returns (direction, new momentum, new moments)."""
        factored = is_factored(gradient.shape)
        square = jnp.square(gradient) + eps[0]
        new = {}
        if factored:
            square = square.reshape(gradient.shape[-2:])
            new["row"] = b2 * moments["row"] + (1 - b2) * square.mean(1)
            new["column"] = b2 * moments["column"] + (1 - b2) * square.mean(0)
            update = gradient * _inverse_root(new["row"], new["column"], gradient.shape)
        else:
            new["full"] = b2 * moments["full"] + (1 - b2) * square
            update = gradient * jax.lax.rsqrt(new["full"])
        update = update / jnp.maximum(1.0, _root_mean_square(update) / clip_threshold)
        momentum = b1 * momentum + (1 - b1) * update
        if not factored:
            return momentum, momentum, new
        if not b1:  # the mean is the update itself: nothing to be confident of
            return momentum, momentum, moments | new
        residual = (jnp.square(update - momentum) + eps[1]).reshape(gradient.shape[-2:])
        new["residual_row"] = b3 * moments["residual_row"] + (1 - b3) * residual.mean(1)
        new["residual_column"] = b3 * moments["residual_column"] + (1 - b3) * residual.mean(0)
        confidence = _inverse_root(new["residual_row"], new["residual_column"], gradient.shape)
        return momentum * confidence, momentum, new

    def update(gradients: Tree, state: CameState, params: Tree = None):
        del params
        with_paths, structure = jax.tree_util.tree_flatten_with_path(gradients)
        results = []
        for (key_path, gradient), momentum, moments in zip(
            with_paths,
            structure.flatten_up_to(state.momentum),
            structure.flatten_up_to(state.moments),
            strict=True,
        ):
            layer = jax.vmap(update_layer) if stacked(path_names(key_path)) else update_layer
            results.append(layer(gradient.astype(jnp.float32), momentum, moments))
        directions, momentum, moments = (
            structure.unflatten(column) for column in zip(*results, strict=True)
        )
        return directions, CameState(momentum, moments)

    return optax.GradientTransformation(init, update)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs ``inner`` on float32 copies of gradients and params, so that its state is float32."""

    def cast(tree: Tree) -> Tree:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)

    def init(params: Tree):
        return inner.init(cast(params))

    def update(gradients: Tree, state: Tree, params: Tree = None):
        return inner.update(cast(gradients), state, None if params is None else cast(params))

    return optax.GradientTransformation(init, update)


def decay_mask(params: Tree, stacked: Callable[[Path], bool] = in_transformer_blocks) -> Tree:
    """A tree of bools: True for the matrices and kernels that weight decay applies to.

    False for whatever is a vector within one layer and for leaves whose own name says bias, scale,
    norm, table (scale_shift_table) or embedding.
    """

    def decays(key_path, leaf) -> bool:
        path = path_names(key_path)
        rank = len(leaf.shape) - bool(stacked(path))
        named = bool(path) and any(word in path[-1].lower() for word in UNDECAYED)
        return rank >= 2 and not named

    return jax.tree_util.tree_map_with_path(decays, params)


def learning_rate_schedule(
    learning_rate: float, warmup_steps: int, decay_steps: int = 0
) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ...: a linear warm-up, then constant or cosine to zero.

    Update n of the warm-up has ``learning_rate * n / warmup_steps`` (so update 0 has 0), as in the
    reference's scheduler. After it, ``decay_steps`` > 0 lets the rate fall on a half cosine to zero
    over that many updates, where it stays; 0 keeps it constant.
    """

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        factor = jnp.minimum(1.0, count / warmup_steps) if warmup_steps > 0 else jnp.float32(1)
        if decay_steps > 0:
            done = jnp.clip((count - warmup_steps) / decay_steps, 0.0, 1.0)
            factor = factor * 0.5 * (1 + jnp.cos(math.pi * done))
        return learning_rate * factor

    return schedule


def make_optimizer(
    name: str,
    learning_rate: float,
    *,
    warmup_steps: int,
    decay_steps: int = 0,
    clip_norm: float,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps: float = 1e-8,
    stacked: Callable[[Path], bool] = in_transformer_blocks,
) -> optax.GradientTransformation:
    """Clipping, then AdamW or CAME, then decoupled weight decay, then the learning rate schedule.

    Updates and state are float32 (counters int32) whatever the dtype of params and gradients.

    Args:
      name: 'adamw' or 'came'.
      learning_rate: peak learning rate.
      warmup_steps, decay_steps: see `learning_rate_schedule`.
      clip_norm: gradients whose global l2 norm is larger are scaled down to it; <= 0 is off.
      weight_decay: decoupled, multiplied by the learning rate; skips vectors, norms, biases and
        tables (`decay_mask`).
      b1, b2: decay of the first and second moment.
      b3: decay of CAME's residual; AdamW has none.
      eps: AdamW's. CAME's two are those of the reference, 1e-30 and 1e-16.
      stacked: tells from a leaf's path whether its leading axis numbers layers.

    Raises:
      UserError: for another name.
    """
    if name == "adamw":
        direction = optax.scale_by_adam(b1, b2, eps)
    elif name == "came":
        direction = scale_by_came(b1, b2, b3, stacked=stacked)
    else:
        raise UserError(f"optimizer {name!r} is not known; choose 'adamw' or 'came'", exit_code=2)
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    parts.append(direction)
    if weight_decay:
        parts.append(
            optax.add_decayed_weights(weight_decay, mask=lambda params: decay_mask(params, stacked))
        )
    schedule = learning_rate_schedule(learning_rate, warmup_steps, decay_steps)
    parts.append(optax.scale_by_learning_rate(schedule))
    return in_float32(optax.chain(*parts))
