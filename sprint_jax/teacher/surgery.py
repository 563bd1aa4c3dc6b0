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

# Fields that decide the shapes or the meaning of parameters: surgery cannot change them.
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
    # Positions depend on the size.
    for name in [*FIXED, *(["sample_size"] if have.interpolation_scale else [])]:
        a, b = getattr(have, name), getattr(want, name)
        if a != b:
            what = f"{name} {a}, but config.model.{name} is {b}: choose the config of its size"
            raise UserError(f"--model {origin} has {what}", exit_code=2)
    what, layers, wanted = "", have.num_layers, want.num_layers
    if have.qk_norm and not want.qk_norm:
        what = "QK norm, which cannot be taken out: set --config.model.qk_norm=true"
    elif not 0 <= prune <= layers:
        what = f"{layers} blocks: --prune {prune} cannot be"
    elif not prune and layers != wanted:
        how = f"prune it with --prune {wanted}" if wanted < layers else "blocks cannot be added"
        what = f"{layers} blocks, but config.model.num_layers is {wanted}: {how}"
    if what:
        raise UserError(f"--model {origin} has {what}", exit_code=2)


def operate(
    source: dict[str, Any], params: Tree, target: dict[str, Any], *, fit_time: bool = True
) -> tuple[Tree, list[str]]:
    """Returns parameters of the source's network in the target's form, which `check_fits` has accepted.

    Args:
      source, target: SanaTransformer's fields, of equal depth (see `pruning`).
      params: of the source.
      fit_time: see `fit_time_embedding`; False keeps the old weights where the time scale changes.

    Returns:
      ``(params, changes)``: changes in words; without any, the same arrays.
    """
    have, want = from_fields(source), from_fields(target)
    changes = []
    if want.qk_norm and not have.qk_norm:
        params = insert_qk_norm(params)
        changes.append("QK norm inserted, with weights 1")
    if want.timestep_scale != have.timestep_scale:
        how = "the time embedding's weights kept"
        if fit_time:
            params, error = fit_time_embedding(params, have.timestep_scale, want.timestep_scale)
            how = f"the time embedding fitted to the old one with error {error:.3f}"
        change = f"timestep_scale {have.timestep_scale} became {want.timestep_scale}"
        changes.append(f"{change}, {how}")
    return params, changes


def insert_qk_norm(params: Tree) -> Tree:
    """Adds RMS norms of queries and keys to both attentions of every block, all weights 1.

    Weights that keep the size of cross-attention's logits on data were tried and are no better: of a digits
    teacher halfway, the flow loss went from 0.3765 to 0.3782 with ones and to 0.3795 with those.
    (Self-attention does not see a common factor of queries or keys: it cancels.)

    Args:
      params: of a SanaTransformer without QK norm; blocks stacked.
    """
    blocks = params["transformer_blocks"]
    layers, width = blocks["attn1"]["to_q"]["kernel"].shape[::2]
    norm = {"weight": jnp.ones((layers, width), jnp.float32)}
    norms = {"norm_q": norm, "norm_k": norm}
    attentions = {name: blocks[name] | norms for name in ("attn1", "attn2")}
    return params | {"transformer_blocks": blocks | attentions}


def frequencies(channels: int) -> np.ndarray:
    """Returns the angles of `layers.sinusoid` at time 1, [channels / 2] float64."""
    half = channels // 2
    return np.exp(-np.log(10000.0) * np.arange(half) / half)


def sinusoid(t: np.ndarray, channels: int) -> np.ndarray:
    """Computes `layers.sinusoid` in float64: [N] to [N, channels]."""
    angles = t[:, None] * frequencies(channels)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def fit_time_embedding(
    params: Tree, old_scale: float, new_scale: float, *, points: int = 4096
) -> tuple[Tree, float]:
    """Fits the time embedding for another ``timestep_scale`` to the old one's outputs.

    The published way keeps the old weights and lets training mend them. Here the first layer is laid out
    anew: every hidden unit is ``silu(SLOPE (s(t) - c_j))``, where ``s`` is the channel of the sinusoid most
    like the flow time itself, scaled to [0, 1], and the knots ``c_j`` lie over [0, 1]; together they are a
    smooth basis of functions of time. The second layer is fitted by ridge regression on equally spaced
    times, in float64. Wiggles of the old embedding that are finer than the units are lost, as a small
    derivative by time asks for. On digits (benchmarks/ablation.py) the flow loss, 0.352, became 1.228 with
    the old weights and 0.358 with fitted ones; after 180 steps it was 0.417 and 0.353.

    Args:
      params: of a SanaTransformer.
      old_scale, new_scale: the old and the new ``timestep_scale``.
      points: equally spaced flow times in [0, 1].

    Returns:
      ``(params, error)``: the root mean square of the residuals, over that of the old outputs' deviation
      from their mean.
    """
    embedder = params["time_embed"]["timestep_embedder"]
    old = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), embedder)
    t = np.linspace(0, 1, points)
    channels, width = old["linear_1"]["kernel"].shape
    target = _embed(old, sinusoid(1000 * old_scale * t, channels))
    seen = sinusoid(1000 * new_scale * t, channels)
    # The sine whose angle ends nearest to 1: it is monotonic, and not so small that rounding would show.
    ends = 1000 * new_scale * frequencies(channels)
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
