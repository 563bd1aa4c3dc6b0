"""Samplers against Gaussian data, whose velocity, solution and consistency function are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sprint_jax import sampling, trigflow

SIGMA_D = 0.5
DEVIATION = 0.7  # of the data, in latents; not 1, or every path is trivial
SHAPE = (3, 2, 2, 4)
NOISE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def flow_variance(t):
    return (1 - t) ** 2 * DEVIATION**2 + t**2


def velocity(x, t):
    """E[eps - x0 | x_t] for x0 ~ N(0, DEVIATION^2)."""
    t = trigflow.expand(t, x)
    return (t - (1 - t) * DEVIATION**2) / flow_variance(t) * x


def flow_solution(x, start):
    """The flow ODE's value at time 0, given ``x`` at ``start``: it scales with the deviation."""
    return x * DEVIATION / np.sqrt(flow_variance(start))


def consistency_F(x, t):
    """The F whose predict_x0 is the exact end of the ODE, for data of deviation DEVIATION sigma_d.

    f(x_t, t) = x_t d / sqrt(d^2 cos^2 + sin^2); F = (cos x_t - f) / (sin sigma_d).
    """
    t = trigflow.expand(t, x)
    scale = DEVIATION / jnp.sqrt((DEVIATION * jnp.cos(t)) ** 2 + jnp.sin(t) ** 2)
    return (jnp.cos(t) - scale) * x / jnp.sin(t)


def error(sample, start=1.0):
    return float(np.abs(np.asarray(sample) - flow_solution(NOISE, start)).max())


def test_grids_are_the_published_ones():
    dpm, euler = (
        np.asarray(f(20, 3.0)) for f in (sampling.dpm_solver_times, sampling.flow_euler_times)
    )
    assert len(dpm) == len(euler) == 21 and dpm[-1] == euler[-1] == 0
    np.testing.assert_allclose(dpm[[0, 19]], [0.99967, 0.13624], atol=5e-6)
    integers = (dpm[:-1] * 1000).astype(int).tolist()
    assert integers[:4] == [999, 982, 963, 944] and integers[-2:] == [249, 136]
    published = [1, 0.9819, 0.9624, 0.1498, 0.0089]
    np.testing.assert_allclose(euler[[0, 1, 2, 18, 19]], published, atol=5e-5)
    assert sampling.uniform_times(2, 3.0) == pytest.approx((1.0, 0.75, 0.0))
    assert sampling.uniform_times(4, 1.0) == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))


@pytest.mark.parametrize("integer_times", [False, True])
def test_dpm_solver_shows_the_network_the_times_it_promises(integer_times):
    seen = []

    def network(x, t):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t, ordered=True)
        return velocity(x, t)

    sampling.dpm_solver_sample(network, NOISE, steps=20, integer_times=integer_times)
    jax.effects_barrier()
    exact = np.asarray(sampling.dpm_solver_times(20))[:-1]
    expected = np.floor(1000 * exact) / 1000 if integer_times else exact
    np.testing.assert_allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_consistency_sampler_is_exact_with_the_exact_function(steps):
    """Its x0 is the end of the ODE from wherever the sample was noised to."""
    step_noise = np.random.default_rng(1).standard_normal((steps - 1, *SHAPE)).astype(np.float32)
    schedule = trigflow.step_schedule(steps)
    result = sampling.consistency_sample(
        consistency_F, NOISE, schedule=schedule, sigma_d=SIGMA_D, step_noise=step_noise
    )
    x0 = flow_solution(NOISE.astype(np.float64), 1.0)
    for angle, z in zip(schedule[1:-1], step_noise, strict=True):
        x = np.cos(angle) * x0 + np.sin(angle) * z
        x0 = x * DEVIATION / np.sqrt((DEVIATION * np.cos(angle)) ** 2 + np.sin(angle) ** 2)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, x0, atol=2e-5)


EULERS = {
    "flow": (lambda n: (velocity, dict(times=sampling.uniform_times(n, 3.0))), 0.08),
    "published grid": (lambda n: (velocity, {}), 0.12),
    "angles": (lambda n: (trigflow.to_trigflow(velocity), dict(shift=None)), 0.08),
    "trigflow": (lambda n: (trigflow.to_trigflow(velocity), {}), 0.08),
}


