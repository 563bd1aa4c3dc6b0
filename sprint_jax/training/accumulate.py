"""Gradients over microbatches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def gradients(loss: Callable, params, batch: dict, key: jax.Array, parts: int):
    """Mean loss and gradients over ``parts`` equal microbatches, run one after the other.

    Args:
      loss: ``loss(params, batch, key) -> (scalar, aux)``; aux leaves are per-sample arrays [B].
      params: differentiated tree.
      batch: arrays with a leading axis that ``parts`` divides.
      key: folded with the index of each microbatch.

    Returns:
      ``(loss, aux, gradients)``, aux of the whole batch.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, aux), grads = value_and_grad(params, batch, jax.random.fold_in(key, 0))
        return value, aux, grads

    def one(total, inputs):
        microbatch, i = inputs
        (value, aux), grads = value_and_grad(params, microbatch, jax.random.fold_in(key, i))
        return jax.tree.map(lambda a, b: a + b / parts, total, (value, grads)), aux

    # Strided, so that each device finds its rows of a microbatch among those it has already.
    def split(a):
        return a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1)

    def merge(a):
        return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])

    microbatches = jax.tree.map(split, batch)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (value, grads), aux = jax.lax.scan(one, zeros, (microbatches, jnp.arange(parts)))
    return value, jax.tree.map(merge, aux), grads
