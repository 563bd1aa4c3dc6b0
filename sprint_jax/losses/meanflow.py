"""MeanFlow (arXiv 2505.13447) in distillation form: a flow map with a target time.

The average velocity ``u(x_t, t, r)`` from flow time ``t`` down to ``r`` obeys the MeanFlow identity
``u = v - (t - r) du/dt``, with ``v`` the teacher's velocity and ``d/dt`` along its trajectory. One step of the
map goes from ``x_t`` to ``x_t - (t - r) u``, whatever the distance.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..trigflow import expand, flow_add_noise
from .per_sample import per_sample_mean

Array = jax.Array


def meanflow_loss(
    average: Callable,
    teacher: Callable,
    params,
    latents: Array,
    noise: Array,
    t: Array,
    r: Array,
    *,
    power: float = 1.0,
    constant: float = 1e-3,
):
    """The MeanFlow loss with adaptive weights.

        v = teacher(x_t, t),   (u, du/dt) = jvp of u along (v, 1, 0),   target = v - (t - r) du/dt,
        loss = w |u - sg(target)|^2,   w = 1 / (|u - target|^2 + c)^p without gradient.

    Args:
      average: ``average(params, x_fm, t, r) -> u``; gradients flow to ``params``.
      teacher: ``velocity(x_fm, t)`` of the frozen teacher, guidance included.
      latents, noise: of unit variance [B, h, w, C]; t, r: flow times [B], ``0 <= r <= t <= 1``.
      power, constant: ``p`` and ``c`` of the weight; 0 is the plain squared error.

    Returns:
      ``(mean loss, aux)``: aux per sample [B]: 'error' (mean square before weighting), 't' and 'length', of the
      loss's gradient by ``u``.
    """
    x_t = flow_add_noise(latents, noise, t)
    v = jax.lax.stop_gradient(teacher(x_t, t))
    tangents = (v, jnp.ones_like(t), jnp.zeros_like(r))
    u, du = jax.jvp(lambda x, t, r: average(params, x, t, r), (x_t, t, r), tangents)
    target = jax.lax.stop_gradient(v - expand(t - r, v) * du)
    error = jnp.square(u - target).reshape(len(t), -1).sum(-1)
    weight = jax.lax.stop_gradient(error + constant) ** -power
    aux = {"error": per_sample_mean(jnp.square(u - target)), "t": t}
    aux |= {"length": 2 * weight * jnp.sqrt(error)}
    return (weight * error).mean(), jax.lax.stop_gradient(aux)
