"""TrigFlow against closed forms: float64 where the mathematics is exact, moments for the samplers."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from sprint_jax import trigflow
from sprint_jax.training import draws

SIGMA_D = 0.5
MEAN, SPREAD = 0.3, 1.7  # of the Gaussian latents; far from 0 and 1 so that no term cancels
TIMES = np.concatenate([np.linspace(0, math.pi / 2, 41), [trigflow.MAX_TIME, 1e-6, 1.3]])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def close(got, want, atol):
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def flow_optimum(x_fm, t_fm):
    """E[eps - latents | x_fm] for latents N(MEAN, SPREAD^2), by regression of one on the other."""
    s = t_fm.reshape(-1, 1, 1, 1)
    covariance = s - (1 - s) * SPREAD**2
    variance = s**2 + (1 - s) ** 2 * SPREAD**2
    return -MEAN + covariance / variance * (x_fm - (1 - s) * MEAN)


def trigflow_optimum(x, t):
    """E[cos(t) eps - sin(t) latents | x = cos(t) latents + sin(t) eps], same Gaussian."""
    t = t.reshape(-1, 1, 1, 1)
    covariance = jnp.cos(t) * jnp.sin(t) * (1 - SPREAD**2)
    variance = jnp.cos(t) ** 2 * SPREAD**2 + jnp.sin(t) ** 2
    return -jnp.sin(t) * MEAN + covariance / variance * (x - jnp.cos(t) * MEAN)


def samples(seed=0):
    random = np.random.default_rng(seed)
    shape = (len(TIMES), 2, 3, 2)
    return [jnp.asarray(random.standard_normal(shape)) for _ in range(3)]


def test_optimal_flow_becomes_the_optimal_trigflow_in_float32_too(float64):
    for dtype, error in ((jnp.float64, 1e-10), (jnp.float32, 5e-6)):
        x, t = samples()[0].astype(dtype), jnp.asarray(TIMES, dtype)
        F = jax.jit(trigflow.to_trigflow(flow_optimum))(x, t)
        assert F.dtype == dtype
        close(F, trigflow_optimum(x, t), error)


def test_derivatives_through_the_transform(float64):
    x, dx, cotangent = samples()
    t, dt = jnp.asarray(TIMES), jnp.cos(3 * jnp.asarray(TIMES))
    transformed, h = trigflow.to_trigflow(flow_optimum), 1e-5

    def derivatives(F):
        back = jax.grad(lambda *a: jnp.vdot(F(*a), cotangent), argnums=(0, 1))(x, t)
        return jax.jvp(F, (x, t), (dx, dt))[1], *back

    ours = jax.jit(derivatives, static_argnums=0)(transformed)
    chex.assert_trees_all_close(ours, derivatives(trigflow_optimum), rtol=0, atol=1e-10)
    difference = transformed(x + h * dx, t + h * dt) - transformed(x - h * dx, t - h * dt)
    close(ours[0], difference / (2 * h), 1e-6)


def test_to_velocity_inverts(float64):
    x, t_fm = samples()[0], trigflow.flow_time(jnp.asarray(TIMES))
    for F in (trigflow.to_trigflow(flow_optimum), trigflow_optimum):
        close(trigflow.to_velocity(F)(x, t_fm), flow_optimum(x, t_fm), 1e-10)


def test_arguments_and_further_outputs_pass_through():
    def velocity(x, t, text, mask):
        return x * text + trigflow.expand(t, x), mask, t

    x, t, text, mask = jnp.ones((2, 2, 2, 1)), jnp.array([0.2, 1.0]), jnp.float32(3), jnp.arange(2)
    F, other, t_fm = trigflow.to_trigflow(velocity)(x, t, text, mask)
    alone = trigflow.to_trigflow(lambda *a: velocity(*a)[0])(x, t, text, mask)
    np.testing.assert_array_equal(F, alone)
    np.testing.assert_array_equal(other, mask)
    np.testing.assert_allclose(t_fm, np.sin(t) / (np.sin(t) + np.cos(t)), rtol=1e-6)


def test_times_invert_each_other(float64):
    t = jnp.asarray(TIMES)
    close(trigflow.trig_time(trigflow.flow_time(t)), t, 1e-14)
    s = jnp.linspace(0, 1, 33)
    close(trigflow.flow_time(trigflow.trig_time(s)), s, 1e-14)


def test_flow_inputs_are_the_flow_noising_of_the_same_noise(float64):
    latents, noise, _ = samples()
    t = jnp.asarray(TIMES)
    x_t = trigflow.add_noise(SIGMA_D * latents, SIGMA_D * noise, t)
    x_fm, t_fm = trigflow.flow_inputs(x_t / SIGMA_D, t)
    expected = trigflow.flow_add_noise(latents, noise, t_fm)
    close(x_fm, expected, 1e-14)
    s = np.asarray(t_fm).reshape(-1, 1, 1, 1)
    close(expected, (1 - s) * latents + s * noise, 1e-14)


def test_noising_and_predictions_are_consistent(float64):
    x0, z = (SIGMA_D * x for x in samples()[:2])
    t = jnp.asarray(TIMES)
    cos, sin = (np.reshape(f(TIMES), (-1, 1, 1, 1)) for f in (np.cos, np.sin))
    x_t = trigflow.add_noise(x0, z, t)
    close(x_t, cos * x0 + sin * z, 1e-15)
    F = (cos * z - sin * x0) / SIGMA_D  # the true velocity of this line
    close(trigflow.predict_x0(x_t, F, t, SIGMA_D), x0, 1e-14)
    inside = TIMES > 0
    velocity = trigflow.predict_velocity(x_t[inside], x0[inside], t[inside])
    close(velocity, (SIGMA_D * F)[inside], 1e-9)
    t_fm = trigflow.flow_time(t)
    x_fm = trigflow.flow_add_noise(x0, z, t_fm)
    close(trigflow.flow_predict_x0(x_fm, z - x0, t_fm), x0, 1e-14)
    scalar = trigflow.add_noise(x0, z, 1.3)
    close(scalar, math.cos(1.3) * x0 + math.sin(1.3) * z, 1e-15)


@pytest.mark.parametrize(
    ("steps", "angles", "flow_times"),
    [
        (1, [1.5708, 0], [1.0000036]),
        (2, [1.5708, 1.3, 0], [1.0000036, 0.782708]),
        (3, [1.5708, 1.0472, 0.5236, 0], [1.0000036, 0.633976, 0.366026]),
        (4, [1.5708, 1.1781, 0.7854, 0.3927, 0], [1.0000036, 0.707108, 0.500001, 0.292894]),
    ],
)
def test_published_schedules(steps, angles, flow_times):
    schedule = trigflow.step_schedule(steps)
    close(schedule, angles, 1e-12)
    actual = np.asarray(trigflow.flow_time(jnp.asarray(schedule[:-1], jnp.float32)))
    close(actual, flow_times, 6e-7)
    assert abs(float(actual[0]) - 1.0000036) < 1.2e-7  # one float32 spacing


def test_max_time_is_not_clamped():
    t = jnp.float32(trigflow.MAX_TIME)
    assert trigflow.MAX_TIME == 1.57080 and float(t) > math.pi / 2
    assert float(jnp.cos(t)) == pytest.approx(-3.62e-6, abs=5e-8)
    # Both the input scale and the step back to angles keep what is above 1.
    x_fm, t_fm = trigflow.flow_inputs(jnp.ones((1, 1, 1, 1)), t[None])
    assert t_fm[0] == trigflow.flow_time(t) > 1 and x_fm[0, 0, 0, 0] > 1
    assert float(trigflow.trig_time(t_fm)[0]) > math.pi / 2


def assert_normal(values, mean, std):
    """The largest distance of distribution functions, which knows the mean to 0.04 deviations."""
    values = np.sort(np.asarray(values))
    cdf = np.array([0.5 * math.erfc(-(v - mean) / std / math.sqrt(2)) for v in values])
    assert np.abs(cdf - (np.arange(len(cdf)) + 0.5) / len(cdf)).max() < 2 / math.sqrt(len(cdf))


def test_times_have_the_distributions_of_the_paper():
    for mean, std in ((0.2, 1.6), (-0.6, 1.0)):
        t = trigflow.sample_time(jax.random.key(0), (20_000,), mean, std, SIGMA_D)
        assert t.dtype == jnp.float32 and 0 < t.min() < t.max() < math.pi / 2
        assert_normal(np.log(SIGMA_D * np.tan(np.asarray(t, np.float64))), mean, std)
    for shift in (1.0, 3.0):
        s = trigflow.sample_flow_time(jax.random.key(1), (20_000,), 0.1, 0.9, shift)
        assert s.dtype == jnp.float32 and 0 < s.min() < s.max() < 1
        s = np.asarray(s, np.float64)
        unshifted = s / (shift - (shift - 1) * s)
        assert_normal(np.log(unshifted / (1 - unshifted)), 0.1, 0.9)
        assert len(np.unique(s)) > 19_000  # continuous, not the reference's 733 values
    assert trigflow.shift_flow_time(0.5, 3.0) == 0.75


def distance(a, b):
    """Kolmogorov-Smirnov: the largest difference of two samples' distribution functions."""
    points = np.union1d(a, b)
    shares = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return np.abs(shares[0] - shares[1]).max()


