"""The terms of a student's update: each loss with the networks, the noise and the times that it takes.

A term is ``term(params, batch, key, found) -> (loss, aux)``, with aux per sample [B] and ``found`` the aux of
the terms before it; all split the same key into `draws.GeneratorKeys`.

Losses on the images that a student makes share one pass of the student. Each is computed with its gradient by
the images alone; the gradients are weighted, summed and sent through the student once. With ``images.balance``
a weight is the length of a loss's gradient by the network's output (F; of MeanFlow and of TwinFlow's flow the
velocity), in units of that of the losses that are not on images; without, it multiplies the loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .. import losses, sampling, trigflow
from ..losses.adversarial import PAIRS
from ..models import functions
from . import draws
from .draws import GeneratorKeys, ScoreKeys
from .state import Nets, TrainState, trained_of

Array = jax.Array
# The gradient of the normalised consistency loss by F has about this length, whatever the image's size: its
# tangent has length 1, and the weight that logvar learns makes the error 1. The unit where there is no other.
SCM_LENGTH = 2.0
BASES = ("scm", "meanflow", "trajectory")  # the losses that are not on images
TINY = 1e-12  # below every length of a gradient that is not 0


def generator_terms(nets: Nets, c, state: TrainState, frozen: dict) -> dict[str, Callable]:
    """The terms that the config turns on, by name: first `BASES`, of which `balanced` takes its unit."""
    terms = {}
    if c.scm.weight:
        terms["scm"] = consistency_term(nets, c, state, frozen)
    if c.meanflow.weight:
        terms["meanflow"] = meanflow_term(nets, c, frozen)
    if c.trajectory.weight:
        terms["trajectory"] = trajectory_term(nets, c, frozen)
    if nets.heads is not None or c.dmd.weight or c.twinflow.weight:
        terms["images"] = images_term(nets, c, state, frozen)
    if c.twinflow.weight:
        terms["twin"] = twin_term(nets, c, frozen)
    return terms


def consistency_term(nets: Nets, c, state: TrainState, frozen: dict) -> Callable:
    """The consistency loss sCM (`losses.scm_loss`)."""

    def term(params, batch, key, _):
        keys = draws.split(GeneratorKeys, key)
        x0, text, mask = draws.images_of(c, batch)
        guidance, control = draws.draw_guidance(c, keys.guidance, x0), draws.control_of(nets, batch)
        loss, aux = losses.scm_loss(
            draws.student_of(nets, c, text, mask, guidance, c.scm.jvp_dtype, control=control),
            draws.teacher_of(nets, c, frozen, text, mask, guidance, control=control),
            draws.whole(nets, frozen, params),
            x0,
            draws.draw_noise(c, keys.noise, x0),
            draws.draw_time(c.scm, keys.time, x0, c.sigma_d),
            sigma_d=c.sigma_d,
            warmup=draws.warmup(c.scm.tangent_warmup, state.step),
            tangent_constant=c.scm.tangent_constant,
            mean_norm=c.scm.mean_norm,
            shared_primal=c.scm.shared_primal,
        )
        aux["length/scm"] = aux.pop("length")
        return c.scm.weight * loss, aux

    return term


def meanflow_term(nets: Nets, c, frozen: dict) -> Callable:
    """The flow map of MeanFlow (`losses.meanflow_loss`): the student learns jumps between any two times."""

    def term(params, batch, key, _):
        keys = draws.split(GeneratorKeys, key)
        latents, text, mask = batch["latents"], batch["text"], batch["mask"]
        guidance, control = (
            draws.draw_guidance(c, keys.guidance, latents),
            draws.control_of(nets, batch),
        )
        model = functions.in_dtype(nets.model, c.scm.jvp_dtype)
        shown = draws.shown_guidance(c, guidance)

        def average(params, x, t, target):
            how = dict(target=target, control=control)
            return functions.velocity(model, params, text, mask, shown, **how)(x, t)

        t, target = draws.draw_jump(c, keys.jump_time, latents)
        loss, aux = losses.meanflow_loss(
            average,
            draws.teacher_velocity(nets, c, frozen, text, mask, guidance, control=control),
            draws.whole(nets, frozen, params),
            latents,
            jax.random.normal(keys.jump_noise, latents.shape),
            t,
            target,
            power=c.meanflow.power,
        )
        found = {"meanflow_error": aux["error"], "meanflow_error_t": trigflow.trig_time(t)}
        found |= {"length/meanflow": aux["length"], "value/meanflow": jnp.full_like(t, loss)}
        return c.meanflow.weight * loss, found

    return term


def trajectory_term(nets: Nets, c, frozen: dict) -> Callable:
    """Regression to the ends of the teacher's trajectories (`losses.trajectory_loss`), from pure noise."""

    def term(params, batch, key, _):
        keys = draws.split(GeneratorKeys, key)
        _, text, mask = draws.images_of(c, batch)
        guidance, control = (
            draws.draw_guidance(c, keys.guidance, text),
            draws.control_of(nets, batch),
        )
        noise = jax.random.normal(keys.path_noise, batch["latents"].shape)
        times = draws.draw_path(c, keys.path_time)
        how = dict(control=control)
        velocity = draws.teacher_velocity(nets, c, frozen, text, mask, guidance, **how)
        end, points = sampling.dpm_solver_path(velocity, noise, times, times[:-1])

        # All points of a sample side by side, so that each device of a mesh has them in its own rows.
        def along(a):
            return jnp.repeat(a, len(points), axis=0)

        angles = jnp.tile(trigflow.trig_time(times[:-1]), len(noise))
        # x_t / sigma_d of the flow's sample, the inverse of Eq. (7).
        scale = jnp.sqrt(times[:-1] ** 2 + (1 - times[:-1]) ** 2)
        x_t = c.sigma_d * points / trigflow.expand(scale, points)
        x_t = x_t.swapaxes(0, 1).reshape(-1, *noise.shape[1:])
        if control is not None:
            control = control._replace(latents=along(control.latents))
        student = draws.student_of(
            nets, c, along(text), along(mask), along(guidance), control=control
        )
        gathered = draws.whole(nets, frozen, params)
        loss, aux = losses.trajectory_loss(
            lambda x, t: student(gathered, x, t)[0],
            jax.lax.stop_gradient(x_t),
            angles,
            jax.lax.stop_gradient(c.sigma_d * along(end)),
            c.sigma_d,
            power=c.trajectory.power,
        )
        error = aux["error"].reshape(len(noise), -1)
        found = {"trajectory_near": error[:, -1], "trajectory_far": error[:, 0]}
        found["length/trajectory"] = aux["length"].reshape(len(noise), -1).mean(1)
        found["value/trajectory"] = jnp.full(len(noise), loss)
        return c.trajectory.weight * loss, found

    return term


