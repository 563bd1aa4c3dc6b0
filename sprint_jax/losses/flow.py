"""The flow-matching loss, which trains teachers."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ..trigflow import flow_add_noise
from .per_sample import per_sample_mean

Array = jax.Array


def flow_matching_loss(velocity: Callable, latents: Array, noise: Array, t_fm: Array):
    """``|v(x_fm, t_fm) - (noise - latents)|^2`` with ``x_fm = (1 - t_fm) latents + t_fm noise``.

    Args:
      velocity: ``velocity(x_fm, t_fm)``.
      latents: unit-variance latents [B, h, w, C] (no ``sigma_d``); noise: N(0, 1), same shape.
      t_fm: flow times [B], as from `trigflow.sample_flow_time`.

    Returns:
      ``(mean loss, {'loss': [B], 't': flow time [B]})``.
    """
    chex.assert_shape([noise, t_fm], [latents.shape, latents.shape[:1]])
    v = velocity(flow_add_noise(latents, noise, t_fm), t_fm)
    chex.assert_equal_shape([v, latents])
    loss = per_sample_mean(jnp.square(v - (noise - latents)))
    return loss.mean(), {"loss": loss, "t": t_fm}
