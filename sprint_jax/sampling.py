"""Samplers: consistency steps for students, ODE solvers for flow-matching teachers.

Pure functions of arrays. Networks come in as functions that hold their text and guidance (`models.functions`):

* ``velocity(x_fm, t_fm)``: flow velocity of x_fm [B, h, w, C] at flow times t_fm [B] in [0, 1];
* ``F(x, t)``: TrigFlow network of x = x_t / sigma_d [B, h, w, C] at angles t [B], such as
  `trigflow.to_trigflow` makes.

Noise is N(0, 1) and results are latents of unit variance: ``sigma_d`` enters and leaves in here.
Arithmetic on samples and times is float32, whatever the network computes in. Every loop is a scan,
so that a network is compiled once for any number of steps; solver coefficients are constants
computed in float64.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from .trigflow import (
    add_noise,
    flow_predict_x0,
    image_schedule,
    predict_x0,
    shift_flow_time,
    step_schedule,
    to_trigflow,
)

Array = jax.Array

SOLVERS = ("dpm", "flow_euler", "trigflow_euler")  # of `draw_teacher`


def noise_for(seed: int | Array, indices: Array, shape: tuple[int, ...]) -> Array:
    """Draws noise of images, not of batches: row ``i`` depends on (seed, indices[i]) alone.

    Args:
      seed: an int, or a typed key of `jax.random.key`.
      indices: [B] non-negative integers, the number of each image in the whole request.
      shape: of one image's noise.

    Returns:
      N(0, 1) float32 of shape [B, *shape].
    """
    key = jax.random.key(seed) if isinstance(seed, (int, np.integer)) else seed

    def draw(index):
        return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)

    return jax.vmap(draw)(jnp.asarray(indices, jnp.uint32))


def with_cfg(
    velocity: Callable, guidance: float | Array, null_text: Array, null_mask: Array
) -> Callable:
    """Classifier-free guidance ``uncond + guidance (cond - uncond)`` by one doubled batch.

    The sum is float32. A TrigFlow network works as well, since F is affine in the velocity.

    Args:
      velocity: ``velocity(x, t, text, mask)``, or F likewise.
      guidance: scalar or [B]; 1 leaves the conditional velocity.
      null_text: features of the null prompt, [L, Ct] or [B, L, Ct].
      null_mask: its mask, [L] or [B, L].

    Returns:
      ``guided(x, t, text, mask)`` of the same shapes, in float32.
    """

    # The two versions of a sample are neighbours, so that each device of a mesh has both in its own rows.
    def double(a, b):
        b = jnp.broadcast_to(b, a.shape).astype(a.dtype)
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    def guided(x, t, text, mask):
        chex.assert_equal_shape_prefix([x, t, text, mask], 1)
        both = velocity(
            double(x, x), double(t, t), double(text, null_text), double(mask, null_mask)
        )
        both = both.astype(jnp.float32).reshape(-1, 2, *both.shape[1:])
        conditional, unconditional = both[:, 0], both[:, 1]
        scale = jnp.asarray(guidance, jnp.float32)
        scale = scale.reshape(scale.shape + (1,) * (x.ndim - 1)) if scale.ndim else scale
        return unconditional + scale * (conditional - unconditional)

    return guided


def draw_student(
    F: Callable,
    noise: Array,
    *,
    steps: int,
    sigma_d: float,
    midpoint: float,
    start: Array | None = None,
    strength: float = 1.0,
    **options,
) -> Array:
    """Draws with a student in 1 to 4 steps, from noise or from images.

    Args:
      steps, midpoint: of `trigflow.step_schedule`.
      start: latents [B, h, w, C] of images to change by ``strength`` (`trigflow.image_schedule`), or None.
      F, noise, sigma_d, options: as in `consistency_sample`.

    Returns:
      Latents [B, h, w, C], float32.
    """
    schedule = student_schedule(steps, midpoint, strength if start is not None else None)
    return consistency_sample(F, noise, schedule=schedule, sigma_d=sigma_d, start=start, **options)


def student_schedule(
    steps: int, midpoint: float, strength: float | None = None
) -> tuple[float, ...]:
    """Angles of a student's steps; with a strength, those that change an image (`image_schedule`)."""
    schedule = step_schedule(steps, midpoint=midpoint)
    return schedule if strength is None else image_schedule(schedule, strength)