def balanced(c, weight: Array | float, length: Array, found: dict) -> Array | float:
    """What multiplies a loss: ``weight``; with ``images.balance`` what makes its gradient by F, which has the
    ``length`` [B], ``weight`` times as long as that of the `BASES`, on average."""
    if not c.images.balance:
        return weight
    bases = [c[name].weight * found[f"length/{name}"].mean() for name in BASES if c[name].weight]
    return weight * (sum(bases) if bases else SCM_LENGTH) / jnp.maximum(length.mean(), TINY)


def images_term(nets: Nets, c, state: TrainState, frozen: dict) -> Callable:
    """All losses on the student's images.

    aux holds 'value/NAME' and 'length/NAME' of each, of its gradient by F before weighting, and `draws.MADE`.
    """

    def term(params, batch, key, found):
        keys = draws.split(GeneratorKeys, key)
        real, text, mask = draws.images_of(c, batch)
        guidance, control = (
            draws.draw_guidance(c, keys.guidance, real),
            draws.control_of(nets, batch),
        )
        student = draws.student_of(nets, c, text, mask, guidance, control=control)
        gathered = draws.whole(nets, frozen, params)
        x0, angle = draws.generate(c, student, gathered, real, keys.fake_time, keys.fake_noise)
        fixed, count = jax.lax.stop_gradient(x0), len(x0)
        total, pull, aux = 0.0, jnp.zeros_like(x0), {}
        by_F = c.sigma_d * jnp.sin(angle)  # the length of dx0 / dF
        for name, (weight, loss) in image_losses(
            nets, c, state, frozen, batch, guidance, keys
        ).items():
            by_images = jax.value_and_grad(lambda x, loss=loss: loss(gathered, x), has_aux=True)
            (value, more), gradient = by_images(fixed)
            length = losses.per_sample_norm(gradient) * count * by_F
            weight = balanced(c, weight, length, found)
            total += weight * value
            pull += weight * gradient
            aux |= more | {f"length/{name}": length, f"value/{name}": jnp.full(count, value)}
        # The value of the weighted sum, with its gradient by the images.
        surrogate = (jax.lax.stop_gradient(pull) * (x0 - fixed)).sum()
        aux |= dict(zip(draws.MADE, (fixed, angle, guidance), strict=True))
        return jax.lax.stop_gradient(total) + surrogate, jax.lax.stop_gradient(aux)

    return term


