"""The updates of one step: batch and networks to losses, gradients and a new state.

An update is ``update(nets, c, state, batch, frozen) -> (state, metrics)``. A batch has latents [B, h, w, C]
of unit variance, text [B, L, D] and mask [B, L], and with a control branch conditions ``control`` [B, h, w, C];
``frozen`` holds the teacher's parameters, the features of the empty prompt, the seed, and the trunk's
parameters where a branch learns alone. Randomness is a function of (seed, step): each update splits its key
into the named keys of a tuple of `draws`. The seed is an argument, so that runs of other seeds have the same
program.
"""

import jax
import jax.numpy as jnp

from .. import losses, trigflow
from ..losses.adversarial import PAIRS, rank_of_fakes
from ..models import functions
from ..models.discriminator import update_spectral
from ..parallel.sharding import in_use
from . import draws
from .accumulate import gradients
from .diagnostics import binned, tangent_checks
from .draws import DiscriminatorKeys, FakeKeys, FlowKeys, TangentKeys
from .state import Nets, TrainState, apply_critic, apply_fake, apply_student, health, trained_of
from .terms import generator_terms


def flow_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update by flow matching; some captions are dropped, so that guidance can be sampled."""

    def loss(params, batch, key, _):
        keys = draws.split(FlowKeys, key)
        latents = batch["latents"]
        t, shown = draws.draw_flow_time(c, keys.time, latents)
        noise = jax.random.normal(keys.noise, latents.shape)
        drop = jax.random.bernoulli(keys.dropout, c.flow.caption_dropout, t.shape)
        null_text, null_mask = draws.null_prompt(c, frozen, batch["mask"])
        text = jnp.where(drop[:, None, None], null_text, batch["text"])
        mask = jnp.where(drop[:, None], null_mask, batch["mask"])
        params, control = draws.whole(nets, frozen, params), draws.control_of(nets, batch)
        velocity = functions.velocity(nets.model, params, text, mask, control=control)
        return losses.flow_matching_loss(lambda x, _: velocity(x, shown), latents, noise, t)

    key = jax.random.fold_in(jax.random.key(frozen["seed"]), state.step)
    value, aux, grads, _ = gradients({"flow": loss}, state.params, batch, key, c.accumulate)
    state, metrics = apply_student(nets.optimizer, state, value, grads, c.ema_decay)
    metrics |= {"loss/flow": value, **binned("flow_loss", aux["t"], aux["loss"], limit=1.0)}
    return state, metrics | health(aux["loss"], state)


def generator_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update of the student by all its losses; counts the step, and touches no other network."""
    state, metrics, _ = _generator_update(nets, c, state, batch, frozen)
    return state, metrics


def _generator_update(nets, c, state, batch, frozen):
    """`generator_update`, and the student's images, `draws.MADE`, as parts of a batch (empty without losses on
    them)."""
    frozen = frozen | {"teacher": in_use(nets.teacher, frozen["teacher"])}
    terms = generator_terms(nets, c, state, frozen)
    key = jax.random.fold_in(jax.random.key(frozen["seed"]), 2 * state.step)
    # The head that predicts logvar learns from sCM alone, by gradients as large as all others.
    of_F = lambda grads: {k: grads[k] for k in grads if k != "logvar_linear"}  # noqa: E731
    value, aux, grads, balance = gradients(terms, state.params, batch, key, c.accumulate, of_F)
    state, metrics = apply_student(nets.optimizer, state, value, grads, c.ema_decay)
    metrics |= {"loss/total": value} | balance
    for name in [name for name in aux if name.startswith(("length/", "value/"))]:
        kind, _, loss = name.partition("/")
        metrics[{"length": "length/", "value": "loss/"}[kind] + loss] = aux[name].mean()
    if c.scm.weight:
        metrics["loss/scm"] = aux["loss"].mean()
        for name in ("tangent_norm", "teacher_gap", "error", "logvar"):
            metrics |= binned(name, aux["t"], aux[name])
    for name in ("meanflow_error", "fake_gap", "twin_gap", "twin_error"):
        if name in aux:
            metrics |= binned(name, aux[f"{name}_t"], aux[name])
    for name in ("trajectory_near", "trajectory_far"):
        if name in aux:
            metrics[name.replace("_", "/")] = aux[name].mean()
    # A sample that is not finite shows in its loss, in the image that was made of it, or in what judges that.
    judged = ("loss", "meanflow_error", "trajectory_far", "fake_gap", "twin_gap")
    samples = [aux[name] for name in judged if name in aux]
    samples += [losses.per_sample_norm(aux["fake"])] if "fake" in aux else []
    made = {name: aux[name] for name in draws.MADE if name in aux}
    return state, metrics | health(sum(samples), state), made


