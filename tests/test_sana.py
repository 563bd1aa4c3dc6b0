"""SanaTransformer against an independent float64 derivation, and against itself in every mode."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sana_derivation import (
    CASES,
    STUDENT,
    abstract_params,
    apply,
    assert_close,
    cast,
    derive,
    draw_inputs,
    equations,
    fast_jit,
    setup,
)

from sprint_jax.errors import UserError
from sprint_jax.models.layers import LinearAttention, RMSNorm, layer_norm
from sprint_jax.models.sana import SIZES, SanaTransformer, from_fields, remat


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_derivation(case):
    fields, params, inputs = setup(case)
    velocity, logvar, outputs = derive(fields, params, *inputs)
    assert np.abs(velocity).max() > 1
    for dtype, tolerance in ((jnp.float32, 2e-5), (jnp.float64, 1e-11)):
        with jax.enable_x64(dtype == jnp.float64):
            model = SanaTransformer(**fields, dtype=dtype)
            run = functools.partial(model.apply, {"params": cast(params, dtype)})
            arguments = cast(inputs, dtype)
            options = dict(with_logvar=True) if fields["logvar"] else {}
            result = fast_jit(functools.partial(run, **options))(*arguments)
            assert_close(result, (velocity, logvar) if fields["logvar"] else velocity, tolerance)
            taps = fast_jit(functools.partial(run, taps=(0, 2)))(*arguments)
            assert_close(taps, (outputs[0], outputs[2]), tolerance)


# --- Sizes

COUNTS = {
    "sana-600m": 591_747_872,
    "sana-1600m": 1_604_462_752,
    "sana1.5-1600m": 1_604_641_952,
    "4800m": 4_721_825_952,
    "600m-teacher": 591_876_896,
    "1600m-teacher": 1_604_641_952,
    "600m": 593_501_216,
    "1600m": 1_610_237_472,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    leaves = jax.tree.leaves(abstract_params(SIZES[name]))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == COUNTS[name]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert set(SIZES) == {*COUNTS, "digits"}


@pytest.mark.parametrize(
    ("name", "tensors", "per_block", "outside"),
    [("600m", 664, 20_650_752, 15_280_160), ("1600m", 480, 77_929_600, 51_645_472)],
)
def test_parameter_layout(name, tensors, per_block, outside):
    params = abstract_params(SIZES[name])
    layers = SIZES[name]["num_layers"]
    blocks = params.pop("transformer_blocks")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(blocks)} == {layers}
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(blocks) == layers * per_block
    assert count(params) == outside
    assert layers * len(jax.tree.leaves(blocks)) + len(jax.tree.leaves(params)) == tensors
    d = 32 * SIZES[name]["num_attention_heads"]
    hidden = int(2.5 * d)
    assert params["patch_embed"]["proj"]["kernel"].shape == (32, d)
    assert params["time_embed"]["guidance_embedder"]["linear_1"]["kernel"].shape == (256, d)
    assert params["caption_projection"]["linear_1"]["kernel"].shape == (2304, d)
    assert params["scale_shift_table"].shape == (2, d)
    assert blocks["ff"]["conv_inverted"]["kernel"].shape == (layers, d, 2 * hidden)
    assert blocks["ff"]["conv_depth"]["kernel"].shape == (layers, 3, 3, 2 * hidden)
    assert set(blocks["ff"]["conv_point"]) == {"kernel"}
    assert blocks["attn1"]["norm_q"]["weight"].shape == (layers, d)
    assert set(blocks["attn1"]["to_q"]) == {"kernel"}
    assert set(blocks["attn2"]["to_q"]) == set(blocks["attn1"]["to_out_0"]) == {"kernel", "bias"}


# --- Derivatives, scan and rematerialisation


def derivatives(model, params, inputs, tangents):
    """Value, gradient, jvp and the gradient of a function of the jvp, as sCM takes it."""
    x, t, *rest = inputs

    def tangent_loss(params):
        def run(x, t):
            return model.apply({"params": params}, x, t, *rest)

        value, tangent = jax.jvp(run, (x, t), tangents)
        return jnp.sin(tangent).sum() + jnp.square(value).mean(), (value, tangent)

    def loss(params):
        return jnp.sin(model.apply({"params": params}, *inputs)).mean()

    both, (value, tangent) = jax.grad(tangent_loss, has_aux=True)(params)
    return value, jax.grad(loss)(params), tangent, both


@functools.cache
def all_derivatives(policy, scan):
    fields, params, inputs = setup("student")
    fields = fields | dict(num_layers=2, dtype=jnp.float64, remat=policy, scan=scan)
    blocks = jax.tree.map(lambda leaf: leaf[:2], params["transformer_blocks"])
    params = params | {"transformer_blocks": blocks}
    with jax.enable_x64(True):
        model = SanaTransformer(**fields)
        tangents = jnp.cos(3 * inputs[0]), jnp.cos(5 * inputs[1])
        run = fast_jit(functools.partial(derivatives, model))
        return jax.device_get(run(cast(params, jnp.float64), cast(inputs, jnp.float64), tangents))


@pytest.mark.parametrize(
    ("policy", "scan"),
    [("full", True), ("dots", True), ("dots_no_batch", True), ("none", False), ("full", False)],
)
def test_scan_and_remat_change_nothing(policy, scan):
    baseline = all_derivatives("none", True)
    unused = [leaf for leaf in jax.tree.leaves(baseline) if not leaf.any()]
    assert len(unused) == 4  # of the two gradients of logvar_linear
    assert_close(all_derivatives(policy, scan), baseline, 1e-10)


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


# --- What the inputs do


def test_mask_hides_tokens():
    fields, params, inputs = setup("student")
    x, t, text, mask, guidance = inputs
    hidden = np.where(mask[..., None], text, 7 - 3 * text)
    expected = apply(fields, params, inputs)
    actual = apply(fields, params, (x, t, hidden, mask, guidance))
    np.testing.assert_array_equal(actual, expected)
    # Sample 1 keeps two tokens: the same as a shorter text, and not the same without the mask.
    short = apply(fields, params, (x, t, text[:, :2], mask[:, :2], guidance))
    np.testing.assert_allclose(short[1], expected[1], rtol=0, atol=1e-5 * np.abs(expected).max())
    unmasked = apply(fields, params, (x, t, text, np.ones_like(mask), guidance))
    np.testing.assert_array_equal(unmasked[0], expected[0])
    assert np.abs(unmasked[1] - expected[1]).max() > 0.01


def test_every_input_matters_to_its_own_sample():
    fields, params, (x, t, text, mask, guidance) = setup("student")
    base = apply(fields, params, (x, t, text, mask, guidance))
    first = np.array([1.0, 0.0])
    changes = {
        "x": (x + 0.1 * first[:, None, None, None], t, text, mask, guidance),
        "t": (x, t + 0.1 * first, text, mask, guidance),
        "text": (x, t, text + 0.3 * first[:, None, None], mask, guidance),
        "guidance": (x, t, text, mask, guidance + 0.1 * first),
    }
    for name, changed in changes.items():
        other = apply(fields, params, changed)
        assert np.abs(other[0] - base[0]).max() > 1e-3 * np.abs(base).max(), name
        np.testing.assert_array_equal(other[1], base[1], err_msg=name)


def test_text_is_a_set_of_tokens_with_its_mask():
    """Order comes from the text encoder; here tokens and mask may be permuted, only together."""
    fields, params, (x, t, text, mask, guidance) = setup("student")
    order = np.array([3, 1, 0, 2])
    base = apply(fields, params, (x, t, text, mask, guidance))
    together = apply(fields, params, (x, t, text[:, order], mask[:, order], guidance))
    np.testing.assert_allclose(together, base, rtol=0, atol=1e-5 * np.abs(base).max())
    alone = apply(fields, params, (x, t, text[:, order], mask, guidance))
    assert np.abs(alone[1] - base[1]).max() > 0.01
    swapped = apply(fields, params, (x, t, text[::-1], mask[::-1], guidance))
    assert np.abs(swapped - base).max(axis=(1, 2, 3)).min() > 0.01


def test_new_guidance_embedder_starts_silent_and_learns():
    fields, _, inputs = setup("student")
    model = SanaTransformer(**fields)
    inputs = cast(inputs, jnp.float32)
    params = fast_jit(model.init)(jax.random.key(0), *inputs)["params"]
    params["proj_out"]["kernel"] = jnp.full_like(params["proj_out"]["kernel"], 0.1)

    @fast_jit
    def step(params, guidance):
        def loss(params):
            run = model.apply({"params": params}, *inputs[:4], guidance)
            return (run * jnp.cos(jnp.arange(run.size).reshape(run.shape))).sum(), run

        (_, velocity), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return velocity, gradient["time_embed"]["guidance_embedder"], gradient

    velocity, embedder, gradient = step(params, inputs[4])
    np.testing.assert_array_equal(velocity, step(params, inputs[4] + 1)[0])
    assert jnp.abs(embedder["linear_2"]["kernel"]).max() > 0
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    later, embedder, _ = step(moved, inputs[4])
    assert jnp.abs(embedder["linear_1"]["kernel"]).max() > 0
    assert jnp.abs(later - step(moved, inputs[4] + 1)[0]).max() > 0


# --- Mistakes


@pytest.mark.parametrize(
    ("changes", "size", "options", "message"),
    [
        ({}, (3, 5), {"guidance": False}, "pass guidance"),
        ({"guidance_embeds": False}, (3, 5), {}, "guidance=None"),
        ({}, (3, 5), {"taps": (1, 0)}, "taps"),
        ({}, (3, 5), {"taps": (1, 1)}, "taps"),
        ({}, (3, 5), {"taps": (0, 3)}, "below 3"),
        ({}, (3, 5), {"taps": (-1,)}, "taps"),
        ({"logvar": False}, (3, 5), {"with_logvar": True}, "logvar=True"),
        ({"patch_size": 2}, (4, 5), {}, "patch_size 2"),
        ({"remat": "some"}, (3, 5), {}, "remat policy 'some'"),
    ],
)
def test_bad_arguments(changes, size, options, message):
    fields = STUDENT | changes
    x, t, text, mask, _ = cast(draw_inputs(STUDENT, size), jnp.float32)
    guidance = t if options.pop("guidance", True) else None
    model = SanaTransformer(**fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), x, t, text, mask, guidance, **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "model.dtype 'float16'"),
        ({"remat": "half"}, "model.remat 'half' is not one of none, full, dots, dots_no_batch"),
        ({"cross_attention_head_dim": 13}, "heads x dim is 26.*24"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        from_fields(STUDENT, **changes)
    assert caught.value.exit_code == 2


def test_fields_from_a_config():
    model = from_fields(STUDENT, dtype="bfloat16", remat="full", interpolation_scale=0)
    assert model.dtype == jnp.bfloat16
    assert model.interpolation_scale is None
    assert remat(apply, "none", True) is apply


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


def test_linear_attention_of_nothing_is_finite():
    """Where every query or key is cut to zero by the ReLU, 1e-15 keeps 0 / 0 away."""
    layer = LinearAttention(8, 2, False, False, jnp.float32)
    x = jnp.ones((1, 2, 2, 8))
    params = layer.init(jax.random.key(0), x)["params"]
    params["to_q"]["kernel"] = -jnp.ones((8, 8))
    out, tangent = jax.jvp(lambda x: layer.apply({"params": params}, x), (x,), (x,))
    np.testing.assert_array_equal(out, 0)
    assert bool(jnp.isfinite(tangent).all())