def euler(name, steps):
    network, how = EULERS[name][0](steps)
    how = dict(steps=steps, shift=3.0) | how
    if name in ("angles", "trigflow"):
        return sampling.trigflow_euler_sample(network, NOISE, sigma_d=SIGMA_D, **how)
    return sampling.flow_euler_sample(network, NOISE, **how)


@pytest.mark.parametrize("name", EULERS)
def test_euler_methods_are_first_order(name):
    errors = [error(euler(name, steps)) for steps in (16, 32, 64)]
    assert errors[2] < EULERS[name][1]  # of samples up to 2
    assert all(1.7 < coarse / fine < 2.5 for coarse, fine in itertools.pairwise(errors))


def test_both_euler_methods_are_one_on_the_same_times():
    np.testing.assert_allclose(euler("trigflow", 5), euler("flow", 5), atol=5e-6)


def test_trigflow_euler_is_exact_for_one_point():
    """Data at a point c: x0 is known everywhere, so one step is enough."""
    point = 0.3

    def F(x, t):  # predict_x0 gives sigma_d * point
        t = trigflow.expand(t, x)
        return (jnp.cos(t) * x - point) / jnp.sin(t)

    for steps in (1, 3):
        result = sampling.trigflow_euler_sample(F, NOISE, steps=steps, sigma_d=SIGMA_D)
        np.testing.assert_allclose(result, point, atol=2e-6)


