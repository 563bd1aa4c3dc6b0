"""Gradients over microbatches."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def gradients(
    terms: Sequence[Callable], params, batch: dict, key: jax.Array, parts: int = 1
) -> tuple[jax.Array, dict, Any]:
    """Loss and gradients of a sum of terms, means over ``parts`` equal microbatches.

    Terms and microbatches run one after the other, so that the activations of one at a time are
    alive.

    Args:
      terms: each ``term(params, batch, key) -> (scalar, aux)``; aux leaves are per-sample arrays [B].
      params: differentiated tree.
      batch: arrays with a leading axis that ``parts`` divides.
      key: folded with the index of each microbatch; the same for all terms.

    Returns:
      ``(loss, aux, gradients)``, aux of the whole batch and of all terms.
    """

    def of_terms(params, microbatch, key):
        total, everything = None, {}
        for term in terms:
            (value, aux), grads = jax.value_and_grad(term, has_aux=True)(params, microbatch, key)
            everything |= aux
            total = (
                (value, grads) if total is None else jax.tree.map(jnp.add, total, (value, grads))
            )
            # Nothing orders independent terms but this: the next one waits for the sum so far.
            total, params = jax.lax.optimization_barrier((total, params))
        return total, everything

    if parts == 1:
        (value, grads), aux = of_terms(params, batch, jax.random.fold_in(key, 0))
        return value, aux, grads

    def one(total, inputs):
        microbatch, i = inputs
        part, aux = of_terms(params, microbatch, jax.random.fold_in(key, i))
        return jax.tree.map(lambda a, b: a + b / parts, total, part), aux

    # Strided, so that each device finds its rows of a microbatch among those it has already.
    def split(a):
        return a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1)

    def merge(a):
        return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])

    microbatches = jax.tree.map(split, batch)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (value, grads), aux = jax.lax.scan(one, zeros, (microbatches, jnp.arange(parts)))
    return value, jax.tree.map(merge, aux), grads
