"""Gradients over microbatches, and how much each term contributes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def gradients(
    terms: Mapping[str, Callable],
    params,
    batch: dict,
    key: jax.Array,
    parts: int = 1,
    measured: Callable = lambda gradients: gradients,
) -> tuple[jax.Array, dict, Any, dict[str, jax.Array]]:
    """Loss and gradients of a sum of terms, means over ``parts`` equal microbatches.

    Terms and microbatches run one after the other, so that the activations of one at a time are
    alive.

    Args:
      terms: by name, each ``term(params, batch, key, found) -> (scalar, aux)``; aux leaves have
        a row for each sample, and ``found`` is the aux of the terms before it.
      params: differentiated tree.
      batch: arrays with a leading axis that ``parts`` divides.
      key: folded with the index of each microbatch; the same for all terms.
      measured: what of a tree of gradients `share` and `cosine` are of.

    Returns:
      ``(loss, aux, gradients, balance)``: aux of the whole batch and of all terms; balance, with several
      terms: ``share/NAME``, the length of a term's gradient over the sum of all lengths, and
      ``cosine/NAME``, to the sum of the terms before it, means over microbatches.
    """

    def of_terms(params, microbatch, key):
        total, everything, lengths, cosines = None, {}, {}, {}
        for name, term in terms.items():
            run = jax.value_and_grad(term, has_aux=True)
            (value, aux), grads = run(params, microbatch, key, everything)
            everything = everything | aux
            if len(terms) > 1:
                lengths[name] = optax.tree.norm(measured(grads))
            if total is None:
                total = value, grads
            else:
                before = measured(total[1])
                product = optax.tree.vdot(before, measured(grads))
                scale = optax.tree.norm(before) * lengths[name]
                cosines[name] = product / jnp.maximum(scale, 1e-30)
                total = jax.tree.map(jnp.add, total, (value, grads))
            # Nothing orders independent terms but this: the next one waits for the sum so far.
            total, params = jax.lax.optimization_barrier((total, params))
        whole = sum(lengths.values())
        balance = {f"share/{name}": length / whole for name, length in lengths.items()}
        balance |= {f"cosine/{name}": cosine for name, cosine in cosines.items()}
        return (*total, balance), everything

    if parts == 1:
        (value, grads, balance), aux = of_terms(params, batch, jax.random.fold_in(key, 0))
        return value, aux, grads, balance

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
    names = [*terms] if len(terms) > 1 else []
    balance = {f"share/{name}": jnp.zeros(()) for name in names}
    balance |= {f"cosine/{name}": jnp.zeros(()) for name in names[1:]}
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), balance)
    (value, grads, balance), aux = jax.lax.scan(one, zeros, (microbatches, jnp.arange(parts)))
    return value, jax.tree.map(merge, aux), grads, balance
