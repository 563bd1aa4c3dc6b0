"""Depth pruning: which blocks of a transformer change their tokens least, and a network without them.

SANA-1.5 (arXiv 2501.18427, section 2.3): a block's importance is 1 minus the cosine similarity of its input and
output tokens, averaged over prompts and times. Source of the details: a reply of the authors, in words; the
published code has none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models.blocks import stack
from ..models.layers import wide
from ..models.sana import SanaTransformer, SanaTransformerBlock
from .watch import mean_over_times, watched

Tree = Any


def block_importance(
    model: SanaTransformer, params: Tree, batches: list[dict], times: int
) -> np.ndarray:
    """1 - cosine similarity of each block's input and output tokens, [num_layers] float64 in [0, 2].

    Args:
      model, params: a flow network.
      batches: latents [B, h, w, C], text [B, L, D], mask [B, L] each.
      times: flow times, at the middles of equal parts of [0, 1].
    """

    def look(module, arguments, result):
        if not isinstance(module, SanaTransformerBlock):
            return None
        before, after = wide(arguments[0]), wide(result)
        dot = (before * after).sum(-1)
        sizes = jnp.square(before).sum(-1) * jnp.square(after).sum(-1)
        return 1 - (dot / jnp.sqrt(sizes + 1e-30)).mean()

    def measure(params, inputs):
        return jnp.stack(watched(model, params, inputs, look))

    return mean_over_times(measure, params, batches, times)


def choose_blocks(importance: Sequence[float], count: int, protect: int = 1) -> tuple[int, ...]:
    """The ``count`` most important blocks, in their order.

    The first and last ``protect`` blocks stay, whatever their importance, as long as ``count`` allows it:
    they translate between latents and features.

    Raises:
      ValueError: if ``count`` is not between 1 and the number of blocks.
    """
    layers = len(importance)
    if not 1 <= count <= layers:
        raise ValueError(f"count {count} must be between 1 and {layers}")
    ends = {i for i in range(layers) if i < protect or i >= layers - protect}
    ends = ends if len(ends) <= count else set()
    by_rank = sorted(range(layers), key=lambda i: (i not in ends, -importance[i], i))
    return tuple(sorted(by_rank[:count]))


def prune_blocks(
    fields: dict[str, Any], params: Tree, keep: Sequence[int]
) -> tuple[dict[str, Any], Tree]:
    """The network with the given blocks only.

    Args:
      fields: of SanaTransformer; params: its parameters.
      keep: increasing block indices.

    Returns:
      ``(fields, params)``, blocks stacked.

    Raises:
      ValueError: if ``keep`` is empty, not increasing, or out of range.
    """
    blocks = stack(params["transformer_blocks"])
    layers = len(blocks["scale_shift_table"])
    keep = [int(i) for i in keep]
    if not keep or keep != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < layers:
        raise ValueError(f"keep {keep} must be increasing block indices below {layers}")
    kept = jax.tree.map(lambda leaf: leaf[np.asarray(keep)], blocks)
    return dict(fields) | {"num_layers": len(keep)}, params | {"transformer_blocks": kept}


def draw_importance(path: Path, importance: Sequence[float], keep: Sequence[int]) -> None:
    """A bar for each block, kept ones in colour, as a PNG."""
    # As in training/log.py: imported where it is needed, without pyplot's global state.
    from matplotlib.figure import Figure

    layers = range(len(importance))
    figure = Figure(figsize=(max(4.0, 0.22 * len(importance) + 2), 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        layers, importance, color=["tab:blue" if i in set(keep) else "lightgrey" for i in layers]
    )
    axes.set_xlabel(f"block ({len(keep)} of {len(importance)} kept, blue)")
    axes.set_ylabel("1 - cosine(input, output)")
    if min(importance) > 0 and max(importance) > 50 * min(importance):
        axes.set_yscale("log")
    figure.savefig(path, format="png", dpi=110)
