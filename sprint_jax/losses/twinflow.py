"""TwinFlow (arXiv 2512.05150): the student is its own fake score, at negative times.

The student's network learns two flows. At times ``t`` it is the student; at ``-t`` it learns the flow of its
own images. The difference of the fake flow and the teacher's, at a noised image of its own, is the gradient
by which the one-step image is moved: the reverse divergence of DMD without another network. (TwinFlow takes
the student's own flow at ``t`` in the teacher's place; in distillation there is a teacher. Its losses are
means over an image's numbers; these are half of sums, like `dmd_loss`.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..trigflow import flow_add_noise
from .per_sample import per_sample_mean

Array = jax.Array


def twin_flow_loss(velocity: Callable, latents: Array, noise: Array, t: Array):
    """Flow matching of the student's own images at negative times.

    ``|v(x_t, -t) - (noise - latents)|^2 / 2`` with ``x_t = (1 - t) latents + t noise``.

    Args:
      velocity: ``velocity(x_fm, t_fm)`` of the student; gradients flow to what it holds.
      latents: the student's images [B, h, w, C] of unit variance (no gradient).
      noise: N(0, 1); t: flow times [B] in [0, 1].

    Returns:
      ``(mean loss, aux)``: aux per sample [B]: 'error', root mean square, and 'length', of the loss's gradient
      by the velocity.
    """
    latents = jax.lax.stop_gradient(latents)
    v = velocity(flow_add_noise(latents, noise, t), -t)
    error = v - (noise - latents)
    square = jnp.square(error).reshape(len(t), -1).sum(-1)
    aux = {"error": jnp.sqrt(per_sample_mean(jnp.square(error))), "length": jnp.sqrt(square)}
    return square.mean() / 2, jax.lax.stop_gradient(aux)


def rectify_loss(
    one_step: Array, latents: Array, noise: Array, t: Array, *, fake: Callable, real: Callable
):
    """Moves the student's one-step velocity by the difference of the fake flow and the real one.

    ``|v1 - sg(v1 - (v_fake(x_t, -t) - v_real(x_t, t)))|^2 / 2``, whose gradient by ``v1``, which made the
    images, is the difference.

    Args:
      one_step: ``v1`` [B, h, w, C], the velocity at flow time 1; the gradient flows here.
      latents: the images ``noise1 - v1`` of unit variance (no gradient).
      noise, t: at which both flows look.
      fake: ``velocity(x_fm, -t)`` of the student; real: ``velocity(x_fm, t)`` of the teacher with guidance.

    Returns:
      ``(mean loss, {'gap': [B]})``, the root mean square of the difference.
    """
    x_t = flow_add_noise(jax.lax.stop_gradient(latents), noise, t)
    difference = jax.lax.stop_gradient(fake(x_t, -t) - real(x_t, t))
    target = jax.lax.stop_gradient(one_step) - difference
    loss = jnp.square(one_step - target).reshape(len(t), -1).sum(-1) / 2
    return loss.mean(), {"gap": jnp.sqrt(per_sample_mean(jnp.square(difference)))}
