"""Weights of inference in eight bits, with a scale for each output channel, by qwix; the rest stays as it is.

A product takes such a kernel back to the type of its rows (`precision.dot_general`): half the memory, the same
arithmetic. That is so where a compiler widens one kernel after the other, as on GPUs; on CPUs XLA widens all at
once.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ...core.errors import UserError

LEAST = 2**14  # weights of a kernel, below which nothing is saved


def quantize(params: Any) -> Any:
    """Parameters, arranged for inference, with the large kernels [in, out] of their blocks in eight bits.

    Not the output's of linear attention, which meets k^T v before any row does, as an array; and nothing beside
    the blocks: embeddings of time and text, the last layer.
    """
    import qwix

    def convert(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if not {"blocks", "layers"} & set(names) or names[-3:-1] == ["attn1", "to_out_0"]:
            return leaf
        if names[-1] != "kernel" or leaf.ndim != 2 or leaf.size < LEAST:
            return leaf
        return qwix.quantize(leaf, jnp.int8, channelwise_axes=(1,))

    return jax.tree_util.tree_map_with_path(convert, params)


def check_installed() -> None:
    """Raises UserError where qwix is missing."""
    try:
        import qwix  # noqa: F401
    except ImportError:
        raise UserError("--int8 needs qwix: pip install 'sprint_jax[int8]'", exit_code=2) from None
