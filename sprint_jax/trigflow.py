"""TrigFlow: the mathematics that turns a flow-matching teacher into a TrigFlow model.

Everything here is a pure function of arrays; no network is imported. Equation numbers are those of
SANA-Sprint (arXiv 2503.09641).

Two ways of writing a noisy sample:

* flow matching, Eq. (1):  ``x_fm = (1 - t_fm) x0 + t_fm eps``        with ``t_fm`` in [0, 1];
* TrigFlow:                ``x_t  = cos(t) x0 + sin(t) z``            with ``t`` in [0, pi/2],

where TrigFlow's data and noise both have standard deviation ``sigma_d``: ``x0`` is ``sigma_d`` times
the (roughly unit variance) latents that the flow model was trained on, and ``z = sigma_d * eps``.

Times are arrays of shape [B] (or scalars) and are broadcast over the trailing axes of samples.
They stay in the dtype they arrive in; give float32 or better, since bfloat16 times are wrong by
up to 0.003.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# The published samplers start here. It is slightly above pi/2, which puts flow time slightly above 1;
# clamping either would change the images.
MAX_TIME = 1.57080


def expand(t: Array, x: Array) -> Array:
    """Reshapes times ``t`` [B] (or scalar) so that they broadcast against ``x`` [B, ...]."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (jnp.ndim(x) - t.ndim)) if t.ndim else t


def flow_time(t: Array) -> Array:
    """TrigFlow angle to flow time, Eq. (6): ``sin t / (sin t + cos t)``. Any shape, any float dtype."""
    return jnp.sin(t) / (jnp.sin(t) + jnp.cos(t))


def trig_time(t_fm: Array) -> Array:
    """Flow time to TrigFlow angle, the inverse of Eq. (6): ``atan2(t_fm, 1 - t_fm)``.

    Accepts flow times slightly above 1, as ``flow_time(MAX_TIME)`` is.
    """
    return jnp.arctan2(t_fm, 1 - t_fm)


def add_noise(x0: Array, z: Array, t: Array) -> Array:
    """TrigFlow noising ``x_t = cos(t) x0 + sin(t) z``.

    Args:
      x0: clean samples [B, ...], standard deviation ``sigma_d``.
      z: noise [B, ...] with the same standard deviation ``sigma_d``.
      t: angles [B] or scalar.
    """
    t = expand(t, x0)
    return jnp.cos(t) * x0 + jnp.sin(t) * z


def predict_x0(x_t: Array, F: Array, t: Array, sigma_d: float) -> Array:
    """The consistency function ``f = cos(t) x_t - sin(t) sigma_d F``, Eq. (4)."""
    t = expand(t, x_t)
    return jnp.cos(t) * x_t - jnp.sin(t) * sigma_d * F


def predict_velocity(x_t: Array, x0: Array, t: Array) -> Array:
    """The TrigFlow velocity ``dx_t/dt = -sin(t) x0 + cos(t) z`` of the line from ``x0`` through ``x_t``.

    Solves ``x_t = cos(t) x0 + sin(t) z`` for ``z``; singular at ``t = 0``, where the line is unknown.
    """
    t = expand(t, x_t)
    return (jnp.cos(t) * x_t - x0) / jnp.sin(t)


def flow_add_noise(latents: Array, noise: Array, t_fm: Array) -> Array:
    """Flow-matching noising, Eq. (1): ``(1 - t_fm) latents + t_fm noise``; unit-variance latents."""
    t_fm = expand(t_fm, latents)
    return (1 - t_fm) * latents + t_fm * noise


def flow_predict_x0(x_fm: Array, v: Array, t_fm: Array) -> Array:
    """Clean latents from a flow velocity ``v = eps - x0``: ``x_fm - t_fm v``."""
    return x_fm - expand(t_fm, x_fm) * v


def _mix(x: Array, t_fm: Array) -> tuple[Array, Array]:
    """``t_fm`` broadcast against ``x``, and ``r = sqrt(t_fm^2 + (1 - t_fm)^2)`` of Prop. 3.1."""
    s = expand(t_fm, x)
    return s, jnp.sqrt(s**2 + (1 - s) ** 2)


def flow_inputs(x: Array, t: Array) -> tuple[Array, Array]:
    """Eqs. (6) and (7): ``(x_t / sigma_d, t)`` to what a flow model takes, ``(x_fm, t_fm)``."""
    t_fm = flow_time(t)
    return x * _mix(x, t_fm)[1], t_fm


