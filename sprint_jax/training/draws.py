"""The parts of an update: named random keys, times and noise, and its networks as functions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import trigflow
from ..models import functions
from ..parallel.sharding import in_use
from .state import Nets

Key = jax.Array


class FlowKeys(NamedTuple):
    """Of a flow update: times, noise, and whose caption is dropped."""

    time: Key
    noise: Key
    dropout: Key


class GeneratorKeys(NamedTuple):
    """Of a generator update, the same for all its losses: they share the CFG scales and nothing else.

    ``time`` and ``noise`` are of the consistency loss, ``fake_*`` of the images that the student makes,
    ``judged_*`` of the noise at which the critic sees them.
    """

    guidance: Key
    time: Key
    noise: Key
    fake_time: Key
    fake_noise: Key
    judged_time: Key
    judged_noise: Key


class DiscriminatorKeys(NamedTuple):
    """Of a critic's update; real, fake and misaligned images have noise of their own, unless paired."""

    guidance: Key
    fake_time: Key
    fake_noise: Key
    real_judged_time: Key
    real_judged_noise: Key
    fake_judged_time: Key
    fake_judged_noise: Key
    rolled_judged_time: Key
    rolled_judged_noise: Key
    penalty_noise: Key


class FakeKeys(NamedTuple):
    """Of an update of the fake score: the student's images, and the noise at which they are learnt."""

    guidance: Key
    fake_time: Key
    fake_noise: Key
    time: Key
    noise: Key


class ScoreKeys(NamedTuple):
    """Of DMD and TwinFlow: the noise at which both scores look, and that of a separate engine."""

    time: Key
    noise: Key
    engine_time: Key
    engine_noise: Key


class TangentKeys(NamedTuple):
    """Of the check of the tangent."""

    guidance: Key
    time: Key
    noise: Key


def split(kind: type, key: Key):
    """Splits a key into the named keys of one of the tuples above."""
    return kind(*jax.random.split(key, len(kind._fields)))


