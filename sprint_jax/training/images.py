"""Losses on the images that a student makes, from one pass of the student for all of them.

Each loss is computed with its gradient by the images alone. The gradients are weighted, summed and sent
through the student once. With ``images.balance`` a weight is the length of a loss's gradient at the images, in
units of the length that sCM's has at the network's output; without, it multiplies the loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .. import losses, trigflow
from ..losses.adversarial import PAIRS
from ..models import functions
from ..parallel.sharding import in_use
from . import draws
from .draws import FakeKeys, GeneratorKeys, ScoreKeys
from .state import Nets, TrainState, trained_of

Array = jax.Array
# The gradient of the normalised consistency loss by the student's output has about this length, whatever the
# image's size: its tangent has length 1, and the weight that logvar learns makes the error 1.
SCM_LENGTH = 2.0


def image_losses(
    nets: Nets,
    c,
    state: TrainState,
    frozen: dict,
    batch: dict,
    guidance: Array,
    keys: GeneratorKeys,
) -> dict[str, tuple[float, Callable]]:
    """The losses that the config turns on: name -> (weight, ``loss(params, x0) -> (mean, aux)``)."""
    real, text, mask = draws.images_of(c, batch)
    found = {}
    if nets.heads is not None:
        found["ladd"] = c.ladd.weight, _ladd(nets, c, state, frozen, real, text, mask, keys)
    score_keys = draws.split(ScoreKeys, jax.random.fold_in(keys.judged_time, 1))
    where = nets, c, frozen, text, mask, guidance, score_keys
    if c.dmd.weight:
        warm = (state.step >= c.dmd.warmup).astype(jnp.float32) if c.dmd.warmup else 1.0
        found["dmd"] = c.dmd.weight * warm, _dmd(*where, state)
    if c.twinflow.weight:
        found["twinflow"] = c.twinflow.weight, _twinflow(*where)
    return found


def _ladd(nets, c, state, frozen, real, text, mask, keys: GeneratorKeys) -> Callable:
    discriminate = draws.critic_of(
        nets, c, trained_of(state.disc), state.disc["spectral"], state, frozen, text, mask
    )

    def loss(params, x0):
        z = draws.draw_noise(c, keys.judged_noise, x0)
        t = draws.draw_time(c.ladd, keys.judged_time, x0, c.sigma_d)
        value, _ = losses.ladd_generator_loss(
            discriminate,
            x0,
            z,
            t,
            c.sigma_d,
            real=real if c.ladd.loss == "relativistic" else None,
            generator=PAIRS[c.ladd.loss][1],
            clean=c.ladd.clean,
        )
        return value, {}

    return loss


def _dmd(nets, c, frozen, text, mask, guidance, keys: ScoreKeys, state) -> Callable:
    teacher = draws.teacher_of(nets, frozen, text, mask, guidance)
    fake = draws.fake_of(nets, state.fake["params"], text, mask)

    def loss(params, x0):
        z, t = draws.draw_noise(c, keys.noise, x0), draws.score_time(c.dmd, keys.time, x0)
        how = dict(teacher=teacher, fake=fake, sigma_d=c.sigma_d)
        if c.dmd.decoupled:
            plain = functions.trigflow(nets.teacher, frozen["teacher"], text, mask)
            other_t = draws.score_time(c.dmd, keys.engine_time, x0)
            other_z = draws.draw_noise(c, keys.engine_noise, x0)
            how |= dict(teacher=plain, engine=(teacher, plain, other_z, other_t))
        value, aux = losses.dmd_loss(x0, z, t, **how)
        return value, {"fake_gap": aux["gap"], "fake_gap_t": t}

    return loss


def _twinflow(nets, c, frozen, text, mask, guidance, keys: ScoreKeys) -> Callable:
    null = frozen["null_text"][None], frozen["null_mask"][None]
    form, teacher = functions.velocity, frozen["teacher"]
    real = functions.guided(form, nets.teacher, teacher, text, mask, guidance, null)

    def loss(params, x0):
        latents = x0 / c.sigma_d
        noise = jax.random.normal(keys.noise, x0.shape)
        t = trigflow.flow_time(draws.score_time(c.twinflow, keys.time, x0))
        fixed = jax.lax.stop_gradient(params)
        fake = functions.velocity(nets.model, fixed, text, mask, guidance)
        # The one-step velocity is noise minus the image: its gradient is minus that of the image.
        value, aux = losses.rectify_loss(-latents, latents, noise, t, fake=fake, real=real)
        return value, {"fake_gap": aux["gap"], "fake_gap_t": trigflow.trig_time(t)}

    return loss


def images_term(nets: Nets, c, state: TrainState, frozen: dict) -> Callable:
    """A term of the generator's update: ``term(params, batch, key) -> (loss, aux)``.

    aux holds per sample [B]: each loss's own, 'length/NAME' of its gradient at the images before weighting,
    'fake', the images, and 'fake_angle', from which they were made.
    """

    def term(params, batch, key):
        keys = draws.split(GeneratorKeys, key)
        real, text, mask = draws.images_of(c, batch)
        guidance = draws.draw_guidance(c, keys.guidance, real)
        student = draws.student_of(nets, text, mask, guidance)
        gathered = in_use(nets.model, params)
        x0, angle = draws.generate(c, student, gathered, real, keys.fake_time, keys.fake_noise)
        fixed, count = jax.lax.stop_gradient(x0), len(x0)
        total, pull, aux = 0.0, jnp.zeros_like(x0), {}
        for name, (weight, loss) in image_losses(
            nets, c, state, frozen, batch, guidance, keys
        ).items():
            by_images = jax.value_and_grad(lambda x, loss=loss: loss(gathered, x), has_aux=True)
            (value, more), gradient = by_images(fixed)
            length = losses.per_sample_norm(gradient) * count
            if c.images.balance:
                weight = weight * SCM_LENGTH / jnp.maximum(length.mean(), 1e-12)
            total += weight * value
            pull += weight * gradient
            aux |= more | {f"length/{name}": length, f"value/{name}": jnp.full(count, value)}
        # The value of the weighted sum, with its gradient by the images.
        surrogate = (jax.lax.stop_gradient(pull) * (x0 - fixed)).sum()
        aux |= {"fake": fixed, "fake_angle": angle}
        return jax.lax.stop_gradient(total) + surrogate, jax.lax.stop_gradient(aux)

    return term


def twin_term(nets: Nets, c, state: TrainState, frozen: dict) -> Callable:
    """TwinFlow's other term: the student learns the flow of its own images at negative times."""
    del frozen

    def term(params, batch, key):
        keys = draws.split(FakeKeys, jax.random.fold_in(key, 2))
        _, text, mask = draws.images_of(c, batch)
        guidance = draws.draw_guidance(c, keys.guidance, text)
        x0, _ = draws.images_in(nets, c, in_use(nets.model, state.params), batch, keys)
        noise = jax.random.normal(keys.noise, x0.shape)
        t = trigflow.flow_time(draws.score_time(c.twinflow, keys.time, x0))
        gathered = in_use(nets.model, params)
        velocity = functions.velocity(nets.model, gathered, text, mask, guidance)
        return losses.twin_flow_loss(velocity, x0 / c.sigma_d, noise, t)

    return term
