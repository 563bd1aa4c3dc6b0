"""The stack of a transformer's blocks: scanned in segments or unrolled, rematerialized, cast, unstacked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _all_but_weights(primitive, *_, **__) -> bool:
    return primitive.name not in ("linear_call", "sharding_constraint")


def remat(step: Callable, policy: str, scan: bool, split: bool = False) -> Callable:
    """Wraps ``step`` in `jax.checkpoint` under a named policy.

    Names: 'none' keeps everything; 'full' keeps block inputs only; 'dots' keeps matmul outputs;
    'dots_no_batch' keeps the outputs of matmuls with weights; 'offload' keeps block inputs in the host's
    memory (TPU, GPU).

    Args:
      split: the step gathers its weights; the backward pass then gathers them again, whatever the policy.

    Raises:
      ValueError: for any other name.
    """
    if policy == "none":
        return (
            jax.checkpoint(step, policy=_all_but_weights, prevent_cse=not scan) if split else step
        )
    if policy not in POLICIES:
        raise ValueError(f"remat policy '{policy}' is not one of none, {', '.join(POLICIES)}")
    return jax.checkpoint(step, policy=POLICIES[policy], prevent_cse=not scan)


class Side(NamedTuple):
    """A second stream beside blocks 1 to ``count`` of a stack, such as a control branch.

    Attributes:
      blocks: its own parameters, leaves [count, ...], or a tuple of every block's.
      count: of its blocks, fewer than the stack has.
      enter: ``enter(x) -> side``: its start, from the output of block 0.
      step: ``step((params of a block, its own), (x, side)) -> (x, side)``.
    """

    blocks: Any
    count: int
    enter: Callable
    step: Callable


def run_blocks(
    step,
    blocks,
    x: Array,
    num_layers: int,
    taps: tuple[int, ...],
    scan: bool,
    side: Side | None = None,
):
    """Runs ``x = step(params_i, x)`` over stacked params in segments that end at tapped blocks.

    Args:
      step: ``(params of one block, x) -> x``.
      blocks: pytree with leaves [num_layers, ...], or a tuple of every block's own (`unstack_blocks`).
      taps: increasing block indices; with taps, blocks after the last one do not run.
      side: a stream beside some of the blocks, which are segments of their own.

    Returns:
      ``(x, outputs of the tapped blocks)``.
    """
    ends = {tap + 1 for tap in taps} or {num_layers}
    cuts = {1, 1 + side.count} if side else set()
    scan = scan and not isinstance(blocks, tuple)
    beside = side.blocks if side else ()
    if not scan:
        blocks, beside = unstack(blocks), unstack(beside)
    features, start, stream = [], 0, None
    for end in sorted(ends | {cut for cut in cuts if cut < max(ends)}):
        layers = _between(blocks, start, end)
        if side and 0 < start <= side.count:
            stream = side.enter(x) if start == 1 else stream
            layers = layers, _between(beside, start - 1, end - 1)
            layers = layers if scan else tuple(zip(*layers, strict=True))
            x, stream = _run(side.step, layers, (x, stream), scan)
        else:
            x = _run(step, layers, x, scan)
        if end in ends:
            features.append(x)
        start = end
    return x, tuple(features) if taps else ()


def _between(blocks, start: int, end: int):
    if isinstance(blocks, tuple):
        return blocks[start:end]
    return jax.tree.map(lambda leaf: leaf[start:end], blocks)


def _run(step, layers, carry, scan: bool):
    if scan:
        return jax.lax.scan(lambda carry, params: (step(params, carry), None), carry, layers)[0]
    for params in layers:
        carry = step(params, carry)
    return carry


def unstack(blocks) -> tuple:
    """Splits leaves [num_layers, ...] into one tree for each block; a tuple of these is returned as it is."""
    if isinstance(blocks, tuple):
        return blocks
    leaves, tree = jax.tree.flatten(blocks)
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):  # views, which take no room
        return tuple(jax.tree.unflatten(tree, layer) for layer in zip(*leaves, strict=True))
    # The transpose of a split is one concatenation; that of indexing is a sum of padded gradients, which
    # took a quarter of the backward pass of 7 blocks on CPU.
    parts = [jax.lax.split(leaf, (1,) * leaf.shape[0], axis=0) for leaf in leaves]
    parts = [[jax.lax.squeeze(each, (0,)) for each in part] for part in parts]
    return tuple(jax.tree.unflatten(tree, layer) for layer in zip(*parts, strict=True))


def stack(blocks):
    """The inverse of `unstack`: leaves [num_layers, ...]."""
    return jax.tree.map(lambda *a: jnp.stack(a), *blocks) if isinstance(blocks, tuple) else blocks


def unstack_blocks(params: dict) -> dict:
    """Returns parameters of a SanaTransformer with unstacked blocks, which ``apply`` takes as well.

    Blocks are then unrolled whatever ``scan`` says. On CPU this saves copying every block's weights out of
    the stack, a tenth of a forward pass at width 1152; elsewhere it only slows compilation.
    """
    apart = params | {"transformer_blocks": unstack(params["transformer_blocks"])}
    return apart | {"control": unstack_blocks(params["control"])} if "control" in params else apart


def compute_params(params, dtype):
    """Casts the weights of matmuls and convolutions to ``dtype``, as the network itself does.

    The network's result stays the same. Norms, modulation tables, the time embedding and the logvar head
    compute in float32 and are not cast.
    """

    def cast(path, leaf):
        names = [getattr(entry, "key", None) for entry in path]
        wide_layer = "time_embed" in names or "logvar_linear" in names
        return leaf if wide_layer or names[-1] not in ("kernel", "bias") else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
