"""SanaTransformer: sizes, inputs, derivatives, scan, rematerialisation, taps, bfloat16 and mistakes.

Its velocity is compared with diffusers' in tests/interop (stored arrays) and tests/parity.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.tiny_sana import STUDENT, abstract_params, apply, cast, fast_jit, setup

from sprint_jax.core.errors import UserError
from sprint_jax.interop.sana import sana_table
from sprint_jax.models.layers import LinearAttention
from sprint_jax.models.sana import SIZES, SanaTransformer, from_fields

# Parameters, tensors and parameters per block.
PUBLISHED = {
    "sana-600m": (591_747_872, 548, 20_646_144),
    "sana-1600m": (1_604_462_752, 396, 77_920_640),
    "sana1.5-1600m": (1_604_641_952, 476, 77_929_600),
    "4800m": (4_721_825_952, 1396, 77_929_600),
    "600m-teacher": (591_876_896, 660, 20_650_752),
    "1600m-teacher": (1_604_641_952, 476, 77_929_600),
    "600m": (593_501_216, 664, 20_650_752),
    "1600m": (1_610_237_472, 480, 77_929_600),
}


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    params = abstract_params(SIZES[name])
    blocks, layers = params["transformer_blocks"], SIZES[name]["num_layers"]
    tensors = len(jax.tree.leaves(params)) + (layers - 1) * len(jax.tree.leaves(blocks))
    assert (count(params), tensors, count(blocks) // layers) == PUBLISHED[name]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(blocks)} == {layers}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert set(SIZES) == {*PUBLISHED, "digits"}


def test_mask_hides_tokens():
    fields, params, (x, t, text, mask, guidance) = setup()
    expected = apply(fields, params, (x, t, text, mask, guidance))
    hidden = np.where(mask[..., None], text, 7 - 3 * text)
    actual = apply(fields, params, (x, t, hidden, mask, guidance))
    np.testing.assert_array_equal(actual, expected)
    # Sample 1 keeps two tokens: the same as a shorter text, and not the same without the mask.
    short = apply(fields, params, (x, t, text[:, :2], mask[:, :2], guidance))
    np.testing.assert_allclose(short[1], expected[1], rtol=0, atol=1e-5 * np.abs(expected).max())
    unmasked = apply(fields, params, (x, t, text, np.ones_like(mask), guidance))
    np.testing.assert_array_equal(unmasked[0], expected[0])
    assert np.abs(unmasked[1] - expected[1]).max() > 0.01


@pytest.mark.parametrize("changed", ["x", "t", "text", "guidance"])
def test_every_input_matters_to_its_own_sample(changed):
    fields, params, inputs = setup()
    inputs = dict(zip(("x", "t", "text", "mask", "guidance"), inputs, strict=True))
    base = apply(fields, params, list(inputs.values()))
    first = np.array([0.2, 0.0]).reshape(2, *[1] * (inputs[changed].ndim - 1))
    other = apply(fields, params, list((inputs | {changed: inputs[changed] + first}).values()))
    assert np.abs(other[0] - base[0]).max() > 1e-3 * np.abs(base).max()
    np.testing.assert_array_equal(other[1], base[1])


@pytest.mark.slow
def test_new_guidance_embedder_starts_silent_and_learns():
    fields, _, inputs = setup()
    model, (*inputs, guidance) = SanaTransformer(**fields), cast(inputs, jnp.float32)
    params = fast_jit(model.init)(jax.random.key(0), *inputs, guidance)["params"]
    params["proj_out"]["kernel"] = jnp.full_like(params["proj_out"]["kernel"], 0.1)
    velocity = lambda params, guidance: model.apply({"params": params}, *inputs, guidance)  # noqa: E731
    run = fast_jit(velocity)
    np.testing.assert_array_equal(run(params, guidance), run(params, guidance + 1))
    gradient = fast_jit(jax.grad(lambda params: jnp.sin(velocity(params, guidance)).sum()))
    for name in ("linear_2", "linear_1"):  # the first follows when the last is not 0 any more
        slope = gradient(params)
        assert jnp.abs(slope["time_embed"]["guidance_embedder"][name]["kernel"]).max() > 0
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
    assert jnp.abs(run(params, guidance) - run(params, guidance + 1)).max() > 0


def test_a_flow_map_starts_as_the_teacher_and_learns_where_to_jump():
    """Without a target it jumps to the image; other networks take none, published classes cannot hold it."""
    fields, params, (x, t, text, mask, guidance) = setup()
    inputs = *cast((x, t, text, mask), jnp.float32), cast(guidance, jnp.float32)
    model = SanaTransformer(**fields, flow_map=True)
    fresh = fast_jit(model.init)(jax.random.key(0), *inputs)["params"]
    embedder = fresh["time_embed"]["target_timestep_embedder"]
    params = params | {"time_embed": params["time_embed"] | {"target_timestep_embedder": embedder}}

    def run(params, target, model=model):
        return model.apply({"params": params}, *inputs, target=target)

    expected = run(params, None, SanaTransformer(**fields))
    np.testing.assert_array_equal(run(params, jnp.asarray(t) / 2), expected)
    embedder["linear_2"]["kernel"] += 0.1
    moved = run(params, jnp.asarray(t) / 2)
    assert jnp.abs(moved - expected).max() > 1e-3
    np.testing.assert_array_equal(run(params, None), run(params, jnp.zeros_like(t)))
    with pytest.raises(ValueError, match="target"):
        run(params, t, SanaTransformer(**fields))
    with pytest.raises(UserError, match="flow map"):
        sana_table(fields | {"flow_map": True})


# --- Derivatives, scan and rematerialisation


@functools.cache
def differentiate(policy, scan):
    """Value, jvp and, as sCM takes it, the gradient of a function of the two."""
    fields, params, inputs = setup()
    fields = fields | dict(num_layers=2, dtype=jnp.float64, remat=policy, scan=scan)
    blocks = jax.tree.map(lambda leaf: leaf[:2], params["transformer_blocks"])
    with jax.enable_x64(True):
        x, t, *rest = cast(inputs, jnp.float64)

        def loss(params):
            run = lambda x, t: SanaTransformer(**fields).apply({"params": params}, x, t, *rest)  # noqa: E731
            value, tangent = jax.jvp(run, (x, t), (jnp.cos(3 * x), jnp.cos(5 * t)))
            return jnp.sin(tangent).sum() + jnp.square(value).mean(), (value, tangent)

        params = cast(params | {"transformer_blocks": blocks}, jnp.float64)
        return jax.device_get(fast_jit(jax.grad(loss, has_aux=True))(params))


@pytest.mark.parametrize(
    ("policy", "scan"),
    [
        ("full", True),
        pytest.param("none", False, marks=pytest.mark.slow),
        pytest.param("dots", True, marks=pytest.mark.slow),
        pytest.param("dots_no_batch", True, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_nothing(policy, scan):
    baseline = differentiate("none", True)
    unused = [leaf for leaf in jax.tree.leaves(baseline) if not leaf.any()]
    assert len(unused) == 2  # kernel and bias of logvar_linear
    assert_close(differentiate(policy, scan), baseline, 1e-10)


def test_float32_tangent_is_accurate():
    """A float32 jvp against a central difference in float64, along a general direction."""
    fields, params, inputs = setup()
    (x, t, *rest), h = inputs, 1e-5
    direction = np.cos(3 * x), np.cos(5 * t)

    def function(dtype):
        apply = SanaTransformer(**fields, dtype=dtype).apply
        inputs, weights = cast(rest, dtype), cast(params, dtype)
        return fast_jit(lambda x, t: apply({"params": weights}, x, t, *inputs))

    def tangent(dtype):
        return jax.jvp(function(dtype), cast((x, t), dtype), cast(direction, dtype))[1]

    single = tangent(jnp.float32)
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        run = function(jnp.float64)
        ahead, behind = (run(x + s * direction[0], t + s * direction[1]) for s in (h, -h))
        difference = np.asarray(ahead - behind) / (2 * h)
        double = np.asarray(tangent(jnp.float64))
    norm = np.linalg.norm(difference)
    assert np.linalg.norm(double - difference) / norm < 1e-8
    assert np.linalg.norm(single - difference) / norm < 1e-6


# --- Taps


def test_nothing_after_the_last_tap_matters():
    fields, params, inputs = setup()
    params, inputs = cast(params, jnp.float32), cast(inputs, jnp.float32)

    def run(params, **changes):
        model = SanaTransformer(**(fields | changes))
        return fast_jit(functools.partial(model.apply, taps=(0, 1)))({"params": params}, *inputs)

    features = run(params)
    blocks = params["transformer_blocks"]
    poisoned = params | {
        name: jax.tree.map(lambda leaf: leaf * jnp.nan, params[name])
        for name in ("proj_out", "scale_shift_table", "logvar_linear")
    }
    poisoned["transformer_blocks"] = jax.tree.map(lambda a: a.at[2].set(jnp.nan), blocks)
    assert [feature.shape for feature in features] == [(2, 3, 5, 24)] * 2
    chex.assert_trees_all_equal(run(poisoned), features)
    assert_close(run(params, scan=False), features, 1e-5)


# --- bfloat16


def test_bfloat16_is_close_and_keeps_float32_where_promised():
    fields, params, inputs = setup()
    params, inputs = cast(params, jnp.float32), cast(inputs, jnp.float32)
    outputs, embeddings = {}, {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = SanaTransformer(**fields, dtype=dtype)
        run = functools.partial(model.apply, {"params": params}, with_logvar=True)
        run = functools.partial(run, capture_intermediates=lambda m, _: m.name == "time_embed")
        outputs[dtype], kept = fast_jit(run)(*inputs)
        embeddings[dtype] = kept["intermediates"]["time_embed"]["__call__"][0]
        tapped = functools.partial(model.apply, taps=(2,))
        assert jax.eval_shape(tapped, {"params": params}, *inputs)[0].dtype == dtype
    (exact, logvar), (rough, rough_logvar) = outputs[jnp.float32], outputs[jnp.bfloat16]
    assert rough.dtype == rough_logvar.dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(*embeddings.values())
    chex.assert_trees_all_close(*embeddings.values(), rtol=0, atol=1e-5)
    head = params["logvar_linear"]
    expected = embeddings[jnp.float32][0] @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(logvar, expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(rough_logvar, logvar, rtol=1e-6)
    assert 1e-4 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.03


def equations(jaxpr):
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_bfloat16_program_rounds_only_matmuls_and_residuals():
    fields, params, inputs = setup()
    params, inputs = cast(params, jnp.float32), cast(inputs, jnp.float32)
    model = SanaTransformer(**fields, dtype=jnp.bfloat16)
    program = jax.make_jaxpr(model.apply)({"params": params}, *inputs)
    found = list(equations(program.jaxpr))
    wide = {"rsqrt", "exp", "sin", "cos", "div", "reduce_max"}
    checked = [e for e in found if e.primitive.name in wide]
    assert {"rsqrt", "exp", "sin", "cos", "div"} <= {e.primitive.name for e in checked}
    assert jnp.bfloat16 not in {e.outvars[0].aval.dtype for e in checked}
    dots = [e for e in found if e.primitive.name == "dot_general"]
    batched = [e for e in dots if e.params["dimension_numbers"][1][0]]
    core = [e for e in batched if e.invars[0].aval.dtype == jnp.float32]
    # Three products of the linear attention in float32; two of the cross-attention in bfloat16.
    assert (len(core), len(batched)) == (3, 5)
    narrow = [e for e in dots if e.invars[0].aval.dtype == jnp.bfloat16 and e not in batched]
    # 4 + 4 + 2 in the block, patches, two of the caption, the output.
    assert len(narrow) == 14


def test_linear_attention_of_nothing_is_finite():
    """With every query or key cut to zero by the ReLU, 1e-15 keeps 0 / 0 away."""
    layer = LinearAttention(8, 2, False, False, jnp.float32)
    x = jnp.ones((1, 2, 2, 8))
    params = layer.init(jax.random.key(0), x)["params"]
    params["to_q"]["kernel"] = -jnp.ones((8, 8))
    out, tangent = jax.jvp(lambda x: layer.apply({"params": params}, x), (x,), (x,))
    np.testing.assert_array_equal(out, 0)
    assert bool(jnp.isfinite(tangent).all())


# --- Mistakes

X, T, TEXT, MASK = jnp.zeros((2, 4, 5, 3)), jnp.zeros(2), jnp.zeros((2, 7, 10)), jnp.zeros((2, 7))


@pytest.mark.parametrize(
    ("fields", "inputs", "options", "names"),
    [
        ({}, (X, T, TEXT, MASK), {}, "guidance"),
        ({"guidance_embeds": False}, (X, T, TEXT, MASK, T), {}, "guidance=None"),
        ({}, (X, T, TEXT, MASK, T), {"taps": (1, 0)}, r"taps \(1, 0\)"),
        ({}, (X, T, TEXT, MASK, T), {"taps": (0, 3)}, r"taps \(0, 3\) .*below 3"),
        ({"logvar": False}, (X, T, TEXT, MASK, T), {"with_logvar": True}, "logvar=True"),
        ({"patch_size": 2}, (X, T, TEXT, MASK, T), {}, r"\(4, 5\).*patch_size 2"),
        ({"remat": "some"}, (X, T, TEXT, MASK, T), {}, "remat policy 'some'"),
        ({}, (X[0], T, TEXT, MASK, T), {}, r"\(4, 5, 3\)"),
        ({"in_channels": 4}, (X, T, TEXT, MASK, T), {}, r"\(2, 4, 5, 3\) .*, 4\)"),
        ({}, (X, T[:1], TEXT, MASK, T), {}, r"\(1,\)"),
        ({}, (X, T, TEXT[..., 1:], MASK, T), {}, r"\(2, 7, 9\)"),
        ({}, (X, T, TEXT, MASK[:, 1:], T), {}, r"\(2, 6\)"),
        ({}, (X, T, TEXT, MASK, T[0]), {}, "shape"),
        ({}, (X, T.astype(int), TEXT, MASK, T), {}, "int32"),
    ],
)
def test_bad_arguments(fields, inputs, options, names):
    model = SanaTransformer(**(STUDENT | fields))
    with pytest.raises((ValueError, AssertionError), match=names):
        jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **options))


def test_fields_from_a_config():
    wrong = {"dtype": "float16", "remat": "half", "cross_attention_head_dim": 13}
    for key, value in wrong.items():
        with pytest.raises(
            UserError, match="26.*24" if value == 13 else f"{key} '{value}'"
        ) as error:
            from_fields(STUDENT, **{key: value})
        assert error.value.exit_code == 2
    model = from_fields(STUDENT, dtype="bfloat16", remat="full", interpolation_scale=0)
    assert (model.dtype, model.interpolation_scale) == (jnp.bfloat16, None)
