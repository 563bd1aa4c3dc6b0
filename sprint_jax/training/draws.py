"""The parts of an update: named random keys, times and noise, and its networks as functions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import trigflow
from ..models import functions
from ..models.control import Control
from ..parallel.sharding import in_use
from .state import Nets

Key = jax.Array

MADE = (
    "fake",
    "fake_angle",
    "fake_guidance",
)  # the student's images in a batch, and how it made them


class FlowKeys(NamedTuple):
    """Of a flow update: times, noise, and whose caption is dropped."""

    time: Key
    noise: Key
    dropout: Key


class GeneratorKeys(NamedTuple):
    """Of a generator update, the same for all its losses: they share the CFG scales and nothing else.

    ``time`` and ``noise`` are of the consistency loss, ``fake_*`` of the images that the student makes,
    ``judged_*`` of the noise at which the critic sees them; ``dmd``, ``twinflow`` and ``twin`` are split into
    `ScoreKeys`.
    """

    guidance: Key
    time: Key
    noise: Key
    fake_time: Key
    fake_noise: Key
    judged_time: Key
    judged_noise: Key
    jump_time: Key
    jump_noise: Key
    path_time: Key
    path_noise: Key
    dmd: Key
    twinflow: Key
    twin: Key


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
    """Of one of DMD's and TwinFlow's losses: the noise at which scores look, and that of a separate engine."""

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


def control_of(nets: Nets, batch: dict) -> Control | None:
    """The condition of a batch, which all networks of a run with a control branch see."""
    return Control(batch["control"]) if nets.model.control_blocks else None


def whole(nets: Nets, frozen: dict, params):
    """The trained network's parameters for their use: with the frozen trunk, where a branch learns alone."""
    return in_use(nets.model, {**frozen.get("trunk", {}), **params})


def null_prompt(c, frozen: dict, mask) -> tuple[jax.Array, jax.Array]:
    """Text [1, L, D] and mask [1 or B, L] of the empty prompt in the place of captions with a mask [B, L]."""
    own = frozen["null_mask"][None]
    return frozen["null_text"][None], mask if c.data.null_mask == "caption" else own


def wrong_captions(frozen: dict, text, mask) -> jax.Array:
    """Which rows' captions are wrong for the image of the row before, bool [B]: not empty, and not its own.

    Captions are the same where as many tokens are kept and their features differ by no more than encoding them
    in another batch in bfloat16 makes of them.
    """

    def same(other_text, other_mask):
        kept = (mask == 1)[..., None]
        difference = jnp.where(kept, jnp.abs(text - other_text), 0).max((1, 2))
        size = jnp.where(kept, jnp.abs(text), 0).max((1, 2))
        return (mask == other_mask).all(1) & (difference <= size / 32)

    null = frozen["null_text"][None].astype(text.dtype), frozen["null_mask"][None]
    return ~(same(*null) | same(jnp.roll(text, 1, axis=0), jnp.roll(mask, 1, axis=0)))


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


