"""Reductions over all axes but the first."""

import jax
import jax.numpy as jnp

Array = jax.Array


def per_sample_mean(x: Array) -> Array:
    """Mean over all axes but the first: [B, ...] -> [B]."""
    return x.reshape(x.shape[0], -1).mean(-1)


def per_sample_norm(x: Array) -> Array:
    """Euclidean norm over all axes but the first: [B, ...] -> [B]."""
    return jnp.sqrt(jnp.square(x).reshape(x.shape[0], -1).sum(-1))