def test_dpm_solver_is_second_order():
    start = sampling.dpm_solver_times(1)[0]

    def at(steps):
        return error(sampling.dpm_solver_sample(velocity, NOISE, steps=steps), start)

    # Steps in log signal-to-noise are long near both ends: errors quarter only with many of them.
    errors = [at(steps) for steps in (320, 640, 1280)]
    assert errors[2] < 1e-4
    assert all(3.2 < coarse / fine < 4.5 for coarse, fine in itertools.pairwise(errors))
    assert at(20) < error(euler("published grid", 20)) / 10


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_dpm_solver_equals_its_recurrence_written_out(steps):
    """The update as the paper writes it, in float64, against the scan of coefficients."""
    sigmas = np.asarray(sampling.dpm_solver_times(steps))
    x, before = NOISE.astype(np.float64), None
    for i in range(steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        x0 = x - sigma * np.asarray(velocity(x, np.float64(sigma)))
        if i == steps - 1:
            x = x0
            break
        h = np.log((1 - following) / following) - np.log((1 - sigma) / sigma)
        direction = x0
        if i > 0:
            earlier = sigmas[i - 1]
            r = (np.log((1 - sigma) / sigma) - np.log((1 - earlier) / earlier)) / h
            direction = x0 + (x0 - before) / (2 * r)
        x = following / sigma * x - (1 - following) * (np.exp(-h) - 1) * direction
        before = x0
    found = sampling.dpm_solver_sample(velocity, NOISE, steps=steps)
    np.testing.assert_allclose(found, x, atol=5e-6)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_dpm_solver_path_of_traced_times_equals_that_of_constants(steps):
    sigmas = np.asarray(sampling.dpm_solver_times(steps))
    end, points = sampling.dpm_solver_path(velocity, NOISE, sigmas, sigmas[:-1])
    assert points.shape == (steps, *SHAPE)
    np.testing.assert_array_equal(points[0], NOISE)
    run = jax.jit(lambda times: sampling.dpm_solver_path(velocity, NOISE, times, times[:-1]))
    found = run(jnp.asarray(sigmas, jnp.float32))
    # Differences of logarithms in float32.
    for mine, other in zip(found, (end, points), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_with_cfg_is_one_doubled_batch():
    calls = []

    def network(x, t, text, mask):
        calls.append(x.shape)
        told = (text * mask[..., None]).sum((1, 2))
        return (x * trigflow.expand(t, x) + trigflow.expand(told, x)).astype(jnp.bfloat16)

    rng = np.random.default_rng(0)
    text = rng.standard_normal((3, 5, 6)).astype(np.float32)
    mask = np.ones((3, 5), np.int32)
    null_text = rng.standard_normal((5, 6)).astype(np.float32)
    null_mask = np.eye(5, dtype=np.int32)[0]
    t = np.linspace(0.1, 0.9, 3).astype(np.float32)
    guidance = np.asarray([1.0, 0.0, 3.0], np.float32)
    result = sampling.with_cfg(network, guidance, null_text, null_mask)(NOISE, t, text, mask)
    assert calls == [(6, *SHAPE[1:])] and result.dtype == jnp.float32
    conditional = np.asarray(network(NOISE, t, text, mask), np.float32)
    empty = (np.broadcast_to(null_text, text.shape), np.broadcast_to(null_mask, mask.shape))
    unconditional = np.asarray(network(NOISE, t, *empty), np.float32)
    np.testing.assert_allclose(result[0], conditional[0], atol=1e-6)
    np.testing.assert_allclose(result[1], unconditional[1], atol=1e-6)
    np.testing.assert_allclose(result[2], 3 * conditional[2] - 2 * unconditional[2], atol=2e-6)
    scalar = sampling.with_cfg(network, 3.0, null_text, null_mask)(NOISE, t, text, mask)
    np.testing.assert_array_equal(scalar[2], result[2])


def test_noise_belongs_to_the_image_and_not_to_its_batch():
    whole = sampling.noise_for(7, np.arange(6), (2, 2, 4))
    some = sampling.noise_for(7, np.asarray([4, 1]), (2, 2, 4))
    np.testing.assert_array_equal(some, whole[jnp.asarray([4, 1])])
    assert np.abs(np.asarray(whole[0] - whole[1])).min() > 0
    assert np.abs(np.asarray(whole - sampling.noise_for(8, np.arange(6), (2, 2, 4)))).min() > 0
    by_key = sampling.noise_for(jax.random.key(7), np.arange(6), (2, 2, 4))
    np.testing.assert_array_equal(whole, by_key)


def test_step_noise_equals_the_key_that_draws_it_and_images_do_not_meet():
    key, schedule = jax.random.key(5), trigflow.step_schedule(3)
    drawn = sampling.noise_for(key, np.arange(3), (2, *SHAPE[1:]))
    F = trigflow.to_trigflow(velocity)
    run = dict(schedule=schedule, sigma_d=SIGMA_D)
    by_key = sampling.consistency_sample(F, NOISE, key=key, **run)
    given = sampling.consistency_sample(F, NOISE, step_noise=jnp.moveaxis(drawn, 1, 0), **run)
    np.testing.assert_array_equal(by_key, given)
    fewer = sampling.consistency_sample(F, NOISE[:2], key=key, **run)
    np.testing.assert_allclose(fewer, by_key[:2], atol=1e-6)
    other = sampling.consistency_sample(F, NOISE, key=jax.random.key(6), **run)
    assert np.abs(np.asarray(other - by_key)).max() > 0.1


def test_wrong_step_noise_is_named():
    run = dict(schedule=trigflow.step_schedule(3), sigma_d=SIGMA_D)
    wrong = {"step_noise": np.zeros((1, *SHAPE))}
    for given, named in ((wrong, r"\(2, 3, 2, 2, 4\)"), ({}, "step_noise")):
        with pytest.raises((ValueError, AssertionError), match=named):
            sampling.consistency_sample(consistency_F, NOISE, **given, **run)


def test_every_sampler_traces_the_network_once():
    """Loop bodies are compiled once however many steps there are."""
    traces = []

    def counted(x, t):
        traces.append(t.shape)
        return velocity(x, t)

    sampling.dpm_solver_sample(counted, NOISE, steps=20)
    sampling.flow_euler_sample(counted, NOISE, steps=20, shift=3.0)
    sampling.trigflow_euler_sample(counted, NOISE, steps=20, sigma_d=SIGMA_D)
    sampling.consistency_sample(
        counted, NOISE, schedule=trigflow.step_schedule(4), sigma_d=SIGMA_D, key=jax.random.key(0)
    )
    assert traces == [(3,)] * 4
