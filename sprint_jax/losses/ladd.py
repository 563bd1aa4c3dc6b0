"""Latent adversarial distillation (LADD): a critic that sees images through a network's features, with noise.

By default as SANA-Sprint trains it (arXiv 2503.09641): hinge losses, noise of its own for each kind of image,
real images with another's caption as fakes. `losses.adversarial` has the other pairs of losses.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ..trigflow import add_noise
from .adversarial import approximate_penalty, gradient_penalty, hinge_critic, hinge_generator

Array = jax.Array


def ladd_generator_loss(
    discriminate: Callable,
    x0: Array,
    z: Array,
    t: Array,
    sigma_d: float,
    *,
    real: Array | None = None,
    generator: Callable = hinge_generator,
    clean: bool = False,
):
    """The generator's loss on its renoised images; hinge: ``-mean D(x_t)``.

    Args:
      discriminate: ``discriminate(x, t) -> logits [B, M]``: a network's features into heads.
      x0: the student's images [B, h, w, C], standard deviation ``sigma_d``; gradients flow here.
      z: noise of standard deviation ``sigma_d``; t: angles [B] of the critic's distribution.
      real: images of the same captions, for losses of pairs; seen at the same noise.
      generator: ``generator(real logits, fake logits) -> [B]``.
      clean: images are seen without noise, and ``t`` is a condition only.

    Returns:
      ``(mean loss, {'logits': [B]})``.
    """
    chex.assert_shape([z, t], [x0.shape, x0.shape[:1]])

    def logits_of(x0):
        return discriminate((x0 if clean else add_noise(x0, z, t)) / sigma_d, t)

    logits = logits_of(x0)
    chex.assert_shape(logits, (len(x0), None))
    other = logits if real is None else jax.lax.stop_gradient(logits_of(real))
    return generator(other, logits).mean(), {"logits": logits.mean(-1)}


def ladd_discriminator_loss(
    discriminate: Callable,
    real: tuple[Array, Array, Array],
    fake: tuple[Array, Array, Array],
    misaligned: tuple[Array, Array, Array] | None = None,
    *,
    sigma_d: float,
    wrong: Array | None = None,
    critic: Callable = hinge_critic,
    clean: bool = False,
    r1: float = 0.0,
    r2: float = 0.0,
    noise: Array | None = None,
    noise_scale: float = 0.0,
):
    """The critic's loss; hinge: ``(mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2``.

    Args:
      discriminate: ``discriminate(x, t) -> logits [B, M]``; gradients flow to what it holds.
      real, fake: ``(x0, z, t)``: images [B, h, w, C] (no gradient), noise, angles [B]; for a loss of pairs of
        the same captions, noise and angles.
      misaligned: real images with other samples' text, ``(rolled x0, z, t)``, which count as half of the
        fakes; None leaves them out.
      wrong: which misaligned pairs are in fact that, bool [B], by default all; in the place of another pair
        counts the fake of its row.
      critic: ``critic(real logits, fake logits) -> [B]``.
      clean: images are seen without noise, and ``t`` is a condition only.
      r1, r2: weights of half the squared gradient of the mean logit by real and by fake images.
      noise, noise_scale: N(0, 1) like the images, and how much of it approximates that gradient without second
        derivatives; 0: exact.

    Returns:
      ``(loss, aux)``, aux with mean logits per sample 'real' [B], 'fake' [B] and 'misaligned' [B] (if any; NaN
      where ``wrong`` is false).
    """

    def logits_of(x0, z, t):
        chex.assert_shape([z, t], [x0.shape, x0.shape[:1]])
        return discriminate((x0 if clean else add_noise(x0, z, t)) / sigma_d, t)

    # Each kind has its own batch. Published code joins fakes and misaligned pairs; its batch norm works in
    # groups of 8, so the result is the same wherever 8 divides the batch.
    kinds = {"real": real, "fake": fake}
    if misaligned is not None:
        kinds["misaligned"] = misaligned
    kinds = {name: (jax.lax.stop_gradient(x0), z, t) for name, (x0, z, t) in kinds.items()}
    logits = {name: logits_of(*kind) for name, kind in kinds.items()}
    chex.assert_rank([*logits.values()], 2)
    negative = [logits[name] for name in kinds if name != "real"]
    rows = [critic(logits["real"], each) for each in negative]
    if wrong is not None and misaligned is not None:
        rows[1] = jnp.where(wrong, rows[1], rows[0])
        logits["misaligned"] = jnp.where(wrong[:, None], logits["misaligned"], jnp.nan)
    loss = sum(each.mean() for each in rows) / len(rows)
    for weight, (x0, z, t) in ((r1, kinds["real"]), (r2, kinds["fake"])):
        if not weight:
            continue
        seen = lambda x, z=z, t=t: logits_of(x, z, t)  # noqa: E731
        if noise_scale:
            penalty = approximate_penalty(seen, x0, noise, noise_scale)
        else:
            penalty = gradient_penalty(seen, x0)
        loss += weight / 2 * penalty.mean()
    return loss, jax.lax.stop_gradient({name: each.mean(-1) for name, each in logits.items()})
