"""Adversarial losses on logits, and penalties that keep a critic smooth.

A critic gives logits [B, M] to real and generated images; a loss is a pair of functions of the logits, one
for the critic and one for the generator. Sources: hinge as in LADD (arXiv 2403.12015); softplus (logistic)
as in APT (arXiv 2501.08316); relativistic pairing with R1 and R2 as in R3GAN (arXiv 2501.05441).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def hinge_critic(real: Array, fake: Array) -> Array:
    """``(relu(1 - D(real)) + relu(1 + D(fake))) / 2``, per sample [B]."""
    return (jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)).mean(-1) / 2


def hinge_generator(real: Array, fake: Array) -> Array:
    """``-D(fake)``, per sample [B]; real images do not enter."""
    del real
    return -fake.mean(-1)


def softplus_critic(real: Array, fake: Array) -> Array:
    """``softplus(-D(real)) + softplus(D(fake))``, per sample [B]."""
    return (jax.nn.softplus(-real) + jax.nn.softplus(fake)).mean(-1)


def softplus_generator(real: Array, fake: Array) -> Array:
    """``softplus(-D(fake))``, per sample [B]; real images do not enter."""
    del real
    return jax.nn.softplus(-fake).mean(-1)


def relativistic_critic(real: Array, fake: Array) -> Array:
    """``softplus(-(D(real) - D(fake)))`` of pairs with one caption and one time, per sample [B]."""
    return jax.nn.softplus(fake - real).mean(-1)


def relativistic_generator(real: Array, fake: Array) -> Array:
    """``softplus(-(D(fake) - D(real)))``, per sample [B]."""
    return jax.nn.softplus(real - fake).mean(-1)


# (critic's, generator's), each of (real logits, fake logits).
PAIRS = {
    "hinge": (hinge_critic, hinge_generator),
    "softplus": (softplus_critic, softplus_generator),
    "relativistic": (relativistic_critic, relativistic_generator),
}


def gradient_penalty(discriminate: Callable, x: Array) -> Array:
    """``|dD/dx|^2`` of the mean logit of each sample, exactly, [B]: R1 of real images, R2 of generated ones.

    Args:
      discriminate: ``D(x) -> logits [B, M]``, each sample by itself; it may be differentiated twice.
      x: images [B, h, w, C].
    """
    gradient = jax.grad(lambda x: discriminate(x).mean(-1).sum())(x)
    return jnp.square(gradient).reshape(len(x), -1).sum(-1)


def approximate_penalty(discriminate: Callable, x: Array, noise: Array, scale: float) -> Array:
    """``|D(x + scale noise) - D(x)|^2 / scale^2`` of the mean logit, [B]; for N(0, 1) noise its mean tends to
    `gradient_penalty` as the scale falls, without a second derivative (APT's aR1, over scale^2)."""
    change = discriminate(x + scale * noise).mean(-1) - discriminate(x).mean(-1)
    return jnp.square(change / scale)


def rank_of_fakes(real: Array, fake: Array) -> Array:
    """The share of real logits [B] above each fake's, [B]; its mean is the area under the ROC curve.

    0.5 is chance.
    """
    above = real[:, None] - fake[None]
    return jnp.where(above == 0, 0.5, above > 0).mean(0)
