"""Distribution matching distillation (DMD): the student's images are moved by the difference of two scores.

The reverse Kullback-Leibler divergence between noised student images and the teacher's distribution has the
gradient ``score_fake - score_teacher``. The teacher gives one score; a second network, the fake score, is
trained on the student's own images and gives the other. Where images blend two modes, the teacher points to
one of them and the fake score to the blend, so the difference pushes the student off the blend, which the
forward divergence of sCM does not. Sources: DMD2 (arXiv 2405.14867), rCM (arXiv 2510.08431), decoupled
re-noising (arXiv 2511.22677).
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ..trigflow import add_noise, expand, predict_x0
from .per_sample import per_sample_mean

Array = jax.Array
FLOOR = 1e-5  # of the mean distance by which gradients are divided


def denoise(F: Callable, x_t: Array, t: Array, sigma_d: float) -> Array:
    """The denoiser ``D(x_t, t) = cos(t) x_t - sin(t) sigma_d F(x_t / sigma_d, t)`` of a TrigFlow network."""
    return predict_x0(x_t, F(x_t / sigma_d, t), t, sigma_d)


def dmd_loss(
    x0: Array,
    z: Array,
    t: Array,
    *,
    teacher: Callable,
    fake: Callable,
    sigma_d: float,
    engine: tuple[Callable, Callable, Array, Array] | None = None,
    normalize: bool = True,
) -> tuple[Array, dict[str, Array]]:
    """Reverse divergence of student images, by its gradient.

    With ``x_t = cos(t) x0 + sin(t) z``:

        g = D_fake(x_t, t) - D_teacher(x_t, t),    divided by mean |x0 - D_teacher| of each sample,
        loss = |x0 - sg(x0 - g)|^2 / 2,            whose gradient by x0 is g.

    Args:
      x0: the student's images [B, h, w, C], standard deviation ``sigma_d``; the gradient flows here.
      z, t: noise of the same deviation and angles [B] at which both scores look.
      teacher, fake: ``F(x, t)``. The teacher has guidance; the fake score has none.
      engine: decoupled re-noising: ``(guided teacher, unguided teacher, z', t')``. The difference of the two
        networks, at noise and angles of its own, then drives the images ("engine"), and ``teacher``, to be
        given without guidance, only holds them to the distribution ("shield").
      normalize: rCM's and DMD2's division by the teacher's distance.

    Returns:
      ``(mean loss, aux)``: aux per sample [B]: 'gap', root mean square of ``D_fake - D_teacher``, and 't'.
    """
    chex.assert_equal_shape([x0, z])
    chex.assert_shape(t, x0.shape[:1])
    fixed = jax.lax.stop_gradient(x0)
    x_t = add_noise(fixed, z, t)
    real = denoise(teacher, x_t, t, sigma_d)
    gap = denoise(fake, x_t, t, sigma_d) - real
    g = gap
    if engine is not None:
        guided, unguided, other_z, other_t = engine
        x = add_noise(fixed, other_z, other_t) / sigma_d
        turn = guided(x, other_t) - unguided(x, other_t)
        g = g + expand(jnp.sin(other_t), x) * sigma_d * turn  # D is affine in F
    if normalize:
        distance = per_sample_mean(jnp.abs(fixed - real))
        g = g / expand(jnp.maximum(distance, FLOOR), g)
    g = jax.lax.stop_gradient(jnp.nan_to_num(g))
    loss = jnp.square(x0 - (fixed - g)).reshape(len(g), -1).sum(-1) / 2
    aux = {"gap": jnp.sqrt(per_sample_mean(jnp.square(gap))), "t": t}
    return loss.mean(), jax.lax.stop_gradient(aux)


def fake_score_loss(fake: Callable, x0: Array, z: Array, t: Array, sigma_d: float):
    """Trains the fake score by matching the velocity of noised student images.

    ``|F(x_t / sigma_d, t) - v / sigma_d|^2`` with ``v = cos(t) z - sin(t) x0``, which is the denoising loss
    ``|x0 - D(x_t, t)|^2 / sin^2(t)`` over ``sigma_d^2``.

    Args:
      fake: ``F(x, t)``; gradients flow to what it holds.
      x0, z, t: the student's images (no gradient), noise, angles.

    Returns:
      ``(mean loss, {'fake_loss': [B]})``.
    """
    x0 = jax.lax.stop_gradient(x0)
    target = expand(jnp.cos(t), z) * z - expand(jnp.sin(t), x0) * x0
    error = fake(add_noise(x0, z, t) / sigma_d, t) - target / sigma_d
    loss = per_sample_mean(jnp.square(error))
    return loss.mean(), {"fake_loss": loss}