def images_of(c, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """TrigFlow's images, of standard deviation ``sigma_d``, with their text and mask."""
    return batch["latents"] * c.sigma_d, batch["text"], batch["mask"]


def draw_noise(c, key: Key, x0: jax.Array) -> jax.Array:
    """Noise of standard deviation ``sigma_d``."""
    return c.sigma_d * jax.random.normal(key, x0.shape)


def draw_time(section, key: Key, x0: jax.Array, sigma_d: float) -> jax.Array:
    """Angles [B] of the distribution that a section of the config describes."""
    how = section.time_mean, section.time_std, sigma_d
    return trigflow.sample_time(key, x0.shape[:1], *how)


def draw_guidance(c, key: Key, x0: jax.Array) -> jax.Array:
    """A CFG scale per sample, [B]."""
    return jax.random.choice(key, jnp.asarray(c.scm.guidance, jnp.float32), x0.shape[:1])


def draw_flow_time(c, key: Key, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Flow times of the samples, and those that the network is shown, [B] each."""
    how = (c.flow.time_mean, c.flow.time_std, c.flow.shift)
    if c.flow.truncate_times:
        return trigflow.sample_truncated_flow_time(key, latents.shape[:1], *how)
    t = trigflow.sample_flow_time(key, latents.shape[:1], *how)
    return t, t


def tangent_warmup(c, step: jax.Array) -> jax.Array | float:
    """How much the tangent counts, from 0 to 1 over the first updates."""
    if not c.scm.tangent_warmup:
        return 1.0
    return jnp.minimum(1.0, step / c.scm.tangent_warmup)


def student_of(nets: Nets, text, mask, guidance, dtype=None):
    """``student(params, x, t) -> (F, logvar)`` of one batch; matmuls in ``dtype`` where it is given."""
    model = functions.in_dtype(nets.model, dtype)

    def student(params, x, t):
        return functions.trigflow(model, params, text, mask, guidance, with_logvar=True)(x, t)

    return student


def teacher_of(nets: Nets, frozen: dict, text, mask, guidance):
    """``teacher(x, t) -> F`` of the frozen teacher with classifier-free guidance."""
    null = frozen["null_text"][None], frozen["null_mask"][None]
    form, params = functions.trigflow, frozen["teacher"]
    return functions.guided(form, nets.teacher, params, text, mask, guidance, null)


def critic_of(nets: Nets, c, trained: dict, spectral, state, frozen: dict, text, mask):
    """``discriminate(x, t) -> logits [B, M]``: heads on the features of a network.

    Args:
      trained: of `state.trained_of`: the heads, and the backbone of a critic of its own.
    """
    backbones = {
        "teacher": lambda: frozen["teacher"],
        "fake": lambda: in_use(nets.teacher, state.fake["params"]),
        "copy": lambda: in_use(nets.teacher, trained["backbone"]),
    }
    backbone = backbones[c.ladd.features]()
    features = functions.features(nets.teacher, backbone, text, mask, c.ladd.taps)
    params = in_use(nets.model, trained["params"])

    def discriminate(x, t):
        logits = nets.heads.apply({"params": params}, features(x, t), spectral)
        return logits.mean(-1, keepdims=True) if c.ladd.pooled else logits

    return discriminate


def fake_of(nets: Nets, params, text, mask):
    """``fake(x, t) -> F`` of the fake score: no guidance, the captions of the images."""
    return functions.trigflow(nets.teacher, in_use(nets.teacher, params), text, mask)


def score_time(section, key: Key, x0: jax.Array) -> jax.Array:
    """Angles [B] of flow times that are uniform, then shifted towards noise."""
    s = jax.random.uniform(key, x0.shape[:1], jnp.float32, minval=1e-3, maxval=1 - 1e-3)
    return trigflow.trig_time(trigflow.shift_flow_time(s, section.shift))


def images_in(nets: Nets, c, params, batch: dict, keys) -> tuple[jax.Array, jax.Array]:
    """The student's images [B, h, w, C] for a batch, without gradient, and the angles [B] it made them from.

    Those that the batch holds as ``fake`` and ``fake_angle``; else they are made, by ``keys.fake_*``.
    """
    if "fake" in batch:
        return batch["fake"], batch["fake_angle"]
    x0, text, mask = images_of(c, batch)
    student = student_of(nets, text, mask, draw_guidance(c, keys.guidance, x0))
    made = generate(c, student, params, x0, keys.fake_time, keys.fake_noise)
    return jax.lax.stop_gradient(made)


def generate(c, student, params, x0, time_key: Key, noise_key: Key) -> tuple[jax.Array, jax.Array]:
    """Makes the student's images, and the angles [B] from which it makes them.

    From real images noised to random angles, often to the largest; or, with ``images.rollout``, from noise in
    1 to so many steps at random angles, of which the last carries the gradient.
    """
    time, largest = jax.random.split(time_key)
    t = draw_time(c.scm, time, x0, c.sigma_d)
    if c.images.rollout:
        t, x_t = roll_out(c, student, params, x0, t, largest, noise_key)
    else:
        t = trigflow.with_max_time(largest, t, c.images.max_time_probability)
        x_t = trigflow.add_noise(x0, draw_noise(c, noise_key, x0), t)
    F, _ = student(params, x_t / c.sigma_d, t)
    return trigflow.predict_x0(x_t, F, t, c.sigma_d), t


def roll_out(c, student, params, x0, t, count_key: Key, noise_key: Key):
    """Samples with the student up to its last step: ``(t, x_t)`` there, without gradient (rCM).

    Each sample takes 1 to ``images.rollout`` steps, from the largest angle, each at an angle of the student's
    distribution that is no larger than the one before.
    """
    rollout = c.images.rollout
    steps = jax.random.randint(count_key, t.shape, 1, rollout + 1)
    keys = jax.random.split(noise_key, 2 * rollout)
    fixed = jax.lax.stop_gradient(params)
    angle = jnp.full_like(t, trigflow.MAX_TIME)
    x = draw_noise(c, keys[0], x0)
    for i in range(1, rollout):
        F, _ = student(fixed, x / c.sigma_d, angle)
        image = trigflow.predict_x0(x, F, angle, c.sigma_d)
        drawn = draw_time(c.scm, keys[2 * i], x0, c.sigma_d)
        following = jnp.minimum(angle, drawn)
        renoised = trigflow.add_noise(image, draw_noise(c, keys[2 * i + 1], x0), following)
        goes_on = steps > i
        x = jnp.where(trigflow.expand(goes_on, x), renoised, x)
        angle = jnp.where(goes_on, following, angle)
    return angle, jax.lax.stop_gradient(x)