def image_losses(
    nets: Nets,
    c,
    state: TrainState,
    frozen: dict,
    batch: dict,
    guidance: Array,
    keys: GeneratorKeys,
) -> dict[str, tuple[Array | float, Callable]]:
    """The losses that the config turns on: name -> (weight, ``loss(params, x0) -> (mean, aux)``)."""
    real, text, mask = draws.images_of(c, batch)
    found, how = {}, dict(control=draws.control_of(nets, batch))
    if nets.heads is not None:
        loss = _ladd(nets, c, state, frozen, real, text, mask, guidance, keys, **how)
        found["ladd"] = c.ladd.weight, loss
    if c.dmd.weight:
        loss = _dmd(nets, c, state, frozen, text, mask, guidance, keys.dmd, **how)
        found["dmd"] = c.dmd.weight * draws.after(c.dmd.warmup, state.step), loss
    if c.twinflow.weight:
        loss = _twinflow(nets, c, frozen, text, mask, guidance, keys.twinflow, **how)
        weight = c.twinflow.weight * draws.after(c.twinflow.warmup, state.step)
        found["twinflow"] = weight, loss
    return found


def _ladd(
    nets, c, state, frozen, real, text, mask, guidance, keys: GeneratorKeys, control
) -> Callable:
    network = trained_of(state.disc), state.disc["spectral"], state, frozen, text, mask, guidance
    discriminate = draws.critic_of(nets, c, *network, control=control)

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


def _dmd(nets, c, state, frozen, text, mask, guidance, key, control) -> Callable:
    teacher = draws.teacher_of(nets, c, frozen, text, mask, guidance, control=control)
    fake = draws.fake_of(nets, c, state.fake["params"], text, mask, guidance, control=control)
    keys = draws.split(ScoreKeys, key)

    def loss(params, x0):
        z, t = draws.draw_noise(c, keys.noise, x0), draws.score_time(c.dmd, keys.time, x0)
        how = dict(teacher=teacher, fake=fake, sigma_d=c.sigma_d)
        if c.dmd.decoupled:
            network = nets.teacher, frozen["teacher"], text, mask
            plain = functions.trigflow(*network, control=control)
            other_t = draws.score_time(c.dmd, keys.engine_time, x0)
            other_z = draws.draw_noise(c, keys.engine_noise, x0)
            how |= dict(teacher=plain, engine=(teacher, plain, other_z, other_t))
        value, aux = losses.dmd_loss(x0, z, t, **how)
        return value, {"fake_gap": aux["gap"], "fake_gap_t": t}

    return loss


def _twinflow(nets, c, frozen, text, mask, guidance, key, control) -> Callable:
    real = draws.teacher_velocity(nets, c, frozen, text, mask, guidance, control=control)
    shown = draws.shown_guidance(c, guidance)
    keys = draws.split(ScoreKeys, key)

    def loss(params, x0):
        latents = x0 / c.sigma_d
        noise = jax.random.normal(keys.noise, x0.shape)
        t = trigflow.flow_time(draws.score_time(c.twinflow, keys.time, x0))
        fixed = jax.lax.stop_gradient(params)
        fake = functions.velocity(nets.model, fixed, text, mask, shown, control=control)
        # The one-step velocity is noise minus the image: its gradient is minus that of the image.
        value, aux = losses.rectify_loss(-latents, latents, noise, t, fake=fake, real=real)
        return value, {"twin_gap": aux["gap"], "twin_gap_t": trigflow.trig_time(t)}

    return loss


def twin_term(nets: Nets, c, frozen: dict) -> Callable:
    """TwinFlow's other half: the student learns the flow of the images it just made, at negative times."""

    def term(params, batch, key, found):
        keys = draws.split(GeneratorKeys, key)
        _, text, mask = draws.images_of(c, batch)
        guidance = draws.shown_guidance(c, draws.draw_guidance(c, keys.guidance, text))
        latents = found["fake"] / c.sigma_d
        keys = draws.split(ScoreKeys, keys.twin)
        noise = jax.random.normal(keys.noise, latents.shape)
        t = trigflow.flow_time(draws.score_time(c.twinflow, keys.time, latents))
        network = nets.model, draws.whole(nets, frozen, params), text, mask, guidance
        velocity = functions.velocity(*network, control=draws.control_of(nets, batch))
        loss, aux = losses.twin_flow_loss(velocity, latents, noise, t)
        weight = balanced(c, c.twinflow.twin_weight, aux["length"], found)
        found = {"twin_error": aux["error"], "twin_error_t": trigflow.trig_time(t)}
        return weight * loss, found | {"value/twin": jnp.full_like(t, loss)}

    return term
