"""Building and averaging parameters, accumulating gradients, and the diagnostics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tiny_sana import apply, cast, setup

from sprint_jax.core.errors import UserError
from sprint_jax.training import accumulate, diagnostics, state
from sprint_jax.training.state import TrainState

# --- overlay


def test_student_starts_as_its_teacher():
    """What the teacher has comes from it; the guidance embedder and the logvar head stay fresh."""
    fields, params, inputs = setup()
    fresh = jax.tree.map(lambda leaf: jnp.asarray(0.5 * leaf, jnp.float32), params)
    guided = fresh["time_embed"]["guidance_embedder"]["linear_2"]
    guided.update(jax.tree.map(jnp.zeros_like, guided))
    teacher = dict(cast(params, jnp.float32))
    del teacher["logvar_linear"]
    teacher["time_embed"] = dict(teacher["time_embed"])
    del teacher["time_embed"]["guidance_embedder"]

    student = state.overlay(fresh, teacher, "teacher")
    assert jax.tree.structure(student) == jax.tree.structure(fresh)
    for part in ("logvar_linear", "time_embed"):
        mine = student[part] if part == "logvar_linear" else student[part]["guidance_embedder"]
        first = fresh[part] if part == "logvar_linear" else fresh[part]["guidance_embedder"]
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), mine, first))
    velocity = apply(fields, student, inputs)
    plain = fields | dict(guidance_embeds=False, logvar=False)
    np.testing.assert_array_equal(velocity, apply(plain, teacher, (*inputs[:4], None)))


def test_overlay_takes_values_and_keeps_dtypes():
    fresh = {"a": {"kernel": jnp.zeros((2, 3))}, "b": jnp.ones(4)}
    result = state.overlay(fresh, {"a": {"kernel": np.full((2, 3), 7, np.float64)}}, "x")
    assert result["a"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(result["a"]["kernel"], 7)
    np.testing.assert_array_equal(result["b"], 1)
    np.testing.assert_array_equal(fresh["a"]["kernel"], 0)


def test_overlay_errors_name_the_leaf():
    fresh = {"a": {"kernel": jnp.zeros((2, 3))}, "b": jnp.ones(4)}
    with pytest.raises(UserError, match=r"runs/teacher.*kernel.*\(3, 2\).*\(2, 3\)"):
        state.overlay(fresh, {"a": {"kernel": jnp.zeros((3, 2))}}, "runs/teacher")
    with pytest.raises(UserError, match=r"runs/teacher.*bias"):
        state.overlay(fresh, {"a": {"bias": jnp.zeros(3)}}, "runs/teacher")


# --- EMA, updates


def test_ema_ramp():
    """decay_t = min(decay, (1 + t) / (10 + t)): 0.1 at the first update, then up to the decay."""
    ema = {"w": jnp.array([1.0, -2.0])}
    params = {"w": jnp.array([3.0, 5.0])}
    for step, decay in [(0, 0.1), (1, 2 / 11), (90, 0.91), (10**6, 0.99)]:
        result = state.ema_update(ema, params, 0.99, jnp.int32(step))["w"]
        expected = decay * ema["w"] + (1 - decay) * params["w"]
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
        assert result.dtype == jnp.float32


def test_ema_of_constant_params_converges_and_forgets_the_start():
    step = jax.jit(lambda e, i: state.ema_update(e, jnp.float32(2.0), 0.999, i))
    average = jnp.float32(100.0)
    for i in range(30):
        average = step(average, i)
    # The product of the decays is prod (1 + i) / (10 + i) = 30! 9! / 39!.
    left = math.factorial(30) * math.factorial(9) / math.factorial(39)
    assert float(average) == pytest.approx(2 + 98 * left, rel=1e-6)


@pytest.mark.parametrize("bad", [None, "loss", "gradients"])
@pytest.mark.parametrize("which", [0, 1], ids=["student", "heads"])
def test_an_update_that_is_not_finite_changes_the_counters_alone(which, bad):
    optimizer, params, zero = optax.adam(0.1), {"w": jnp.arange(3.0)}, jnp.int32(0)
    moments, vectors = optimizer.init(params), {"u": jnp.ones(2)}
    disc = {"params": params, "spectral": vectors}
    before = TrainState(zero, params, params, moments, disc, moments, zero, jnp.array([4, 5]))
    value = jnp.float32(jnp.nan if bad == "loss" else 1)
    grads = {"w": jnp.array([1.0, jnp.inf if bad == "gradients" else 2, 3])}
    how = {"spectral": {"u": jnp.zeros(2)}} if which else {"ema_decay": 0.5}
    after, metrics = jax.jit(lambda *args: state.apply_gradients(optimizer, *args, **how))(
        before, value, grads
    )
    assert int(after.step) == 1 - which and int(after.skipped) == bool(bad)
    counts = [4, 5]
    counts[which] = counts[which] + 1 if bad else 0
    assert list(after.in_a_row) == counts
    if bad == "gradients":
        assert not np.isfinite(metrics["grad/heads" if which else "grad/student"])
    parts = [{"params", "ema", "opt_state"}, {"disc", "disc_opt_state"}]
    kept = {
        name
        for name in parts[0] | parts[1]
        if jax.tree.all(jax.tree.map(np.array_equal, getattr(after, name), getattr(before, name)))
    }
    assert kept == parts[1 - which] | (parts[which] if bad else set())


# --- accumulate


def quadratic(params, batch, key):
    error = jnp.square(batch["x"] @ params["w"] + params["b"] - batch["y"])
    return error.mean(), {"error": error, "row": batch["row"]}


def draw_problem():
    random = np.random.default_rng(0)
    params = {"w": jnp.asarray(random.standard_normal(3), jnp.float32), "b": jnp.float32(0.4)}
    x, y = random.standard_normal((12, 3)), random.standard_normal(12)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    return params, batch | {"row": jnp.arange(12)}


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_accumulated_gradients_equal_the_full_batch(parts):
    params, batch = draw_problem()
    value, aux, gradient = jax.jit(
        lambda *a: accumulate.gradients([quadratic], *a, jax.random.key(0), parts)
    )(params, batch)
    x, y = np.asarray(batch["x"], np.float64), np.asarray(batch["y"], np.float64)
    residual = x @ np.asarray(params["w"]) + float(params["b"]) - y
    assert float(value) == pytest.approx((residual**2).mean(), rel=1e-6)
    np.testing.assert_allclose(gradient["w"], 2 * residual @ x / 12, rtol=1e-5)
    assert float(gradient["b"]) == pytest.approx(2 * residual.mean(), rel=1e-5)
    np.testing.assert_allclose(aux["error"], residual**2, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(aux["row"], np.arange(12))


def test_each_microbatch_has_its_own_key():
    params, batch = draw_problem()

    def noisy(params, batch, key):
        noise = jax.random.normal(key, batch["y"].shape)
        return (params["b"] * noise).mean(), {"noise": noise}

    key = jax.random.key(3)
    for parts in (1, 3):
        _, aux, gradient = accumulate.gradients([noisy], params, batch, key, parts)
        count = 12 // parts
        expected = [jax.random.normal(jax.random.fold_in(key, i), (count,)) for i in range(parts)]
        # Microbatch i holds the rows i, i + parts, i + 2 parts, ...
        np.testing.assert_array_equal(aux["noise"], jnp.stack(expected, axis=1).ravel())
        mean = float(jnp.concatenate(expected).mean())
        assert float(gradient["b"]) == pytest.approx(mean, rel=1e-5)


# --- diagnostics


def test_time_bins():
    width = math.pi / 16
    # The ends belong to the first and last bins, and so does what lies beyond, as MAX_TIME does.
    t = jnp.array([0.0, 0.5 * width, 2.5 * width, 2.9 * width, math.pi / 2, 1.5708])
    values = jnp.array([1.0, 3.0, 10.0, 20.0, 5.0, 9.0])
    expected = [2, np.nan, 15, np.nan, np.nan, np.nan, np.nan, 7]
    np.testing.assert_allclose(diagnostics.time_bins(t, values), expected, rtol=1e-6)
    named = diagnostics.binned("loss", t, values)
    assert list(named) == [f"loss/t{i}" for i in range(8)]
    assert float(named["loss/t7"]) == 7
    limited = diagnostics.time_bins(jnp.array([0.05, 0.99]), jnp.array([1.0, 2.0]), 1.0)
    assert (float(limited[0]), float(limited[7])) == (1, 2)


def test_a_bad_sample_shows_in_its_bin_only():
    t, values = jnp.array([0.1, 0.8]), jnp.array([2.0, jnp.inf])
    bins = np.asarray(diagnostics.time_bins(t, values))
    assert bins[4] == np.inf
    assert bins[0] == 2


def tangent_problem(slope=1.0):
    """F whose jvp is multiplied by ``slope``: 1 is right, anything else a broken derivative."""

    @jax.custom_jvp
    def F(x, t):
        return jnp.sin(x) * jnp.cos(t)[:, None, None, None]

    @F.defjvp
    def F_jvp(primals, tangents):
        (x, t), (dx, dt) = primals, tangents
        time, dtime = t[:, None, None, None], dt[:, None, None, None]
        tangent = jnp.cos(x) * jnp.cos(time) * dx - jnp.sin(x) * jnp.sin(time) * dtime
        return F(x, t), slope * tangent

    random = np.random.default_rng(0)
    x, dx = (jnp.asarray(random.standard_normal((3, 4, 4, 2)), jnp.float32) for _ in range(2))
    return F, x, jnp.array([0.3, 0.8, 1.2]), dx, jnp.array([0.2, 0.3, 0.1])


def test_tangent_checks_tell_right_from_wrong():
    F, *inputs = tangent_problem()
    checks = diagnostics.tangent_checks(F, F, *inputs)
    assert set(checks) == {"check/jvp", "check/bfloat16_tangent"}
    assert 0 < float(checks["check/jvp"]) < 3e-4
    assert float(checks["check/bfloat16_tangent"]) == 0
    wrong = tangent_problem(1.25)[0]
    checks = diagnostics.tangent_checks(wrong, F, *inputs)
    # The jvp is 1.25 of the truth: 0.25 / 1.25 off, relative to itself, both ways.
    assert float(checks["check/jvp"]) == pytest.approx(0.2, abs=1e-3)
    assert float(checks["check/bfloat16_tangent"]) == pytest.approx(0.2, abs=1e-5)