def to_trigflow(velocity: Callable[..., Array]) -> Callable[..., Array]:
    """Prop. 3.1: a flow-matching velocity network as a TrigFlow network, exactly and without training.

    With ``t_fm`` from Eq. (6) and ``r = sqrt(t_fm^2 + (1 - t_fm)^2)``:

    * input, Eq. (7): ``x_fm = (x_t / sigma_d) r``, which has the signal-to-noise ratio of ``x_t``;
    * output, Eq. (8): ``F = [(1 - 2 t_fm) x_fm + (1 - 2 t_fm + 2 t_fm^2) v] / r``.

    Args:
      velocity: ``velocity(x_fm, t_fm, *args) -> v`` with ``v`` of the shape of ``x_fm``. If it returns
        a tuple ``(v, ...)``, what follows ``v`` is passed through.

    Returns:
      ``F(x, t, *args)``, where ``x = x_t / sigma_d`` [B, ...] and ``t`` [B] is the angle. It can be
      differentiated in both modes, ``t`` in [0, pi/2] and at ``MAX_TIME`` included.
    """

    def trigflow(x: Array, t: Array, *args):
        x_fm, t_fm = flow_inputs(x, t)
        s, r = _mix(x, t_fm)
        out = velocity(x_fm, t_fm, *args)
        v, *rest = out if isinstance(out, tuple) else (out,)
        F = ((1 - 2 * s) * x_fm + (1 - 2 * s + 2 * s**2) * v) / r
        return (F, *rest) if rest else F

    return trigflow


def to_velocity(F: Callable[..., Array]) -> Callable[..., Array]:
    """The inverse of `to_trigflow`: a TrigFlow network as a flow-matching velocity network.

    Args:
      F: ``F(x, t, *args)`` with ``x = x_t / sigma_d``.

    Returns:
      ``velocity(x_fm, t_fm, *args) -> v``.
    """

    def velocity(x_fm: Array, t_fm: Array, *args):
        s, r = _mix(x_fm, t_fm)
        value = F(x_fm / r, trig_time(t_fm), *args)
        return (r * value - (1 - 2 * s) * x_fm) / (1 - 2 * s + 2 * s**2)

    return velocity


def sample_time(
    key: Array, shape: tuple[int, ...], mean: float, std: float, sigma_d: float
) -> Array:
    """Log-normal proposal over angles: ``t = atan(exp(N(mean, std)) / sigma_d)``, float32 in (0, pi/2).

    The published recipe uses (0.2, 1.6) for the student and (-0.6, 1.0) for the discriminator.
    """
    sigma = jnp.exp(mean + std * jax.random.normal(key, shape, jnp.float32))
    return jnp.arctan(sigma / sigma_d)


def with_max_time(key: Array, t: Array, probability: float, max_time: float = MAX_TIME) -> Array:
    """Max-time weighting: replaces each time by ``max_time`` with the given probability, per sample."""
    return jnp.where(jax.random.bernoulli(key, probability, t.shape), max_time, t)


def sample_flow_time(
    key: Array, shape: tuple[int, ...], mean: float, std: float, shift: float
) -> Array:
    """Logit-normal flow times with the resolution shift ``s' = shift s / (1 + (shift - 1) s)``, float32.

    Continuous, unlike those of the reference (`sample_truncated_flow_time`).
    """
    s = jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))
    return shift_flow_time(s, shift)


def sample_truncated_flow_time(
    key: Array, shape: tuple[int, ...], mean: float, std: float, shift: float
) -> tuple[Array, Array]:
    """Flow times as NVlabs' training draws them, float32: what noises a sample, and what its network is shown.

    ``i = floor(1000 sigmoid(N(mean, std)))`` of a table of 1000: ``s' = shift s / (1 + (shift - 1) s)`` with
    ``s = i / 1000`` mixes the sample, and the network sees ``floor(1000 s') / 1000``: at shift 3, 733 distinct
    values, up to 0.001 below the true ones.

    Returns:
      ``(t, shown)``, of the given shape.
    """
    times = shift_flow_time(np.arange(1000) / 1000, shift)
    shown = np.floor(1000 * times) / 1000
    s = jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))
    index = jnp.minimum((1000 * s).astype(jnp.int32), 999)
    return jnp.asarray(times, jnp.float32)[index], jnp.asarray(shown, jnp.float32)[index]


def shift_flow_time(s: Array, shift: float) -> Array:
    """Moves flow times towards noise: ``shift s / (1 + (shift - 1) s)``; 1 leaves them unchanged."""
    return shift * s / (1 + (shift - 1) * s)


def step_schedule(
    steps: int, max_time: float = MAX_TIME, midpoint: float = 1.3
) -> tuple[float, ...]:
    """Angles of the consistency sampler, from ``max_time`` down to 0; ``steps + 1`` values.

    Two steps go through ``midpoint`` (1.3 in the published scheduler); other counts are equally spaced.

    Raises:
      ValueError: if ``steps`` is not 1, 2, 3 or 4.
    """
    if steps not in (1, 2, 3, 4):
        raise ValueError(f"steps must be 1, 2, 3 or 4, got {steps}")
    if steps == 2:
        return (max_time, midpoint, 0.0)
    return tuple(max_time * (steps - i) / steps for i in range(steps + 1))


def image_schedule(schedule: tuple[float, ...], strength: float) -> tuple[float, ...]:
    """The part of a schedule that changes a given image by ``strength``.

    As diffusers' image-to-image pipeline, the last ``ceil(steps * strength)`` steps. Where that would be all of
    them, and the image would be ignored at any strength (two steps at 0.6, its default), the angles are
    scaled by the strength instead. Strength 1 is the whole schedule.

    Raises:
      ValueError: if ``strength`` is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    steps = len(schedule) - 1
    first = int(steps - steps * strength)
    return schedule[first:] if first else tuple(strength * angle for angle in schedule)