def draw_teacher(
    velocity: Callable,
    noise: Array,
    *,
    steps: int,
    sigma_d: float,
    shift: float,
    solver: str = "dpm",
    integer_times: bool = False,
) -> Array:
    """Draws with a teacher by one of the `SOLVERS`; see each for its arguments.

    Returns:
      Latents [B, h, w, C], float32.

    Raises:
      ValueError: for another solver.
    """
    if solver == "dpm":
        times = dict(shift=shift, integer_times=integer_times)
        return dpm_solver_sample(velocity, noise, steps=steps, **times)
    if solver == "flow_euler":
        return flow_euler_sample(velocity, noise, steps=steps, shift=shift)
    if solver == "trigflow_euler":
        F = to_trigflow(velocity)
        return trigflow_euler_sample(F, noise, steps=steps, sigma_d=sigma_d)
    raise ValueError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")


def consistency_sample(
    F: Callable,
    noise: Array,
    *,
    schedule: tuple[float, ...],
    sigma_d: float,
    step_noise: Array | None = None,
    key: Array | None = None,
    start: Array | None = None,
) -> Array:
    """Multistep consistency sampling, the published SANA-Sprint loop (diffusers' SCMScheduler).

    From ``x = sigma_d noise``, or ``sigma_d (cos(u) start + sin(u) noise)``, at each angle u
    ``x0 = cos(u) x - sin(u) sigma_d F(x / sigma_d, u)``
    and then, with fresh noise at the next angle, ``x = cos(u') x0 + sin(u') sigma_d noise'``.

    Args:
      F: ``F(x, t)``; see the module.
      noise: [B, h, w, C], N(0, 1).
      schedule: static angles from `trigflow.step_schedule`, the final 0 included. The first is used
        as it is, slightly above pi/2.
      sigma_d: standard deviation of TrigFlow's data.
      step_noise: [steps - 1, B, h, w, C], the fresh noise, N(0, 1); else drawn from ``key``.
      key: for fresh noise; image i's draws depend on (key, i) only. Not needed for one step.
      start: latents [B, h, w, C] of images to change; the schedule then begins at a smaller angle.

    Returns:
      The last x0 over sigma_d: latents [B, h, w, C], float32.

    Raises:
      ValueError: more than one step has neither step_noise nor a key.
    """
    steps = len(schedule) - 1
    if step_noise is None and steps > 1:
        if key is None:
            raise ValueError(f"{steps} steps need step_noise, or a key to draw it")
        drawn = noise_for(key, jnp.arange(len(noise)), (steps - 1, *noise.shape[1:]))
        step_noise = jnp.moveaxis(drawn, 1, 0)
    elif step_noise is not None:
        chex.assert_shape(step_noise, (steps - 1, *noise.shape))
    if start is not None:
        chex.assert_equal_shape([start, noise])

    x = sigma_d * jnp.asarray(noise, jnp.float32)
    if start is not None:
        x = add_noise(sigma_d * jnp.asarray(start, jnp.float32), x, np.float32(schedule[0]))
    # The last x0 is renoised at angle 0, which does not change a bit of it.
    fresh = jnp.zeros((1, *noise.shape), jnp.float32)
    if steps > 1:
        fresh = jnp.concatenate([jnp.asarray(step_noise, jnp.float32), fresh])
    angles = np.asarray(schedule[:-1], np.float32)
    following = np.append(angles[1:], np.float32(0))

    def step(x, inputs):
        angle, next_angle, z = inputs
        value = F(x / sigma_d, jnp.full(x.shape[:1], angle)).astype(jnp.float32)
        chex.assert_equal_shape([value, x])
        x0 = predict_x0(x, value, angle, sigma_d)
        return add_noise(x0, sigma_d * z, next_angle), None

    x0, _ = jax.lax.scan(step, x, (angles, following, fresh))
    return x0 / sigma_d


