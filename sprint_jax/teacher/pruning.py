"""Depth pruning: the importance of a transformer's blocks, and a network of the most important ones.

SANA-1.5 (arXiv 2501.18427, section 2.3): a block's importance is 1 minus the cosine similarity of its input and
output tokens, averaged over prompts and times. The published code has no pruning; the authors described the
details in a reply.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .. import trigflow
from ..models.blocks import compute_params, stack, unstack_blocks
from ..models.layers import wide
from ..models.sana import SanaTransformer, SanaTransformerBlock

Tree = Any


def block_importance(
    model: SanaTransformer, params: Tree, batches: list[dict], times: int
) -> np.ndarray:
    """Returns 1 - cosine similarity of each block's input and output tokens, [num_layers] in [0, 2].

    Args:
      model, params: a flow network.
      batches: latents [B, h, w, C], text [B, L, D], mask [B, L] each.
      times: flow times, at the middles of equal parts of [0, 1].
    """
    # Unrolled, whatever the model says: values inside of a scan cannot be handed out.
    plain = model.clone(scan=False, remat="none", partition=None)

    @jax.jit
    def measure(params, batch, t, key):
        found = []

        def watch(call, arguments, keywords, context):
            result = call(*arguments, **keywords)
            if isinstance(context.module, SanaTransformerBlock):
                found.append(_change(wide(arguments[0]), wide(result)))
            return result

        noise = jax.random.normal(key, batch["latents"].shape)
        times = jnp.full(len(noise), t)
        x = trigflow.flow_add_noise(wide(batch["latents"]), noise, times)
        variables = {"params": unstack_blocks(compute_params(params, model.dtype))}
        with nn.intercept_methods(watch):
            plain.apply(variables, x, times, batch["text"], batch["mask"])
        return jnp.stack(found)

    visits = [(batch, (i + 0.5) / times) for batch in batches for i in range(times)]
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(len(visits))]
    values = [measure(params, *visit, key) for visit, key in zip(visits, keys, strict=True)]
    return np.asarray(values, np.float64).mean(0)


def _change(before: jax.Array, after: jax.Array) -> jax.Array:
    sizes = jnp.square(before).sum(-1) * jnp.square(after).sum(-1)
    return 1 - ((before * after).sum(-1) / jnp.sqrt(sizes + 1e-30)).mean()


def choose_blocks(importance: Sequence[float], count: int, protect: int = 1) -> tuple[int, ...]:
    """Returns the ``count`` most important blocks, in their order.

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
    """Returns SanaTransformer's fields and parameters (blocks stacked) with the given blocks only.

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
    """Draws a bar for each block, kept ones in blue, as a PNG."""
    # Imported here since it takes a second; a Figure without pyplot has no global state.
    from matplotlib.figure import Figure

    count = len(importance)
    figure = Figure(figsize=(max(4.0, 0.22 * count + 2), 3.2), layout="constrained")
    axes = figure.subplots()
    colors = ["tab:blue" if i in keep else "lightgrey" for i in range(count)]
    axes.bar(range(count), importance, color=colors)
    axes.set_xlabel(f"block ({len(keep)} of {count} kept, blue)")
    axes.set_ylabel("1 - cosine(input, output)")
    if min(importance) > 0 and max(importance) > 50 * min(importance):
        axes.set_yscale("log")
    figure.savefig(path, format="png", dpi=110)
