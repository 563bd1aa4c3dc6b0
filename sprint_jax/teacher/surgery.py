"""Changes of a trained flow network ahead of its distillation: QK norm, dense time embedding.

SANA-Sprint (arXiv 2503.09641, section 3.2): continuous-time consistency needs the derivative of the network by
time. A sinusoid of times 0..1000 makes it a thousand times as large as one of times 0..1, and attention without
norms of queries and keys lets gradients grow. Both are changed in the trained teacher, which then learns on for
some thousand steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..models.sana import from_fields

Tree = Any

# What surgery cannot change: fields that decide the shapes or the meaning of parameters.
FIXED = (
    "in_channels",
    "out_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "caption_channels",
    "mlp_ratio",
    "patch_size",
    "attention_bias",
    "interpolation_scale",
)
# Steeper units fit better, but their size makes the second layer's gradient a large part of the whole: 5 times
# the rest at 24, half of it at 4.
SLOPE = 4.0  # of a fitted time embedding's hidden units, per whole range of flow times
RIDGE = 1e-3  # of the fit, relative to the mean square of the hidden units; keeps its weights small


def check_fits(origin: str, source: dict[str, Any], target: dict[str, Any], prune: int) -> None:
    """Refuses a source that cannot become the target.

    Args:
      source, target: SanaTransformer's fields.
      prune: blocks to keep, or 0 for all.

    Raises:
      UserError: naming the field, its two values and what to do.
    """
    have, want = from_fields(source), from_fields(target)
    for name in FIXED:
        a, b = getattr(have, name), getattr(want, name)
        if a != b:
            raise UserError(
                f"--model {origin} has {name} {a}, but config.model.{name} is {b}: choose the config of its "
                "size",
                exit_code=2,
            )
    if have.interpolation_scale and have.sample_size != want.sample_size:
        raise UserError(
            f"--model {origin} has positions of sample_size {have.sample_size}, but "
            f"config.model.sample_size is {want.sample_size}",
            exit_code=2,
        )
    if have.qk_norm and not want.qk_norm:
        raise UserError(
            f"--model {origin} has QK norm, which cannot be taken out: set --config.model.qk_norm=true",
            exit_code=2,
        )
    if prune > have.num_layers or prune < 0:
        raise UserError(
            f"--prune {prune}: --model {origin} has {have.num_layers} blocks", exit_code=2
        )
    if not prune and have.num_layers != want.num_layers:
        how = (
            f"prune it with --prune {want.num_layers}"
            if want.num_layers < have.num_layers
            else "blocks cannot be added"
        )
        raise UserError(
            f"--model {origin} has {have.num_layers} blocks, but config.model.num_layers is "
            f"{want.num_layers}: {how}",
            exit_code=2,
        )


def operate(
    source: dict[str, Any], params: Tree, target: dict[str, Any], *, fit_time: bool = True
) -> tuple[Tree, list[str]]:
    """Parameters of the source's network in the target's form; `check_fits` says whether they can be.

    Args:
      source, target: SanaTransformer's fields, of equal depth (see `pruning`).
      params: of the source.
      fit_time: see `fit_time_embedding`; False keeps the old weights where the time scale changes.

    Returns:
      ``(params, changes)``: what was done, in words; where nothing is to be done, the same arrays.
    """
    have, want = from_fields(source), from_fields(target)
    changes = []
    if want.qk_norm and not have.qk_norm:
        params = insert_qk_norm(params)
        changes.append("QK norm inserted, with weights 1")
    if want.timestep_scale != have.timestep_scale:
        change = f"timestep_scale {have.timestep_scale} became {want.timestep_scale}"
        if fit_time:
            params, error = fit_time_embedding(params, have.timestep_scale, want.timestep_scale)
            changes.append(
                f"{change}, the time embedding fitted to the old one with error {error:.3f}"
            )
        else:
            changes.append(f"{change}, the time embedding's weights kept")
    return params, changes


def insert_qk_norm(params: Tree) -> Tree:
    """Parameters with RMS norms of queries and keys in both attentions of every block, all weights 1.

    Weights that keep the size of cross-attention's logits on data were tried and are no better: of a digits
    teacher halfway, the flow loss went from 0.3765 to 0.3782 with ones and to 0.3795 with those.
    (Self-attention does not see a common factor of queries or keys: it cancels.)

    Args:
      params: of a SanaTransformer without QK norm; blocks stacked.
    """
    blocks = params["transformer_blocks"]
    layers, width = blocks["attn1"]["to_q"]["kernel"].shape[::2]
    norm = {"weight": jnp.ones((layers, width), jnp.float32)}
    attentions = {
        name: blocks[name] | {"norm_q": norm, "norm_k": norm} for name in ("attn1", "attn2")
    }
    return params | {"transformer_blocks": blocks | attentions}


def sinusoid_angles(t: np.ndarray, channels: int) -> np.ndarray:
    """The angles of `layers.sinusoid`, float64: [N] to [N, channels / 2]."""
    half = channels // 2
    return t[:, None] * np.exp(-np.log(10000.0) * np.arange(half) / half)[None]


def sinusoid(t: np.ndarray, channels: int) -> np.ndarray:
    """`layers.sinusoid` in float64: [N] to [N, channels]."""
    angles = sinusoid_angles(t, channels)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def fit_time_embedding(
    params: Tree, old_scale: float, new_scale: float, *, points: int = 4096
) -> tuple[Tree, float]:
    """The time embedding for another ``timestep_scale`` that gives about the old one's outputs.

    The published way keeps the old weights and lets training mend what they now say. Here the first layer
    is laid out anew: every hidden unit is ``silu(SLOPE (s(t) - c_j))``, where ``s`` is the channel of the
    sinusoid most like the flow time itself, scaled to [0, 1], and the knots ``c_j`` lie over [0, 1]; together
    they are a smooth basis of functions of time. The second layer is fitted by ridge regression on equally
    spaced times, in float64. Wiggles of the old embedding that are finer than the units are lost, which is
    what a small derivative by time asks for. On digits (benchmarks/ablation.py) the flow loss, 0.352,
    became 1.228 with the old weights and 0.358 with fitted ones; after 180 steps it was 0.417 and 0.353.

    Args:
      params: of a SanaTransformer.
      old_scale, new_scale: the old and the new ``timestep_scale``.
      points: equally spaced flow times in [0, 1].

    Returns:
      ``(params, error)``: the root mean square of what is left, over that of the old outputs' deviation from
      their mean.
    """
    embedder = params["time_embed"]["timestep_embedder"]
    old = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), embedder)
    t = np.linspace(0, 1, points)
    channels, width = old["linear_1"]["kernel"].shape
    target = _embed(old, sinusoid(1000 * old_scale * t, channels))
    seen = sinusoid(1000 * new_scale * t, channels)
    # The sine whose angle ends nearest to 1: it is monotonic, and not so small that rounding would show.
    ends = sinusoid_angles(np.asarray([1000 * new_scale]), channels)[0]
    channel = channels // 2 + int(np.argmin(np.abs(np.log(ends))))
    slope = SLOPE / (seen[-1, channel] - seen[0, channel])
    kernel = np.zeros((channels, width))
    kernel[channel] = slope
    knots = np.linspace(seen[0, channel], seen[-1, channel], width)
    first = {"kernel": kernel, "bias": -slope * knots}
    hidden = _silu(seen @ kernel + first["bias"])
    mean, center = hidden.mean(0), target.mean(0)
    a, b = hidden - mean, target - center
    gram = a.T @ a / points
    gram[np.diag_indices(width)] += RIDGE * np.trace(gram) / width
    weights = np.linalg.solve(gram, a.T @ b / points)
    second = {"kernel": weights, "bias": center - mean @ weights}
    fitted = {"linear_1": first, "linear_2": second}
    error = float(np.sqrt(np.square(_embed(fitted, seen) - target).mean() / np.square(b).mean()))
    fitted = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), fitted)
    time_embed = params["time_embed"] | {"timestep_embedder": fitted}
    return params | {"time_embed": time_embed}, error


def _silu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.tanh(0.5 * x))


def _embed(embedder: dict, seen: np.ndarray) -> np.ndarray:
    first, second = embedder["linear_1"], embedder["linear_2"]
    hidden = _silu(seen @ first["kernel"] + first["bias"])
    return hidden @ second["kernel"] + second["bias"]
