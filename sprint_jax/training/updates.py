"""The updates of one step: batch and networks to losses, gradients and a new state.

An update is ``update(nets, c, state, batch, frozen) -> (state, metrics)``. A batch has latents [B, h, w, C]
of unit variance, text [B, L, D] and mask [B, L]; ``frozen`` holds the teacher's parameters and the features
of the empty prompt. Randomness is a function of (seed, step): each update splits its key into the named keys
of a tuple below.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import losses, trigflow
from ..models import functions
from ..models.discriminator import update_spectral
from ..parallel.sharding import in_use
from .accumulate import gradients
from .diagnostics import binned, tangent_checks
from .state import Nets, TrainState, apply_gradients, health

Key = jax.Array


class FlowKeys(NamedTuple):
    """Of a flow update: times, noise, and whose caption is dropped."""

    time: Key
    noise: Key
    dropout: Key


class GeneratorKeys(NamedTuple):
    """Of a generator update, the same for both losses: they share the CFG scales and nothing else.

    ``time`` and ``noise`` are of the consistency loss, ``fake_*`` of the images that the student makes for the
    heads, ``judged_*`` of the noise at which the heads see them.
    """

    guidance: Key
    time: Key
    noise: Key
    fake_time: Key
    fake_noise: Key
    judged_time: Key
    judged_noise: Key


class DiscriminatorKeys(NamedTuple):
    """Of a discriminator update; real, fake and misaligned images are each seen at noise of their own."""

    guidance: Key
    fake_time: Key
    fake_noise: Key
    real_judged_time: Key
    real_judged_noise: Key
    fake_judged_time: Key
    fake_judged_noise: Key
    rolled_judged_time: Key
    rolled_judged_noise: Key


class TangentKeys(NamedTuple):
    """Of the check of the tangent."""

    guidance: Key
    time: Key
    noise: Key


def split(kind: type, key: Key):
    """Splits a key into the named keys of one of the tuples above."""
    return kind(*jax.random.split(key, len(kind._fields)))


def flow_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update by flow matching; some captions are dropped, so that guidance can be sampled."""

    def loss(params, batch, key):
        keys = split(FlowKeys, key)
        latents = batch["latents"]
        t, shown = draw_flow_time(c, keys.time, latents)
        noise = jax.random.normal(keys.noise, latents.shape)
        drop = jax.random.bernoulli(keys.dropout, c.flow.caption_dropout, t.shape)
        text = jnp.where(drop[:, None, None], frozen["null_text"][None], batch["text"])
        mask = jnp.where(drop[:, None], frozen["null_mask"][None], batch["mask"])
        velocity = functions.velocity(nets.model, in_use(nets.model, params), text, mask)
        return losses.flow_matching_loss(lambda x, _: velocity(x, shown), latents, noise, t)

    key = jax.random.fold_in(jax.random.key(c.seed), state.step)
    value, aux, grads = gradients([loss], state.params, batch, key, c.accumulate)
    state, metrics = apply_gradients(nets.optimizer, state, value, grads, ema_decay=c.ema_decay)
    metrics |= {"loss/flow": value, **binned("flow_loss", aux["t"], aux["loss"], limit=1.0)}
    return state, metrics | health(aux["loss"], state)


def generator_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update of the student by sCM and LADD; counts the step, and touches neither heads nor teacher."""
    state, metrics, _ = _generator_update(nets, c, state, batch, frozen)
    return state, metrics


def _generator_update(nets, c, state, batch, frozen):
    """`generator_update`, and the student's images [B, h, w, C] (None without LADD)."""
    frozen = frozen | {"teacher": in_use(nets.teacher, frozen["teacher"])}

    def consistency(params, batch, key):
        keys = split(GeneratorKeys, key)
        x0, text, mask = images_of(c, batch)
        guidance = draw_guidance(c, keys.guidance, x0)
        loss, aux = losses.scm_loss(
            student_of(nets, text, mask, guidance, c.scm.jvp_dtype),
            teacher_of(nets, frozen, text, mask, guidance),
            in_use(nets.model, params),
            x0,
            draw_noise(c, keys.noise, x0),
            draw_time(c.scm, keys.time, x0, c.sigma_d),
            sigma_d=c.sigma_d,
            warmup=tangent_warmup(c, state.step),
            tangent_constant=c.scm.tangent_constant,
            mean_norm=c.scm.mean_norm,
            shared_primal=c.scm.shared_primal,
        )
        return c.scm.weight * loss, aux

    def adversarial(params, batch, key):
        keys = split(GeneratorKeys, key)
        x0, text, mask = images_of(c, batch)
        student = student_of(nets, text, mask, draw_guidance(c, keys.guidance, x0))
        params = in_use(nets.model, params)
        fake = generate(c, student, params, x0, keys.fake_time, keys.fake_noise)
        features = features_of(nets, c, frozen, text, mask)
        heads = heads_of(nets, state.disc["params"], state.disc["spectral"])
        loss, gan = losses.ladd_generator_loss(
            lambda x, t: heads(features(x, t)),
            fake,
            draw_noise(c, keys.judged_noise, x0),
            draw_time(c.ladd, keys.judged_time, x0, c.sigma_d),
            c.sigma_d,
        )
        return c.ladd.weight * loss, {"generator_logits": gan["logits"], "fake": fake}

    terms = [consistency] + ([adversarial] if nets.heads is not None else [])
    key = jax.random.fold_in(jax.random.key(c.seed), 2 * state.step)
    value, aux, grads = gradients(terms, state.params, batch, key, c.accumulate)
    state, metrics = apply_gradients(nets.optimizer, state, value, grads, ema_decay=c.ema_decay)
    metrics |= {"loss/total": value, "loss/scm": aux["loss"].mean()}
    if nets.heads is not None:
        metrics["loss/ladd_generator"] = -aux["generator_logits"].mean()
    for name in ("tangent_norm", "teacher_gap", "error", "logvar"):
        metrics |= binned(name, aux["t"], aux[name])
    return state, metrics | health(aux["loss"], state), aux.get("fake")


