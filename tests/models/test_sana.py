"""SanaTransformer against an independent float64 derivation: values, sizes, inputs, mistakes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sana_derivation import (
    CASES,
    STUDENT,
    abstract_params,
    apply,
    assert_close,
    cast,
    derive,
    draw_inputs,
    fast_jit,
    setup,
)

from sprint_jax.core.errors import UserError
from sprint_jax.models.blocks import remat
from sprint_jax.models.layers import LinearAttention
from sprint_jax.models.sana import SIZES, SanaTransformer, from_fields


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


def test_linear_attention_of_nothing_is_finite():
    """Where every query or key is cut to zero by the ReLU, 1e-15 keeps 0 / 0 away."""
    layer = LinearAttention(8, 2, False, False, jnp.float32)
    x = jnp.ones((1, 2, 2, 8))
    params = layer.init(jax.random.key(0), x)["params"]
    params["to_q"]["kernel"] = -jnp.ones((8, 8))
    out, tangent = jax.jvp(lambda x: layer.apply({"params": params}, x), (x,), (x,))
    np.testing.assert_array_equal(out, 0)
    assert bool(jnp.isfinite(tangent).all())
