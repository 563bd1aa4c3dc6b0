"""The updates of one step, as functions of (state, batch, frozen), and their programs."""

import concurrent.futures
import functools
import os

import jax
import jax.numpy as jnp
from tqdm import tqdm

from .. import losses, trigflow
from ..core.config import Config
from ..models import functions as closures
from ..models.discriminator import update_spectral
from ..parallel import sharding
from ..parallel.sharding import in_use
from .accumulate import gradients
from .diagnostics import binned, tangent_checks
from .setup import Nets
from .state import TrainState, apply_gradients, health

COMPILERS = max(1, min(16, (os.cpu_count() or 1) // 4))  # threads, each of which uses several cores


def flow_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One flow-matching update; ``batch`` has latents [B, h, w, C], text [B, L, D], mask [B, L]."""

    def loss(params, batch, key):
        params = in_use(nets.model, params)
        keys = jax.random.split(key, 3)
        latents = batch["latents"]
        t, shown = closures.draw_flow_time(c, keys[0], latents)
        noise = jax.random.normal(keys[1], latents.shape)
        drop = jax.random.bernoulli(keys[2], c.flow.caption_dropout, t.shape)
        text = jnp.where(drop[:, None, None], frozen["null_text"][None], batch["text"])
        mask = jnp.where(drop[:, None], frozen["null_mask"][None], batch["mask"])

        def velocity(x, _):
            return nets.model.apply({"params": params}, x, shown, text, mask)

        return losses.flow_matching_loss(velocity, latents, noise, t)

    key = jax.random.fold_in(jax.random.key(c.seed), state.step)
    value, aux, grads = gradients([loss], state.params, batch, key, c.accumulate)
    state, metrics = apply_gradients(nets.optimizer, state, value, grads, ema_decay=c.ema_decay)
    metrics |= {"loss/flow": value, **binned("flow_loss", aux["t"], aux["loss"], limit=1.0)}
    return state, metrics | health(aux["loss"], state)


def generator_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update of the student: sCM plus LADD. Touches neither heads nor teacher; counts the step."""
    state, metrics, _ = _generator_update(nets, c, state, batch, frozen)
    return state, metrics


def _generator_update(nets, c, state, batch, frozen):
    """`generator_update`, and the student's images [B, h, w, C] (None without LADD)."""
    teacher_params = in_use(nets.teacher, frozen["teacher"])
    frozen = frozen | {"teacher": teacher_params}

    def consistency(params, batch, key):
        keys = jax.random.split(key, 7)
        x0, text, mask = closures.images_of(c, batch)
        guidance = closures.draw_guidance(c, keys[0], x0)
        teacher = closures.guided_teacher_of(nets, frozen, text, mask, guidance)
        student = closures.student_of(nets, text, mask, guidance, dtype=c.scm.jvp_dtype)
        t = trigflow.sample_time(keys[1], x0.shape[:1], c.scm.time_mean, c.scm.time_std, c.sigma_d)
        loss, aux = losses.scm_loss(
            student,
            teacher,
            in_use(nets.model, params),
            x0,
            closures.draw_noise(c, keys[2], x0),
            t,
            sigma_d=c.sigma_d,
            warmup=jnp.minimum(1.0, state.step / c.scm.tangent_warmup)
            if c.scm.tangent_warmup
            else 1.0,
            tangent_constant=c.scm.tangent_constant,
            mean_norm=c.scm.mean_norm,
            shared_primal=c.scm.shared_primal,
        )
        return c.scm.weight * loss, aux

    def adversarial(params, batch, key):
        keys = jax.random.split(key, 7)
        x0, text, mask = closures.images_of(c, batch)
        student = closures.student_of(nets, text, mask, closures.draw_guidance(c, keys[0], x0))
        fake = closures.generate(c, student, in_use(nets.model, params), x0, keys[3], keys[4])
        t = trigflow.sample_time(
            keys[5], x0.shape[:1], c.ladd.time_mean, c.ladd.time_std, c.sigma_d
        )
        features = closures.features_of(nets, c, frozen, text, mask)
        heads = closures.heads_of(nets, state.disc["params"], state.disc["spectral"])
        loss, gan = losses.ladd_generator_loss(
            lambda x, t: heads(features(x, t)),
            fake,
            closures.draw_noise(c, keys[6], x0),
            t,
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
        keys = jax.random.split(key, 9)
        x0, text, mask = closures.images_of(c, batch)
        count = x0.shape[:1]
        fake = batch.get("fake")
        if fake is None:
            student = closures.student_of(nets, text, mask, closures.draw_guidance(c, keys[0], x0))
            fake = closures.generate(c, student, student_params, x0, keys[1], keys[2])

        def noisy(x0, time_key, noise_key):
            t = trigflow.sample_time(time_key, count, c.ladd.time_mean, c.ladd.time_std, c.sigma_d)
            return x0, closures.draw_noise(c, noise_key, x0), t

        rolled = noisy(jnp.roll(x0, 1, axis=0), keys[7], keys[8]) if c.ladd.misaligned else None
        return losses.ladd_discriminator_loss(
            closures.features_of(nets, c, frozen, text, mask),
            closures.heads_of(nets, params, spectral),
            noisy(x0, keys[3], keys[4]),
            noisy(jax.lax.stop_gradient(fake), keys[5], keys[6]),
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
    """The student's tangent against a central difference, and in bfloat16 against float32."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(c.seed), state.step), 3)
    x0, text, mask = closures.images_of(c, batch)
    guidance = closures.draw_guidance(c, keys[0], x0)
    t = trigflow.sample_time(keys[1], x0.shape[:1], c.scm.time_mean, c.scm.time_std, c.sigma_d)
    x = trigflow.add_noise(x0, closures.draw_noise(c, keys[2], x0), t) / c.sigma_d
    scale = jnp.cos(t) * jnp.sin(t)
    dx = trigflow.expand(scale, x) * closures.guided_teacher_of(nets, frozen, text, mask, guidance)(
        x, t
    )

    def F(dtype):
        student = closures.student_of(nets, text, mask, guidance, dtype)
        return lambda x, t: student(in_use(nets.model, state.params), x, t)[0]

    return tangent_checks(F(jnp.float32), F(jnp.bfloat16), x, t, dx, scale)


def lower_updates(c: Config, nets: Nets, state: TrainState, batch: dict, frozen: dict) -> list:
    """The updates of one step, traced: ``compile()`` gives ``(state, batch, frozen) -> (state, metrics)``.

    Each takes a batch of its own, and the memory of the state it is given. Arguments may be arrays, or
    ShapeDtypeStructs with shardings, as from `setup.abstract_run`.
    """
    updates = [flow_update] if c.stage == "flow" else [generator_update]
    if nets.heads is not None:
        updates = [joint_update] if c.ladd.reuse_fakes else [*updates, discriminator_update]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, batch, frozen))
    everywhere = sharding.replicated(state.step.sharding.mesh)
    jitted = [
        jax.jit(
            functools.partial(update, nets, c),
            donate_argnums=0,
            in_shardings=shardings,
            out_shardings=(shardings[0], everywhere),
        )
        for update in updates
    ]
    return [update.lower(state, batch, frozen) for update in jitted]


def compile_updates(lowered: list[list]) -> list[list]:
    """Compiles the updates of every batch shape, some at a time: there may be dozens."""
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        compiled = pool.map(lambda updates: [update.compile() for update in updates], lowered)
        return list(
            tqdm(compiled, "compiling", len(lowered), unit="shape", disable=not lowered[1:])
        )
