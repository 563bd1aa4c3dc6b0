"""What an update makes of a batch: scaled images, noise, and its networks as functions of ``(x, t)``.

``c`` is a run's config and ``nets`` its `setup.Nets`; text [B, L, D], mask [B, L] and guidance [B] are of
one batch, and ``x = x_t / sigma_d`` [B, h, w, C], ``t`` [B] are TrigFlow's. Parameters are taken as they
lie (`sharding.in_use` gathers what is outside of the blocks).
"""

import jax
import jax.numpy as jnp

from .. import sampling, trigflow
from ..parallel.sharding import in_use


def images_of(c, batch):
    return batch["latents"] * c.sigma_d, batch["text"], batch["mask"]


def draw_noise(c, key, x0):
    return c.sigma_d * jax.random.normal(key, x0.shape)


def draw_guidance(c, key, x0):
    """A CFG scale per sample, [B]."""
    return jax.random.choice(key, jnp.asarray(c.scm.guidance, jnp.float32), x0.shape[:1])


def draw_flow_time(c, key, latents):
    """Flow times of the samples, and those that the network is shown, [B] each."""
    how = (c.flow.time_mean, c.flow.time_std, c.flow.shift)
    if c.flow.truncate_times:
        return trigflow.sample_truncated_flow_time(key, latents.shape[:1], *how)
    t = trigflow.sample_flow_time(key, latents.shape[:1], *how)
    return t, t


def student_of(nets, text, mask, guidance, dtype=None):
    """``student(params, x, t) -> (F, logvar)`` of one batch; matmuls in ``dtype`` where it is given."""
    model = nets.model.clone(dtype=jnp.dtype(dtype)) if dtype else nets.model

    def student(params, x, t):
        def velocity(x_fm, t_fm):
            return model.apply(
                {"params": params}, x_fm, t_fm, text, mask, guidance * 0.1, with_logvar=True
            )

        return trigflow.to_trigflow(velocity)(x, t)

    return student


def guided_teacher_of(nets, frozen, text, mask, guidance):
    """``teacher(x, t) -> F`` with classifier-free guidance against the empty prompt."""

    def velocity(x_fm, t_fm, text, mask):
        return nets.teacher.apply({"params": frozen["teacher"]}, x_fm, t_fm, text, mask)

    F = trigflow.to_trigflow(velocity)
    guided = sampling.with_cfg(F, guidance, frozen["null_text"][None], frozen["null_mask"][None])
    return lambda x, t: guided(x, t, text, mask)


def features_of(nets, c, frozen, text, mask):
    """``features(x, t)``: the frozen teacher's tapped blocks on TrigFlow inputs."""

    def features(x, t):
        x_fm, t_fm = trigflow.flow_inputs(x, t)
        return nets.teacher.apply(
            {"params": frozen["teacher"]}, x_fm, t_fm, text, mask, taps=tuple(c.ladd.taps)
        )

    return features


def heads_of(nets, params, spectral):
    """``heads(features) -> logits`` of the given parameters."""
    params = in_use(nets.model, params)
    return lambda features: nets.heads.apply({"params": params}, features, spectral)


def generate(c, student, params, x0, time_key, noise_key):
    """The student's image from real images noised to random times, often to the largest."""
    keys = jax.random.split(time_key)
    t = trigflow.sample_time(keys[0], x0.shape[:1], c.scm.time_mean, c.scm.time_std, c.sigma_d)
    t = trigflow.with_max_time(keys[1], t, c.ladd.max_time_probability)
    x_t = trigflow.add_noise(x0, draw_noise(c, noise_key, x0), t)
    F, _ = student(params, x_t / c.sigma_d, t)
    return trigflow.predict_x0(x_t, F, t, c.sigma_d)
