"""Trajectory distillation: the student is told where the teacher's trajectory ends.

A solver runs the teacher from noise to an image in a few steps; from every point on the way the student's
consistency function is to give that image. No derivative and no bootstrapping: what happens near data need
not travel up to noise through the student, as in sCM. Sources: knowledge distillation of samplers (Luhman and
Luhman, arXiv 2101.02388), the regression of DMD (arXiv 2311.18828).
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ..trigflow import expand
from .per_sample import per_sample_mean

Array = jax.Array


def trajectory_loss(
    F: Callable,
    x_t: Array,
    t: Array,
    end: Array,
    sigma_d: float,
    *,
    power: float = 0.5,
    constant: float = 1e-3,
):
    """Regression of the network to the F whose consistency function gives the trajectory's end.

        target = (cos(t) x_t - end) / (sigma_d sin(t)),
        loss = w |F - target|^2,   w = 1 / (|F - target|^2 + c)^p without gradient.

    Args:
      F: ``F(x, t)``; gradients flow to what it holds.
      x_t: points of trajectories [B, h, w, C] at angles ``t`` [B] above 0, with the deviation of TrigFlow's.
      end: their images [B, h, w, C], standard deviation ``sigma_d``.
      power, constant: ``p`` and ``c``; with 0.5 a gradient has the length 2 whatever the error, with 0 the loss
        is the squared error.

    Returns:
      ``(mean loss, aux)``: aux per sample [B]: 'error', root mean square, and 'length', of the loss's gradient
      by F.
    """
    chex.assert_equal_shape([x_t, end])
    target = jax.lax.stop_gradient(
        (jnp.cos(expand(t, x_t)) * x_t - end) / (sigma_d * jnp.sin(expand(t, x_t)))
    )
    difference = F(x_t / sigma_d, t) - target
    square = jnp.square(difference).reshape(len(t), -1).sum(-1)
    weight = jax.lax.stop_gradient(square + constant) ** -power
    aux = {"error": jnp.sqrt(per_sample_mean(jnp.square(difference)))}
    aux |= {"length": 2 * weight * jnp.sqrt(square)}
    return (weight * square).mean(), jax.lax.stop_gradient(aux)
