"""Latent adversarial distillation (LADD): hinge losses on the features of the frozen teacher."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ..trigflow import add_noise
from .per_sample import per_sample_norm

Array = jax.Array


def ladd_generator_loss(discriminate: Callable, x0: Array, z: Array, t: Array, sigma_d: float):
    """Hinge generator loss ``-mean D(renoised student x0)`` of LADD.

    Args:
      discriminate: ``discriminate(x, t) -> logits [B, M]``: frozen teacher features into heads.
      x0: the student's images [B, h, w, C], standard deviation ``sigma_d``; gradients flow here.
      z: noise of standard deviation ``sigma_d``; t: angles [B] of the discriminator's distribution.

    Returns:
      ``(mean loss, {'logits': [B]})``.
    """
    chex.assert_shape([z, t], [x0.shape, x0.shape[:1]])
    logits = discriminate(add_noise(x0, z, t) / sigma_d, t)
    chex.assert_shape(logits, (len(x0), None))
    return -logits.mean(), {"logits": logits.mean(-1)}


def ladd_discriminator_loss(
    features: Callable,
    heads: Callable,
    real: tuple[Array, Array, Array],
    fake: tuple[Array, Array, Array],
    misaligned: tuple[Array, Array, Array] | None,
    *,
    sigma_d: float,
    r1_weight: float = 0.0,
):
    """Hinge discriminator loss of LADD: ``(mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2``.

    Args:
      features: ``features(x, t) -> tuple of [B, h, w, d]`` of the frozen teacher with the batch's text.
      heads: ``heads(features) -> logits [B, M]``; gradients flow to what it holds.
      real, fake: ``(x0, z, t)``: images [B, h, w, C], noise, angles [B]; each has its own times.
      misaligned: real images paired with other samples' text, ``(rolled x0, z, t)``, which count as
        fake; None leaves them out.
      r1_weight: weight of the gradient penalty: squared gradient norm of the summed logits with
        respect to the heads' input features of the real batch, divided by the number of heads.

    Returns:
      ``(loss, aux)``, aux with mean logits per sample 'real' [B], 'fake' [B], 'misaligned' [B]
      (if any), and 'r1' (if weighted).
    """

    def noisy_features(x0, z, t):
        chex.assert_shape([z, t], [x0.shape, x0.shape[:1]])
        return jax.lax.stop_gradient(features(add_noise(x0, z, t) / sigma_d, t))

    # Each kind has its own batch. Published code joins fakes and misaligned pairs; its batch norm works in
    # groups of 8, so the result is the same wherever 8 divides the batch.
    kinds = {"fake": fake} | ({"misaligned": misaligned} if misaligned is not None else {})
    negative = {name: heads(noisy_features(*triple)) for name, triple in kinds.items()}
    positive = noisy_features(*real)
    real_logits = heads(positive)
    chex.assert_rank([real_logits, *negative.values()], 2)
    fake_loss = sum(jax.nn.relu(1 + logits).mean() for logits in negative.values()) / len(negative)
    loss = (jax.nn.relu(1 - real_logits).mean() + fake_loss) / 2

    aux = {name: logits.mean(-1) for name, logits in ({"real": real_logits} | negative).items()}
    if r1_weight:
        gradients = jax.grad(lambda inputs: heads(inputs).sum())(positive)
        penalty = sum(jnp.square(per_sample_norm(g.astype(jnp.float32))).mean() for g in gradients)
        aux["r1"] = penalty / len(gradients)
        loss = loss + r1_weight * aux["r1"]
    return loss, jax.lax.stop_gradient(aux)