def test_truncated_flow_times_are_those_of_the_reference():
    """Against its index form in float64: i = floor(1000 sigmoid(n)), sigma = i/1000 shifted, integer times."""
    count, shift = 100_000, 3.0
    t, shown = trigflow.sample_truncated_flow_time(jax.random.key(4), (count,), 0.0, 1.0, shift)
    assert t.dtype == shown.dtype == jnp.float32
    t, shown = np.asarray(t, np.float64), np.asarray(shown, np.float64)
    sigmas = np.arange(1000) / 1000
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    assert len(np.unique((1000 * sigmas).astype(int))) == 733
    index = np.abs(sigmas[None] - t[:500, None]).argmin(1)
    close(t[:500], sigmas[index], 2e-7)
    close(shown[:500], np.floor(1000 * sigmas[index]) / 1000, 2e-7)
    assert len(np.unique(shown)) <= 733
    assert (shown <= t + 1e-7).all() and (t - shown).max() < 0.001

    random = np.random.default_rng(0)
    n = np.floor(1000 / (1 + np.exp(-random.normal(size=count)))).astype(int)
    theirs = sigmas[n]
    exact = np.asarray(trigflow.sample_flow_time(jax.random.key(5), (count,), 0.0, 1.0, shift))
    # Two-sample Kolmogorov-Smirnov, 0.1 % level: 1.95 sqrt(2 / n). Continuous times lie up to 0.003 higher.
    limit = 1.95 * math.sqrt(2 / count)
    assert distance(t, theirs) < limit
    assert distance(exact, theirs) < limit + 0.003
    assert distance(exact, t**1.1) > 3 * limit  # it can fail


