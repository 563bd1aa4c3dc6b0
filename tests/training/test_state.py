"""Building and averaging parameters, accumulating gradients, and the diagnostics."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.refusals import refuse
from helpers.runs import tiny
from helpers.tiny_sana import apply, cast, setup
from helpers.workdirs import make_workdir, random_params, tiny_config

from sprint_jax.core.errors import UserError
from sprint_jax.interop.sana import example_inputs
from sprint_jax.models.sana import from_fields
from sprint_jax.parallel.sharding import make_mesh
from sprint_jax.training import accumulate, diagnostics, state
from sprint_jax.training.setup import build_nets, check_start, init_state

# --- Parameters


def test_student_starts_as_its_teacher():
    """What the teacher has comes from it; the guidance embedder and the logvar head stay fresh."""
    fields, params, inputs = setup()
    fresh = jax.tree.map(lambda leaf: jnp.asarray(0.5 * leaf, jnp.float32), params)
    embedder = fresh["time_embed"]["guidance_embedder"]
    embedder["linear_2"] = jax.tree.map(jnp.zeros_like, embedder["linear_2"])
    teacher = dict(cast(params, jnp.float32))
    del teacher["logvar_linear"]
    time = teacher["time_embed"]
    teacher["time_embed"] = {name: time[name] for name in time if name != "guidance_embedder"}

    student = state.overlay(fresh, teacher, "teacher")
    chex.assert_trees_all_equal_shapes(student, fresh)
    chex.assert_trees_all_equal(student["logvar_linear"], fresh["logvar_linear"])
    chex.assert_trees_all_equal(student["time_embed"]["guidance_embedder"], embedder)
    velocity = apply(fields, student, inputs)
    plain = fields | dict(guidance_embeds=False, logvar=False)
    np.testing.assert_array_equal(velocity, apply(plain, teacher, (*inputs[:4], None)))


def test_overlay_keeps_dtypes_and_names_a_leaf_that_does_not_fit():
    fresh = {"a": {"kernel": jnp.zeros((2, 3))}, "b": jnp.ones(4)}
    result = state.overlay(fresh, {"a": {"kernel": np.full((2, 3), 7, np.float64)}}, "x")
    chex.assert_trees_all_equal(result, {"a": {"kernel": jnp.full((2, 3), 7.0)}, "b": fresh["b"]})
    assert result["a"]["kernel"].dtype == jnp.float32 and not fresh["a"]["kernel"].any()
    with pytest.raises(UserError, match=r"runs/teacher.*kernel.*\(3, 2\).*\(2, 3\)"):
        state.overlay(fresh, {"a": {"kernel": jnp.zeros((3, 2))}}, "runs/teacher")
    with pytest.raises(UserError, match=r"runs/teacher.*bias"):
        state.overlay(fresh, {"a": {"bias": jnp.zeros(3)}}, "runs/teacher")


def test_ema_ramp():
    """decay_t = min(decay, (1 + t) / (10 + t)): 0.1 at the first update, then up to the decay."""
    ema = {"w": jnp.array([1.0, -2.0])}
    params = {"w": jnp.array([3.0, 5.0])}
    for step, decay in [(0, 0.1), (1, 2 / 11), (90, 0.91), (10**6, 0.99)]:
        result = state.ema_update(ema, params, 0.99, jnp.int32(step))["w"]
        expected = decay * ema["w"] + (1 - decay) * params["w"]
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
        assert result.dtype == jnp.float32


# --- Gradients over microbatches


def test_gradients_are_means_over_microbatches_and_sums_over_terms():
    """Of 12 rows, of which microbatch i has i, i + parts, ... and a key of its own, as numpy works it out."""

    def residual(params, batch, key, found):
        assert not found
        error = batch["x"] @ params["w"] + params["b"] * jax.random.normal(key, batch["y"].shape)
        error = error - batch["y"]
        return jnp.square(error).mean(), {"error": error, "row": batch["row"]}

    def weight(params, batch, key, found):
        assert [*found] == ["error", "row"]
        return 3 * jnp.square(params["w"]).sum(), {}

    random, key = np.random.default_rng(0), jax.random.key(3)
    params = {"w": jnp.asarray(random.standard_normal(3), jnp.float32), "b": jnp.float32(0.4)}
    x, y = random.standard_normal((12, 3)), random.standard_normal(12)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    terms = {"residual": residual, "weight": weight}
    run = jax.jit(functools.partial(accumulate.gradients, terms), static_argnums=3)
    for parts in (1, 2, 3, 12):
        some, *_, of_b = accumulate.gradients(
            terms, params, batch | {"row": jnp.arange(12)}, key, parts, lambda grads: grads["b"]
        )
        assert of_b["share/weight"] == 0 and float(of_b["share/residual"]) == pytest.approx(
            1, rel=1e-6
        )
        keys = [jax.random.fold_in(key, i) for i in range(parts)]
        noise = np.stack([jax.random.normal(key, (12 // parts,)) for key in keys], axis=1).ravel()
        w = np.asarray(params["w"], np.float64)
        error = x @ w + 0.4 * noise - y
        value, aux, grads, balance = run(params, batch | {"row": jnp.arange(12)}, key, parts)
        assert float(value) == pytest.approx(float(some), rel=1e-5)
        assert float(value) == pytest.approx((error**2).mean() + 3 * w @ w, rel=1e-5)
        np.testing.assert_allclose(aux["error"], error, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(aux["row"], np.arange(12))
        np.testing.assert_allclose(grads["w"], 2 * error @ x / 12 + 6 * w, rtol=1e-4)
        assert float(grads["b"]) == pytest.approx(2 * (error * noise).mean(), rel=1e-4)
        # Lengths and cosine of the two gradients of each microbatch.
        shares, cosines = [], []
        for i in range(parts):
            e, n = error[i::parts], noise[i::parts]
            one = 2 * np.append(e @ x[i::parts], e @ n) / len(e)
            other = np.append(6 * w, 0)
            sizes = np.linalg.norm(one), np.linalg.norm(other)
            shares.append(sizes[1] / sum(sizes))
            cosines.append(one @ other / np.prod(sizes))
        expected = {"share/residual": 1 - np.mean(shares), "share/weight": np.mean(shares)}
        expected |= {"cosine/weight": np.mean(cosines)}
        assert balance.keys() == expected.keys()
        for name, number in expected.items():
            assert float(balance[name]) == pytest.approx(number, abs=1e-4), name


# --- Diagnostics


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
    # A bad sample shows in its bin only.
    limited = diagnostics.time_bins(jnp.array([0.05, 0.99]), jnp.array([1.0, jnp.inf]), 1.0)
    assert (float(limited[0]), float(limited[7])) == (1, np.inf)


def test_tangent_checks_tell_right_from_wrong():
    random = np.random.default_rng(0)
    x, dx = (jnp.asarray(random.standard_normal((3, 4, 4, 2)), jnp.float32) for _ in range(2))
    inputs = x, jnp.array([0.3, 0.8, 1.2]), dx, jnp.array([0.2, 0.3, 0.1])

    def F(x, t):
        return jnp.sin(x) * jnp.cos(t)[:, None, None, None]

    def wrong(x, t):
        """The same values with 1.25 of their derivative."""
        value = F(x, t)
        return value + 0.25 * (value - jax.lax.stop_gradient(value))

    checks = diagnostics.tangent_checks(F, F, *inputs)
    assert set(checks) == {"check/jvp", "check/bfloat16_tangent"}
    assert 0 < float(checks["check/jvp"]) < 3e-4
    assert float(checks["check/bfloat16_tangent"]) == 0
    # 0.25 / 1.25 off, relative to itself, both ways.
    checks = diagnostics.tangent_checks(wrong, F, *inputs)
    assert float(checks["check/jvp"]) == pytest.approx(0.2, abs=1e-3)
    assert float(checks["check/bfloat16_tangent"]) == pytest.approx(0.2, abs=1e-5)


def test_verdict():
    """Means over lines, a sentence for each kind of network that judges images, none without."""
    lines = [{"share/images": 0.1, "cosine/images": 0.02, "critic/auc": None}]
    lines += [{"share/images": 0.2, "cosine/images": 0.06, "critic/auc": 0.71}]
    update, critic = diagnostics.verdict(lines)
    assert "15%" in update and "0.04" in update and "0.71" in critic
    lines[1] |= {"critic/held_out": 0.66, "critic/readable": 0.58}
    lines[1] |= {"unreadable/one_step": 0.31, "unreadable/t4": 0.02}
    _, critic, one_step = diagnostics.verdict(lines)
    assert "0.66" in critic and "0.58" in critic and "0.71" not in critic
    assert "31%" in one_step and "2%" in one_step
    (fake,) = diagnostics.verdict([{"fake_gap/t0": 0.125, "fake_gap/t7": 0.5}])
    assert "0.12" in fake and "0.50" in fake
    assert diagnostics.verdict([{"loss/flow": 1.0}]) == diagnostics.verdict([]) == []


def test_weights_of_another_world_or_network_are_refused(tmp_path):
    """Their shapes may fit: one that is shown other times starts as something else, without a word."""
    mesh = make_mesh(devices=jax.devices()[:1])
    teacher = make_workdir(tmp_path / "teacher", "flow")
    c = tiny("configs/digits.py:student,small,sprint", tmp_path, teacher=str(teacher))
    nets = build_nets(c, mesh)
    refuse(
        build_nets, c.override({"data.world": "full"}), mesh, parts=["full", "small", str(teacher)]
    )
    for name, parts in (("timestep_scale", ["timestep_scale"]), ("qk_norm", ["qk_norm"])):
        other = {"timestep_scale": 1.0, "qk_norm": not c.model.qk_norm}[name]
        start = make_workdir(tmp_path / name, "distill", **{name: other})
        started = c.override({"init": str(start)})
        refuse(init_state, started, nets, {}, {}, mesh, parts=[*parts, f"--config.init={start}"])


@pytest.mark.usefixtures("quick")
def test_a_student_that_does_not_start_as_its_teacher_is_found():
    """Weights may fit a network that computes something else: here, one that is shown other times."""
    fields = tiny_config("flow")["model"]
    teacher, mesh = random_params(fields, 0), make_mesh(devices=jax.devices()[:1])
    student = from_fields(fields, guidance_embeds=True, logvar=True)
    inputs = example_inputs(student)
    params = state.overlay(student.init(jax.random.key(0), *inputs)["params"], teacher, "teacher")

    def check(**changes):
        nets = state.Nets(student, from_fields(fields, **changes), None, None, None)
        check_start(nets, params, teacher, mesh)

    check()
    with pytest.raises(UserError, match="differ by"):
        check(timestep_scale=1.0)