def shown_guidance(c, guidance: jax.Array) -> jax.Array:
    """The CFG scales of a batch as the student is shown them: the middle one, where it is not told."""
    scales = c.scm.guidance
    return guidance if c.scm.show_guidance else jnp.full_like(guidance, scales[len(scales) // 2])


def draw_flow_time(c, key: Key, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Flow times of the samples, and those that the network is shown, [B] each."""
    how = (c.flow.time_mean, c.flow.time_std, c.flow.shift)
    if c.flow.truncate_times:
        return trigflow.sample_truncated_flow_time(key, latents.shape[:1], *how)
    t = trigflow.sample_flow_time(key, latents.shape[:1], *how)
    return t, t


def draw_jump(c, key: Key, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Flow times ``t`` of samples and ``target <= t`` of their jumps, [B] each; some jump nowhere."""
    keys = jax.random.split(key, 3)
    how = latents.shape[:1], c.meanflow.time_mean, c.meanflow.time_std, 1.0
    one, other = (trigflow.sample_flow_time(each, *how) for each in keys[:2])
    stays = jax.random.bernoulli(keys[2], c.meanflow.same_time, one.shape)
    t = jnp.maximum(one, other)
    return t, jnp.where(stays, t, jnp.minimum(one, other))


def draw_path(c, key: Key) -> jax.Array:
    """Flow times of a trajectory's points, [steps + 1] from 1 to 0: even, then shifted at random."""
    limit = jnp.log(c.trajectory.spread)
    shift = jnp.exp(jax.random.uniform(key, (), jnp.float32, -limit, limit))
    # As diffusers' solver, whose first time is a little below 1, where the ratio of signal to noise is 0.
    even = jnp.linspace(1.0, 0.0, c.trajectory.steps + 1).at[0].set(1 - 1 / 3000)
    return trigflow.shift_flow_time(even, shift)


def warmup(updates: int, step: jax.Array) -> jax.Array | float:
    """Grows from 0 to 1 over the first updates."""
    return jnp.minimum(1.0, step / updates) if updates else 1.0


def after(updates: int, step: jax.Array) -> jax.Array | float:
    """0 in the first updates, then 1."""
    return (step >= updates).astype(jnp.float32) if updates else 1.0


def student_of(nets: Nets, c, text, mask, guidance, dtype=None, *, control=None):
    """``student(params, x, t) -> (F, logvar)`` of one batch; matmuls in ``dtype`` where it is given."""
    model = functions.in_dtype(nets.model, dtype)
    guidance, how = shown_guidance(c, guidance), dict(control=control, with_logvar=True)

    def student(params, x, t):
        return functions.trigflow(model, params, text, mask, guidance, **how)(x, t)

    return student


def teacher_of(
    nets: Nets, c, frozen: dict, text, mask, guidance, form=functions.trigflow, *, control=None
):
    """``teacher(x, t) -> F`` of the frozen teacher with classifier-free guidance."""
    null = null_prompt(c, frozen, mask)
    network = nets.teacher, frozen["teacher"], text, mask
    return functions.guided(form, *network, guidance, null, control)


def teacher_velocity(nets: Nets, c, frozen: dict, text, mask, guidance, *, control=None):
    """``velocity(x_fm, t_fm)`` of the frozen teacher with classifier-free guidance."""
    form = functions.velocity
    return teacher_of(nets, c, frozen, text, mask, guidance, form, control=control)


def critic_of(
    nets: Nets,
    c,
    trained: dict,
    spectral,
    state,
    frozen: dict,
    text,
    mask,
    guidance,
    *,
    control=None,
):
    """``discriminate(x, t) -> logits [B, M]``: heads on the features of a network.

    Args:
      trained: of `state.trained_of`: the heads, and the backbone of a critic of its own.
      guidance: CFG scales [B] of the student's images, of which the fake score is told.
    """
    backbones = {
        "teacher": lambda: (nets.teacher, frozen["teacher"]),
        "fake": lambda: (nets.fake, in_use(nets.fake, state.fake["params"])),
        "copy": lambda: (nets.teacher, in_use(nets.teacher, trained["backbone"])),
    }
    network = *backbones[c.ladd.features](), text, mask, shown_guidance(c, guidance)
    features = functions.features(*network, taps=c.ladd.taps, control=control)
    params = in_use(nets.model, trained["params"])

    def discriminate(x, t):
        if (
            c.ladd.clean
        ):  # seen as it is: the transform to flow matching would scale it by the angle
            x = x / trigflow.flow_inputs(jnp.ones_like(x), t)[0]
        logits = nets.heads.apply({"params": params}, features(x, t), spectral)
        return logits.mean(-1, keepdims=True) if c.ladd.pooled else logits

    return discriminate


def fake_of(nets: Nets, c, params, text, mask, guidance, *, control=None):
    """``fake(x, t) -> F`` of the fake score of images with these captions, made at these CFG scales [B]."""
    network = nets.fake, in_use(nets.fake, params), text, mask, shown_guidance(c, guidance)
    return functions.trigflow(*network, control=control)


def score_time(section, key: Key, x0: jax.Array) -> jax.Array:
    """Angles [B] of flow times that are uniform, then shifted towards noise."""
    s = jax.random.uniform(key, x0.shape[:1], jnp.float32, minval=1e-3, maxval=1 - 1e-3)
    return trigflow.trig_time(trigflow.shift_flow_time(s, section.shift))


def images_in(nets: Nets, c, params, batch: dict, keys) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A batch's images [B, h, w, C] of the student, without gradient, and their angles and CFG scales [B].

    Those that the batch holds as `MADE`; else they are made, by ``keys.fake_*``.
    """
    if "fake" in batch:
        return tuple(batch[name] for name in MADE)
    x0, text, mask = images_of(c, batch)
    guidance, control = draw_guidance(c, keys.guidance, x0), control_of(nets, batch)
    student = student_of(nets, c, text, mask, guidance, control=control)
    made = generate(c, student, params, x0, keys.fake_time, keys.fake_noise)
    return *jax.lax.stop_gradient(made), guidance


def generate(c, student, params, x0, time_key: Key, noise_key: Key) -> tuple[jax.Array, jax.Array]:
    """Makes the student's images, and the angles [B] from which it makes them.

    From real images noised to random angles, often to the largest; or, with ``images.rollout``, from noise in
    1 to so many steps at angles of `score_time`, of which the last carries the gradient.
    """
    if c.images.rollout:
        t, x_t = roll_out(c, student, params, x0, time_key, noise_key)
    else:
        time, largest = jax.random.split(time_key)
        t = draw_time(c.scm, time, x0, c.sigma_d)
        t = trigflow.with_max_time(largest, t, c.images.max_time_probability)
        x_t = trigflow.add_noise(x0, draw_noise(c, noise_key, x0), t)
    F, _ = student(params, x_t / c.sigma_d, t)
    return trigflow.predict_x0(x_t, F, t, c.sigma_d), t


def roll_out(c, student, params, x0, time_key: Key, noise_key: Key):
    """Samples with the student up to its last step: ``(t, x_t)`` there, without gradient (rCM).

    Each sample takes 1 to ``images.rollout`` steps, from the largest angle, each at an angle of the scores'
    distribution that is no larger than the one before.
    """
    rollout = c.images.rollout
    count_key, *time_keys = jax.random.split(time_key, rollout)
    noise_keys = jax.random.split(noise_key, rollout)
    steps = jax.random.randint(count_key, x0.shape[:1], 1, rollout + 1)
    fixed = jax.lax.stop_gradient(params)
    angle = jnp.full(x0.shape[:1], trigflow.MAX_TIME, jnp.float32)
    x = draw_noise(c, noise_keys[0], x0)
    for i in range(1, rollout):
        F, _ = student(fixed, x / c.sigma_d, angle)
        image = trigflow.predict_x0(x, F, angle, c.sigma_d)
        following = jnp.minimum(angle, score_time(c.dmd, time_keys[i - 1], x0))
        renoised = trigflow.add_noise(image, draw_noise(c, noise_keys[i], x0), following)
        goes_on = steps > i
        x = jnp.where(trigflow.expand(goes_on, x), renoised, x)
        angle = jnp.where(goes_on, following, angle)
    return angle, jax.lax.stop_gradient(x)