@pytest.mark.parametrize("truncate", [False, True])
def test_training_shows_the_network_truncated_times_if_it_is_told_to(truncate):
    c = default.get_config()
    c.flow.shift, c.flow.truncate_times = 3.0, truncate
    t, shown = draws.draw_flow_time(c, jax.random.key(6), jnp.zeros((2000, 1, 1, 1)))
    t, shown = np.asarray(t, np.float64), np.asarray(shown, np.float64)
    if not truncate:
        np.testing.assert_array_equal(t, shown)
    else:
        np.testing.assert_allclose(1000 * shown, np.rint(1000 * shown), atol=1e-4)
        assert (t - shown).max() > 5e-4


def test_a_flow_map_jumps_between_two_logit_normal_times_or_nowhere():
    c = default.get_config()
    c.meanflow.same_time = 0.3
    t, target = draws.draw_jump(c, jax.random.key(6), jnp.zeros((20_000, 1, 1, 1)))
    t, target = np.asarray(t, np.float64), np.asarray(target, np.float64)
    assert (target <= t).all() and abs((target == t).mean() - 0.3) < 0.01
    logits = np.log(np.stack([t, target]) / (1 - np.stack([t, target])))[:, target < t]
    # The larger and the smaller of two normal draws: together they are as those draws.
    assert abs(logits.mean() + 0.4) < 0.02 and abs(logits.std() - 1) < 0.02


def test_a_path_has_falling_times_of_its_own():
    c = default.get_config()
    for i in range(20):
        times = np.asarray(draws.draw_path(c, jax.random.key(i)))
        assert len(times) == c.trajectory.steps + 1 and times[-1] == 0 and 0.999 < times[0] < 1
        assert (np.diff(times) < 0).all()
    assert len({float(draws.draw_path(c, jax.random.key(i))[3]) for i in range(20)}) == 20


def test_max_time_replaces_with_its_probability():
    t = jnp.linspace(0.1, 1.5, 40_000)
    mixed = np.asarray(trigflow.with_max_time(jax.random.key(2), t, 0.3))
    replaced = mixed == np.float32(trigflow.MAX_TIME)
    assert abs(replaced.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / t.size)
    np.testing.assert_array_equal(mixed[~replaced], t[~replaced])
    # Per sample and independent: neighbours are both replaced with probability 0.09.
    both = (replaced[1:] & replaced[:-1]).mean()
    assert abs(both - 0.09) < 5 * math.sqrt(0.09 * 0.91 / t.size) * 1.5
    np.testing.assert_array_equal(trigflow.with_max_time(jax.random.key(2), t, 0.0), t)
    assert bool((trigflow.with_max_time(jax.random.key(2), t, 1.0, max_time=1.2) == 1.2).all())


def test_schedule_options_and_errors():
    one, two, four = (trigflow.step_schedule(steps) for steps in (1, 2, 4))
    assert trigflow.step_schedule(2, midpoint=1.0) == (trigflow.MAX_TIME, 1.0, 0.0)
    assert trigflow.step_schedule(1, max_time=1.5) == (1.5, 0.0)
    # From an image: diffusers' own, where it uses the image.
    assert trigflow.image_schedule(two, 0.5) == (1.3, 0.0)
    for strength, first in ((0.1, 3), (0.5, 2), (1.0, 0)):
        assert trigflow.image_schedule(four, strength) == four[first:]
    # Where it would start from noise alone, with two steps at its default strength.
    close(trigflow.image_schedule(two, 0.6), (0.6 * 1.5708, 0.78, 0), 1e-12)
    close(trigflow.image_schedule(one, 0.3)[0], 0.47124, 1e-12)
    for call, values in {
        trigflow.step_schedule: (0, 5, -1),
        lambda strength: trigflow.image_schedule(two, strength): (0, -0.1, 1.01, float("nan")),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"got {value}"):
                call(value)
