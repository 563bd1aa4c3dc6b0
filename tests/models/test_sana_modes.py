"""SanaTransformer in its modes: derivatives, scan, rematerialisation, taps and bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sana_derivation import (
    STUDENT,
    assert_close,
    cast,
    draw_inputs,
    equations,
    fast_jit,
    setup,
)

from sprint_jax.models.layers import RMSNorm, layer_norm
from sprint_jax.models.sana import SanaTransformer

# --- Derivatives, scan and rematerialisation


def tangent_loss(model, params, inputs, tangents):
    """Value, jvp and, as sCM takes it, the gradient of a function of the two."""
    x, t, *rest = inputs

    def loss(params):
        def run(x, t):
            return model.apply({"params": params}, x, t, *rest)

        value, tangent = jax.jvp(run, (x, t), tangents)
        return jnp.sin(tangent).sum() + jnp.square(value).mean(), (value, tangent)

    return jax.grad(loss, has_aux=True)(params)


def plain_loss(model, params, inputs, tangents):
    return jax.grad(lambda p: jnp.sin(model.apply({"params": p}, *inputs)).mean())(params)


@functools.cache
def differentiate(function, policy, scan):
    fields, params, inputs = setup("student")
    fields = fields | dict(num_layers=2, dtype=jnp.float64, remat=policy, scan=scan)
    blocks = jax.tree.map(lambda leaf: leaf[:2], params["transformer_blocks"])
    params = params | {"transformer_blocks": blocks}
    with jax.enable_x64(True):
        tangents = jnp.cos(3 * inputs[0]), jnp.cos(5 * inputs[1])
        run = fast_jit(functools.partial(function, SanaTransformer(**fields)))
        return jax.device_get(run(cast(params, jnp.float64), cast(inputs, jnp.float64), tangents))


@pytest.mark.parametrize(
    ("function", "policy", "scan"),
    [
        (tangent_loss, "full", True),
        (tangent_loss, "dots", True),
        (tangent_loss, "dots_no_batch", True),
        (tangent_loss, "none", False),
        (plain_loss, "full", True),
        (plain_loss, "full", False),
    ],
)
def test_scan_and_remat_change_nothing(function, policy, scan):
    baseline = differentiate(function, "none", True)
    unused = [leaf for leaf in jax.tree.leaves(baseline) if not leaf.any()]
    assert len(unused) == 2  # kernel and bias of logvar_linear
    assert_close(differentiate(function, policy, scan), baseline, 1e-10)


def test_float32_tangent_is_accurate():
    """A float32 jvp against a central difference in float64, along a general direction."""
    fields, params, inputs = setup("student")
    direction = np.cos(3 * inputs[0]), np.cos(5 * inputs[1])

    def function(dtype):
        model = SanaTransformer(**fields, dtype=dtype)
        rest = cast(inputs[2:], dtype)
        weights = cast(params, dtype)
        return lambda x, t: model.apply({"params": weights}, x, t, *rest)

    def tangent(dtype):
        primals, tangents = cast(inputs[:2], dtype), cast(direction, dtype)
        return fast_jit(lambda *a: jax.jvp(function(dtype), a[:2], a[2:])[1])(*primals, *tangents)

    single = tangent(jnp.float32)
    assert single.dtype == jnp.float32
    h = 1e-5
    with jax.enable_x64(True):
        run = fast_jit(function(jnp.float64))
        ahead, behind = (
            run(inputs[0] + s * direction[0], inputs[1] + s * direction[1]) for s in (h, -h)
        )
        difference = np.asarray(ahead - behind) / (2 * h)
        double = np.asarray(tangent(jnp.float64))
    norm = np.linalg.norm(difference)
    assert np.linalg.norm(double - difference) / norm < 1e-8
    assert np.linalg.norm(single - difference) / norm < 1e-6


# --- Taps


def test_nothing_after_the_last_tap_matters():
    fields, params, inputs = setup("student")
    model = SanaTransformer(**fields)
    run = fast_jit(functools.partial(model.apply, taps=(0, 1)))
    params, inputs = cast(params, jnp.float32), cast(inputs, jnp.float32)
    features = run({"params": params}, *inputs)
    poisoned = dict(params)
    poisoned["transformer_blocks"] = jax.tree.map(
        lambda leaf: leaf.at[2].set(jnp.nan), params["transformer_blocks"]
    )
    for name in ("proj_out", "scale_shift_table", "logvar_linear"):
        poisoned[name] = jax.tree.map(lambda leaf: leaf * jnp.nan, params[name])
    again = run({"params": poisoned}, *inputs)
    assert len(features) == 2
    for one, other in zip(features, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_taps_save_flops():
    fields = STUDENT | dict(num_layers=3, scan=False)
    model = SanaTransformer(**fields)
    inputs = cast(draw_inputs(fields, (4, 4)), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

    def flops(taps):
        run = fast_jit(functools.partial(model.apply, taps=taps))
        return run.lower({"params": params}, *inputs).compile().cost_analysis()["flops"]

    first, second, last, everything = flops((0,)), flops((0, 1)), flops((2,)), flops(())
    block = second - first
    assert block > 0.2 * first
    assert last - first == pytest.approx(2 * block, rel=0.01)
    assert last < everything < last + block


# --- bfloat16


def test_bfloat16_is_close_and_keeps_float32_where_promised():
    fields, params, inputs = setup("student")
    params, inputs = cast(params, jnp.float32), cast(inputs, jnp.float32)
    outputs, embeddings = {}, {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = SanaTransformer(**fields, dtype=dtype)
        run = functools.partial(model.apply, {"params": params}, with_logvar=True)
        run = functools.partial(run, capture_intermediates=lambda m, _: m.name == "time_embed")
        outputs[dtype], kept = fast_jit(run)(*inputs)
        embeddings[dtype] = kept["intermediates"]["time_embed"]["__call__"][0]
        features = jax.eval_shape(
            functools.partial(model.apply, taps=(2,)), {"params": params}, *inputs
        )
        assert features[0].dtype == dtype
    (exact, logvar), (rough, rough_logvar) = outputs[jnp.float32], outputs[jnp.bfloat16]
    assert rough.dtype == rough_logvar.dtype == jnp.float32
    np.testing.assert_allclose(rough_logvar, logvar, rtol=1e-6)
    for one, other in zip(embeddings[jnp.bfloat16], embeddings[jnp.float32], strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03


def test_bfloat16_program_rounds_only_matmuls_and_residuals():
    fields, params, inputs = setup("student")
    params, inputs = cast(params, jnp.float32), cast(inputs, jnp.float32)
    model = SanaTransformer(**fields, dtype=jnp.bfloat16)
    program = jax.make_jaxpr(model.apply)({"params": params}, *inputs)
    found = list(equations(program.jaxpr))
    wide = {"rsqrt", "exp", "sin", "cos", "div", "reduce_max"}
    checked = [e for e in found if e.primitive.name in wide]
    assert {"rsqrt", "exp", "sin", "cos", "div"} <= {e.primitive.name for e in checked}
    for equation in checked:
        assert equation.outvars[0].aval.dtype != jnp.bfloat16, equation
    dots = [e for e in found if e.primitive.name == "dot_general"]
    batched = [e for e in dots if e.params["dimension_numbers"][1][0]]
    core = [e for e in batched if e.invars[0].aval.dtype == jnp.float32]
    # Three products of the linear attention in float32; two of the cross-attention in bfloat16.
    assert (len(core), len(batched)) == (3, 5)
    narrow = [e for e in dots if e.invars[0].aval.dtype == jnp.bfloat16 and e not in batched]
    # 4 + 4 + 2 in the block, patches, two of the caption, the output.
    assert len(narrow) == 14


def test_norms_compute_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 64)), jnp.bfloat16)
    weight = jnp.linspace(0.3, 2, 64)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight)
    actual = RMSNorm(jnp.bfloat16).apply({"params": {"weight": weight}}, x)
    assert actual.dtype == jnp.bfloat16
    # One rounding to bfloat16, at the end.
    np.testing.assert_allclose(np.asarray(actual, np.float64), exact, rtol=2**-8 * 1.01)
    assert layer_norm(x).dtype == jnp.float32
    mean, std = np.asarray(layer_norm(x)).mean(-1), np.asarray(layer_norm(x)).std(-1)
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(std, 1, atol=1e-5)
