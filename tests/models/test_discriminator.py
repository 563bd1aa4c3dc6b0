"""LADD heads: spectral norm, local batch norm and the published sizes.

Logits and power iterations are compared with torch's in tests/parity.
"""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sprint_jax.models import discriminator
from sprint_jax.models.discriminator import DiscriminatorHeads, LocalBatchNorm, TokenNorm

pytestmark = pytest.mark.usefixtures("quick")

WIDTH = 6
TENSOR = re.compile(r"tensor<((?:\d+x)+)")


def draw_features(batch=3, height=3, width=4, heads=2, seed=0):
    random = np.random.default_rng(seed)
    shape = (batch, height, width, WIDTH)
    return tuple(jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(heads))


def draw_heads(features):
    """Heads whose norms and biases are not those of a fresh start."""
    heads = jax.jit(discriminator.init_heads)(features, jax.random.key(0))
    random = np.random.default_rng(0)

    def draw(leaf):
        noise = jnp.asarray(random.uniform(0.4, 1.6, leaf.shape), jnp.float32)
        return leaf if leaf.ndim == 3 else noise

    return jax.tree.map(draw, heads["params"]), heads["spectral"]


def apply(params, spectral, features, **fields):
    heads = DiscriminatorHeads(**fields)
    return jax.jit(heads.apply)({"params": params}, features, spectral)


def assert_zero(tree):
    chex.assert_trees_all_equal(tree, jax.tree.map(jnp.zeros_like, tree))


# --- Spectral norm


def test_spectral_norm_converges_to_the_svd():
    params, spectral = draw_heads(draw_features())

    @jax.jit
    def converge(spectral):
        step = lambda _, s: discriminator.update_spectral(params, s)  # noqa: E731
        return jax.lax.fori_loop(0, 400, step, spectral)

    converged = converge(spectral)
    for head, convs in spectral.items():
        for name, start in convs.items():
            kernel = params[head][name]["kernel"]
            matrix = np.asarray(kernel, np.float64).transpose(2, 1, 0).reshape(kernel.shape[2], -1)
            largest = np.linalg.svd(matrix, compute_uv=False)[0]
            end = discriminator.spectral_norm(kernel, converged[head][name])
            assert float(end) == pytest.approx(largest, rel=1e-5)
            # The start is already close, from below.
            start = float(discriminator.spectral_norm(kernel, start))
            assert 0.9 * largest < start <= largest * 1.00001


def test_only_update_spectral_moves_the_vectors():
    features = draw_features()
    params, spectral = draw_heads(features)
    assert_zero(jax.grad(lambda s: apply(params, s, features).sum())(spectral))
    # Twice the kernels have twice the norms.
    doubled = jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim == 3 else leaf, params)
    logits = apply(params, spectral, features)
    np.testing.assert_allclose(apply(doubled, spectral, features), logits, rtol=0, atol=1e-5)
    update = lambda p: discriminator.update_spectral(p, spectral)  # noqa: E731
    assert_zero(jax.grad(lambda p: sum(x.sum() for x in jax.tree.leaves(update(p))))(params))


# --- Norms


@pytest.mark.parametrize(
    "sizes", [[1], [3], [8], [5, 4], [8, 7], [8, 8], [6, 6, 5], [7, 7, 7, 6, 6]], ids=str
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_local_batch_norm(sizes, dtype):
    batch = sum(sizes)
    random = np.random.default_rng(batch)
    # Samples of very different scale, so that a wrong group shows.
    x = (random.standard_normal((batch, 5, 3)) + 1) * (1 + np.arange(batch)[:, None, None])
    x = jnp.asarray(x, dtype)
    weight, bias = random.standard_normal((2, 3))
    params = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    actual = LocalBatchNorm().apply({"params": params}, x)
    groups = np.split(np.asarray(x, np.float64), np.cumsum(sizes)[:-1])
    normed = [(g - g.mean((0, 1))) / np.sqrt(g.var((0, 1)) + 1e-5) for g in groups]
    assert actual.dtype == dtype
    # Float32 inside, rounded once at the end.
    rtol = 0 if dtype == jnp.float32 else 2**-8
    expected = np.concatenate(normed) * weight + bias
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=2e-5)