def uniform_times(steps: int, shift: float) -> tuple[float, ...]:
    """Flow times from 1 to 0 in equal steps, then shifted towards noise; ``steps + 1`` values."""
    return tuple(float(s) for s in shift_flow_time(np.linspace(1, 0, steps + 1), shift))


def flow_euler_times(steps: int, shift: float) -> tuple[float, ...]:
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler; ``steps + 1`` flow times from 1 to 0.

    The shift acts twice: on the smallest of 1000 training times, and on the equally spaced grid
    down to it. 20 steps at shift 3 are 1, 0.9819, ..., 0.1498, 0.0089, 0. With few steps the last
    but one time is so small that a step is lost: use `uniform_times` there.
    """
    smallest = shift_flow_time(1 / 1000, shift)
    shifted = shift_flow_time(np.linspace(1, smallest, steps), shift)
    return (*(float(s) for s in shifted), 0.0)


def dpm_solver_times(steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """The grid of diffusers' DPMSolverMultistepScheduler with flow sigmas; ``steps + 1`` times.

    It starts below 1, where the solver's log signal-to-noise ratio is finite: 20 steps at shift 3
    are 0.99967, 0.98242, ..., 0.13624, 0.
    """
    sigmas = np.linspace(0.999, 0, steps + 1)
    return tuple(float(s) for s in shift_flow_time(sigmas, shift))


def flow_euler_sample(
    velocity: Callable,
    noise: Array,
    *,
    steps: int,
    shift: float,
    times: tuple[float, ...] | None = None,
) -> Array:
    """Euler's method on ``dx/dt = velocity(x, t)`` from flow time 1 to 0; order 1.

    Args:
      velocity: ``velocity(x_fm, t_fm)``; see the module.
      noise: [B, h, w, C], N(0, 1).
      steps, shift: of `flow_euler_times`; not looked at where ``times`` is given.
      times: static, decreasing flow times, the first and the last included.

    Returns:
      Latents [B, h, w, C], float32.
    """
    grid = np.asarray(times if times is not None else flow_euler_times(steps, shift))

    def step(x, inputs):
        t, change = inputs
        v = velocity(x, jnp.full(x.shape[:1], t)).astype(jnp.float32)
        chex.assert_equal_shape([v, x])
        return x + change * v, None

    inputs = (grid[:-1].astype(np.float32), np.diff(grid).astype(np.float32))
    return jax.lax.scan(step, jnp.asarray(noise, jnp.float32), inputs)[0]


def trigflow_euler_sample(
    F: Callable, noise: Array, *, steps: int, sigma_d: float, shift: float | None = None
) -> Array:
    """Euler's method on TrigFlow's ODE in DDIM form; order 1, exact for data at a single point.

    ``x_{t'} = cos(t - t') x_t - sin(t - t') sigma_d F(x_t / sigma_d, t)``: along the estimated x0
    and noise (Lu and Song, arXiv 2410.11081). At the angles of the same flow times it is
    `flow_euler_sample` in other words; its own equally spaced angles are what differs.

    Args:
      F: ``F(x, t)``; see the module.
      noise: [B, h, w, C], N(0, 1).
      steps: how many.
      sigma_d: standard deviation of TrigFlow's data.
      shift: None for equally spaced angles from pi/2 to 0, else at `uniform_times(steps, shift)`.

    Returns:
      Latents [B, h, w, C], float32.
    """
    if shift is None:
        angles = np.linspace(np.pi / 2, 0, steps + 1)
    else:
        flow = np.asarray(uniform_times(steps, shift))
        angles = np.arctan2(flow, 1 - flow)

    def step(x, inputs):
        angle, turn = inputs
        value = F(x / sigma_d, jnp.full(x.shape[:1], angle)).astype(jnp.float32)
        chex.assert_equal_shape([value, x])
        return predict_x0(x, value, turn, sigma_d), None

    inputs = (angles[:-1].astype(np.float32), (-np.diff(angles)).astype(np.float32))
    x = sigma_d * jnp.asarray(noise, jnp.float32)
    return jax.lax.scan(step, x, inputs)[0] / sigma_d


def dpm_solver_sample(
    velocity: Callable,
    noise: Array,
    *,
    steps: int = 20,
    shift: float = 3.0,
    integer_times: bool = False,
) -> Array:
    """DPM-Solver++(2M), midpoint form, order 2, on flow sigmas (Lu et al., arXiv 2211.01095).

    The same numbers as diffusers' DPMSolverMultistepScheduler(use_flow_sigmas, flow_shift=shift,
    prediction_type='flow_prediction', lower_order_final): first order in the first and last step.

    Args:
      velocity: ``velocity(x_fm, t_fm)``; see the module.
      noise: [B, h, w, C], N(0, 1); the sample at flow time 0.99967, as in diffusers.
      steps, shift: of `dpm_solver_times`.
      integer_times: show the network the time cut to a multiple of 1/1000, as diffusers does (999,
        982, 963, ... of 1000), instead of the solver's. That costs the second order.

    Returns:
      Latents [B, h, w, C], float32.
    """
    sigmas = np.asarray(dpm_solver_times(steps, shift))
    shown = np.floor(sigmas[:-1] * 1000) / 1000 if integer_times else sigmas[:-1]
    return dpm_solver_path(velocity, noise, sigmas, shown)[0]


def dpm_solver_path(
    velocity: Callable, noise: Array, sigmas: np.ndarray | Array, shown: np.ndarray | Array
) -> tuple[Array, Array]:
    """`dpm_solver_sample` at given flow times.

    Args:
      sigmas: [steps + 1] falling flow times, the last one 0; with numpy arrays coefficients are float64.
      shown: [steps], those that the network is shown.

    Returns:
      The end [B, h, w, C], and the points [steps, B, h, w, C] at ``sigmas[:-1]``, the noise first; float32.
    """
    keep, current, previous = _dpm_coefficients(sigmas)
    xp = np if isinstance(sigmas, np.ndarray) else jnp
    table = xp.stack([shown, sigmas[:-1], keep, current, previous], axis=1).astype(jnp.float32)

    def step(carry, row):
        x, previous_x0 = carry
        time, sigma, a, b, c = row
        v = velocity(x, jnp.full(x.shape[:1], time)).astype(jnp.float32)
        chex.assert_equal_shape([v, x])
        x0 = flow_predict_x0(x, v, sigma)
        return (a * x + b * x0 + c * previous_x0, x0), x

    x = jnp.asarray(noise, jnp.float32)
    (end, _), points = jax.lax.scan(step, (x, jnp.zeros_like(x)), table)
    return end, points


def _dpm_coefficients(sigmas):
    """Per step ``(a, b, c)`` of ``x' = a x + b x0 + c previous_x0``.

    With lambda = log(alpha/sigma), h the step in lambda and r the previous step over h:
    ``x' = sigma'/sigma x - alpha' (e^-h - 1) (x0 + (x0 - previous_x0) / (2 r))``.
    """
    xp = np if isinstance(sigmas, np.ndarray) else jnp
    alphas = 1 - sigmas
    with np.errstate(divide="ignore"):
        lambdas = xp.log(alphas) - xp.log(sigmas)  # infinite at the final sigma of 0
    h = xp.diff(lambdas)
    weight = -alphas[1:] * xp.expm1(-h)
    inner = 0.5 * h[1:-1] / h[:-2]
    correction = xp.concatenate([xp.zeros(1), inner, xp.zeros(min(1, len(h) - 1))])
    return sigmas[1:] / sigmas[:-1], weight * (1 + correction), -weight * correction