def discriminator_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update of the LADD heads; the student and the step counter stay as they are.

    ``batch`` may hold images of the student as ``fake`` [B, h, w, C]; else it draws them.
    """
    spectral = update_spectral(state.disc["params"], state.disc["spectral"])
    frozen = frozen | {"teacher": in_use(nets.teacher, frozen["teacher"])}
    student_params = in_use(nets.model, state.params)

    def loss(params, batch, key):
        keys = split(DiscriminatorKeys, key)
        x0, text, mask = images_of(c, batch)
        fake = batch.get("fake")
        if fake is None:
            student = student_of(nets, text, mask, draw_guidance(c, keys.guidance, x0))
            fake = generate(c, student, student_params, x0, keys.fake_time, keys.fake_noise)

        def judged(x0, time_key, noise_key):
            t = draw_time(c.ladd, time_key, x0, c.sigma_d)
            return x0, draw_noise(c, noise_key, x0), t

        rolled = None
        if c.ladd.misaligned:
            other = jnp.roll(x0, 1, axis=0)
            rolled = judged(other, keys.rolled_judged_time, keys.rolled_judged_noise)
        fake = jax.lax.stop_gradient(fake)
        return losses.ladd_discriminator_loss(
            features_of(nets, c, frozen, text, mask),
            heads_of(nets, params, spectral),
            judged(x0, keys.real_judged_time, keys.real_judged_noise),
            judged(fake, keys.fake_judged_time, keys.fake_judged_noise),
            rolled,
            sigma_d=c.sigma_d,
            r1_weight=c.ladd.r1_weight,
        )

    # The step was counted by the generator update just before; odd keys are the discriminator's.
    key = jax.random.fold_in(jax.random.key(c.seed), 2 * state.step - 1)
    value, aux, grads = gradients([loss], state.disc["params"], batch, key, c.accumulate)
    state, metrics = apply_gradients(nets.disc_optimizer, state, value, grads, spectral=spectral)
    metrics |= {f"logits/{name}": values.mean() for name, values in aux.items()}
    return state, metrics | {"loss/ladd_discriminator": value}


def joint_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """Both updates on one batch: the heads see the images that the student was just judged by."""
    state, metrics, fake = _generator_update(nets, c, state, batch, frozen)
    state, more = discriminator_update(nets, c, state, batch | {"fake": fake}, frozen)
    return state, metrics | more


def check_tangent(nets: Nets, c, state: TrainState, batch: dict, frozen: dict) -> dict:
    """Compares the student's tangent with a central difference, and in bfloat16 with float32."""
    keys = split(TangentKeys, jax.random.fold_in(jax.random.key(c.seed), state.step))
    x0, text, mask = images_of(c, batch)
    guidance = draw_guidance(c, keys.guidance, x0)
    t = draw_time(c.scm, keys.time, x0, c.sigma_d)
    x = trigflow.add_noise(x0, draw_noise(c, keys.noise, x0), t) / c.sigma_d
    scale = jnp.cos(t) * jnp.sin(t)
    teacher = teacher_of(nets, frozen, text, mask, guidance)
    dx = trigflow.expand(scale, x) * teacher(x, t)

    def F(dtype):
        student = student_of(nets, text, mask, guidance, dtype)
        return lambda x, t: student(in_use(nets.model, state.params), x, t)[0]

    return tangent_checks(F(jnp.float32), F(jnp.bfloat16), x, t, dx, scale)


# --- What the updates make of a batch


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


def features_of(nets: Nets, c, frozen: dict, text, mask):
    """``features(x, t)``: the frozen teacher's blocks that the heads look at."""
    return functions.features(nets.teacher, frozen["teacher"], text, mask, c.ladd.taps)


def heads_of(nets: Nets, params, spectral):
    """``heads(features) -> logits`` of the given parameters."""
    params = in_use(nets.model, params)
    return lambda features: nets.heads.apply({"params": params}, features, spectral)


def generate(c, student, params, x0, time_key: Key, noise_key: Key) -> jax.Array:
    """Makes the student's images from real ones, noised to random angles, often to the largest."""
    time, largest = jax.random.split(time_key)
    t = draw_time(c.scm, time, x0, c.sigma_d)
    t = trigflow.with_max_time(largest, t, c.ladd.max_time_probability)
    x_t = trigflow.add_noise(x0, draw_noise(c, noise_key, x0), t)
    F, _ = student(params, x_t / c.sigma_d, t)
    return trigflow.predict_x0(x_t, F, t, c.sigma_d)