def test_local_batch_norm_holds_no_table_of_samples_by_samples():
    for batch in (4096, 4099):
        tokens = jax.ShapeDtypeStruct((batch, 2, 3), jnp.float32)
        norm = lambda x: jax.vjp(LocalBatchNorm().normalize, x)[1](x)  # noqa: E731
        program = jax.jit(norm).lower(tokens).as_text()
        sizes = [
            math.prod(map(int, re.findall(r"(\d+)x", each))) for each in TENSOR.findall(program)
        ]
        # Of the tokens, or one more sample for each group.
        assert len(sizes) > 10 and max(sizes) <= 7 * batch


def test_token_norm_is_a_layer_norm():
    random = np.random.default_rng(0)
    x, (weight, bias) = random.standard_normal((3, 5, 4)) * 7 + 2, random.standard_normal((2, 4))
    params = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    actual = TokenNorm().apply({"params": params}, jnp.asarray(x, jnp.float32))
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(actual, normed * weight + bias, rtol=0, atol=2e-5)


def test_only_heads_with_batch_norm_let_images_of_a_batch_see_each_other():
    features = draw_features(batch=4)
    params, spectral = draw_heads(features)
    first = tuple(feature[:1] for feature in features)
    alone, together = (apply(params, spectral, f, token_norm=True) for f in (first, features))
    np.testing.assert_allclose(alone, together[:1], rtol=0, atol=1e-5)
    alone, together = (apply(params, spectral, f) for f in (first, features))
    assert jnp.abs(alone - together[:1]).max() > 0.1


def test_heads_in_bfloat16():
    features = draw_features(4)
    heads = draw_heads(features)
    exact, rough = (apply(*heads, features, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert exact.shape == (4, 2 * 3 * 4) and exact.dtype == rough.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.03
    with pytest.raises(AssertionError, match=r"\(4, 12, 6\)"):
        apply(*heads, tuple(feature.reshape(4, 12, 6) for feature in features))


@pytest.mark.parametrize(("width", "count"), [(1152, 13_279_105), (2240, 50_191_681)])
def test_published_sizes(width, count):
    features = (jax.ShapeDtypeStruct((2, 2, 2, width), jnp.bfloat16),) * 4
    heads = jax.eval_shape(discriminator.init_heads, features, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(heads)} == {jnp.dtype("float32")}
    norm = {"weight": (width,), "bias": (width,)}
    head = {
        "main_0_conv": {"kernel": (1, width, width), "bias": (width,)},
        "main_0_norm": norm,
        "main_1_conv": {"kernel": (9, width, width), "bias": (width,)},
        "main_1_norm": norm,
        "cls": {"kernel": (1, width, 1), "bias": (1,)},
    }
    shapes = jax.tree.map(lambda leaf: leaf.shape, heads["params"])
    assert shapes == {f"heads_{i}": head for i in range(4)}
    leaves = jax.tree.leaves(heads["params"]["heads_0"])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count


def test_init_is_a_function_of_the_key():
    init = jax.jit(discriminator.init_heads)
    one, same, other = (init(draw_features(), jax.random.key(seed))["params"] for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, same)
    # Two heads of the same shape start apart, and so do two keys.
    heads = one["heads_0"], one["heads_1"], other["heads_0"]
    first, second, third = (head["main_1_conv"]["kernel"] for head in heads)
    assert bool((first != second).any()) and bool((first != third).any())
    bound = 1 / math.sqrt(9 * WIDTH)  # torch's default for a convolution
    assert 0.9 * bound < float(jnp.abs(first).max()) <= bound
