"""Matrix products that are float32 on every device where their operands are.

By default JAX lets A100 and later GPUs round float32 operands to TF32 (10 bits of mantissa), and TPUs to
bfloat16 (7 bits): a central difference of such a network measures the rounding. Every matmul and convolution of
`models` takes its precision from here: float32 operands are multiplied as float32, and what may be rounded is
bfloat16 by its dtype. On CPU the programs are the same either way.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def precision_of(*operands: Array) -> jax.lax.Precision | None:
    """Returns 'highest' for operands that meet in float32 or wider, the default for narrower ones."""
    wide = jnp.finfo(jnp.result_type(*operands)).bits >= 32
    return jax.lax.Precision.HIGHEST if wide else None


def dot_general(a: Array, b: Any, dimensions: Any, precision: Any = None, **how: Any) -> Array:
    """Computes `jax.lax.dot_general` at `precision_of` its operands, for modules of Flax.

    ``b`` may be a kernel of `inference.int8.quantize`.
    """
    if is_quantized(b):
        from qwix import dot_general as of_quantized

        b = b.astype(a.dtype)  # to which it is taken back
        return of_quantized(a, b, dimensions, precision=precision or precision_of(a), **how)
    return jax.lax.dot_general(a, b, dimensions, precision=precision or precision_of(a, b), **how)


def is_quantized(kernel: Any) -> bool:
    """Whether a kernel is one of `inference.int8.quantize`."""
    return hasattr(kernel, "qvalue")


def einsum(subscripts: str, *operands: Array, **how: Any) -> Array:
    """Computes `jnp.einsum` at `precision_of` its operands."""
    return jnp.einsum(subscripts, *operands, precision=precision_of(*operands), **how)