def discriminator_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update of the critic; the student and the step counter stay as they are.

    ``batch`` may hold images of the student, see `draws.images_in`.
    """
    spectral = update_spectral(state.disc["params"], state.disc["spectral"])
    frozen = frozen | {"teacher": in_use(nets.teacher, frozen["teacher"])}
    student_params = draws.whole(nets, frozen, state.params)

    def loss(trained, batch, key, _):
        keys = draws.split(DiscriminatorKeys, key)
        x0, text, mask = draws.images_of(c, batch)
        fake, angle, guidance = draws.images_in(nets, c, student_params, batch, keys)
        network = trained, spectral, state, frozen, text, mask, guidance
        critic = draws.critic_of(nets, c, *network, control=draws.control_of(nets, batch))
        wrong = draws.wrong_captions(frozen, text, mask) if c.ladd.misaligned else None
        value, logits = critic_loss(c, critic, x0, fake, keys, wrong)
        order = rank_of_fakes(logits["real"], logits["fake"])
        aux = {f"logits/{name}": each for name, each in logits.items()}
        return value, aux | {"auc": jnp.where(angle >= trigflow.MAX_TIME, order, jnp.nan)}

    # Even keys are the generator's.
    key = jax.random.fold_in(jax.random.key(frozen["seed"]), 2 * state.disc["updates"] + 1)
    trained = trained_of(state.disc)
    value, aux, grads, _ = gradients({"critic": loss}, trained, batch, key, c.accumulate)
    state, metrics = apply_critic(nets.disc_optimizer, state, value, grads, spectral)
    auc = aux.pop("auc")
    if "logits/misaligned" in aux:
        metrics["logits/misaligned"] = jnp.nanmean(aux.pop("logits/misaligned"))
    metrics |= {name: values.mean() for name, values in aux.items()}
    # Of this batch before the critic learnt from it, and of the student's images from pure noise alone.
    return state, metrics | {"loss/critic": value, "critic/auc": jnp.nanmean(auc)}


def critic_loss(c, discriminate, real, fake, keys: DiscriminatorKeys, wrong=None):
    """`losses.ladd_discriminator_loss` with the times, the noise and the options that the config says.

    A misaligned pair is a caption and the image of the row before, where it is ``wrong`` for that, bool [B].
    """

    def at_noise(x0, time_key, noise_key):
        t = draws.draw_time(c.ladd, time_key, x0, c.sigma_d)
        return x0, draws.draw_noise(c, noise_key, x0), t

    real = at_noise(real, keys.real_judged_time, keys.real_judged_noise)
    own = keys.fake_judged_time, keys.fake_judged_noise
    fake = (fake, *real[1:]) if c.ladd.paired else at_noise(fake, *own)
    rolled = None
    if c.ladd.misaligned:
        other = jnp.roll(real[0], 1, axis=0)
        own = keys.rolled_judged_time, keys.rolled_judged_noise
        rolled = (other, *real[1:]) if c.ladd.paired else at_noise(other, *own)
    return losses.ladd_discriminator_loss(
        discriminate,
        real,
        fake,
        rolled,
        sigma_d=c.sigma_d,
        wrong=wrong,
        critic=PAIRS[c.ladd.loss][0],
        clean=c.ladd.clean,
        r1=c.ladd.r1,
        r2=c.ladd.r2,
        noise=jax.random.normal(keys.penalty_noise, real[0].shape),
        noise_scale=c.ladd.penalty_noise,
    )


def fake_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update of the fake score on images of the student, which stays as it is."""
    student_params = draws.whole(nets, frozen, state.params)

    def loss(params, batch, key, _):
        keys = draws.split(FakeKeys, key)
        x0, text, mask = draws.images_of(c, batch)
        fake, _, guidance = draws.images_in(nets, c, student_params, batch, keys)
        t, z = draws.score_time(c.dmd, keys.time, x0), draws.draw_noise(c, keys.noise, x0)
        control = draws.control_of(nets, batch)
        score = draws.fake_of(nets, c, params, text, mask, guidance, control=control)
        value, aux = losses.fake_score_loss(score, fake, z, t, c.sigma_d)
        return value, aux | {"t": t}

    key = jax.random.fold_in(jax.random.key(frozen["seed"]), 2**31 - 1)
    key = jax.random.fold_in(key, state.fake["updates"])
    params = state.fake["params"]
    value, aux, grads, _ = gradients({"fake": loss}, params, batch, key, c.accumulate)
    state, metrics = apply_fake(nets.fake_optimizer, state, value, grads)
    return state, metrics | {"loss/fake": value} | binned("fake_loss", aux["t"], aux["fake_loss"])


def joint_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """All updates of a step on one batch: critic and fake score learn from the images just judged."""
    state, metrics, made = _generator_update(nets, c, state, batch, frozen)
    batch = batch | made
    for update in critic_updates(c):
        state, more = update(nets, c, state, batch, frozen)
        metrics |= more
    return state, metrics


def critic_updates(c) -> list:
    """The updates of the networks that judge the student's images, in order."""
    fake = [fake_update] * (c.dmd.fake_updates if c.dmd.weight else 0)
    return fake + [discriminator_update] * (c.ladd.updates if c.ladd.weight else 0)


def check_tangent(nets: Nets, c, state: TrainState, batch: dict, frozen: dict) -> dict:
    """Compares the student's tangent with a central difference, and in bfloat16 with float32."""
    keys = draws.split(TangentKeys, jax.random.fold_in(jax.random.key(frozen["seed"]), state.step))
    x0, text, mask = draws.images_of(c, batch)
    guidance = draws.draw_guidance(c, keys.guidance, x0)
    t = draws.draw_time(c.scm, keys.time, x0, c.sigma_d)
    x = trigflow.add_noise(x0, draws.draw_noise(c, keys.noise, x0), t) / c.sigma_d
    scale = jnp.cos(t) * jnp.sin(t)
    control = draws.control_of(nets, batch)
    teacher = draws.teacher_of(nets, c, frozen, text, mask, guidance, control=control)
    params = draws.whole(nets, frozen, state.params)
    dx = trigflow.expand(scale, x) * teacher(x, t)

    def F(dtype):
        student = draws.student_of(nets, c, text, mask, guidance, dtype, control=control)
        return lambda x, t: student(params, x, t)[0]

    return tangent_checks(F(jnp.float32), F(jnp.bfloat16), x, t, dx, scale)
