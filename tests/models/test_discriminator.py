"""LADD heads: spectral norm, local batch norm, circular convolution and the published sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sprint_jax.models import discriminator
from sprint_jax.models.discriminator import (
    DiscriminatorHeads,
    LocalBatchNorm,
    SpectralConv1d,
    TokenNorm,
)

WIDTH = 6


def draw_features(batch=3, height=3, width=4, heads=2, seed=0):
    random = np.random.default_rng(seed)
    shape = (batch, height, width, WIDTH)
    return tuple(jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(heads))


def draw_heads(features, seed=0):
    """Heads whose norms and biases are not those of a fresh start."""
    heads = jax.jit(discriminator.init_heads)(features, jax.random.key(seed))
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return leaf
        return jnp.asarray(random.uniform(0.4, 1.6, leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, heads["params"])
    return params, heads["spectral"]


def as_matrix(kernel):
    """[k, in, out] as torch's weight reshaped to [out, in k]."""
    return np.asarray(kernel, np.float64).transpose(2, 1, 0).reshape(kernel.shape[2], -1)


def each_conv(params, spectral):
    for head, convs in spectral.items():
        for name, uv in convs.items():
            yield params[head][name]["kernel"], uv


# --- Spectral norm


def test_spectral_norm_converges_to_the_svd():
    params, spectral = draw_heads(draw_features())
    many = jax.jit(
        lambda s: jax.lax.fori_loop(
            0, 400, lambda _, s: discriminator.update_spectral(params, s), s
        )
    )
    converged = many(spectral)
    for kernel, uv in each_conv(params, converged):
        largest = np.linalg.svd(as_matrix(kernel), compute_uv=False)[0]
        assert float(discriminator.spectral_norm(kernel, uv)) == pytest.approx(largest, rel=1e-5)
    # The start is already close, from below.
    for kernel, uv in each_conv(params, spectral):
        largest = np.linalg.svd(as_matrix(kernel), compute_uv=False)[0]
        assert 0.9 * largest < float(discriminator.spectral_norm(kernel, uv)) <= largest * 1.00001


def test_one_power_iteration_is_torchs():
    params, spectral = draw_heads(draw_features())
    updated = discriminator.update_spectral(params, spectral)
    assert jax.tree.structure(updated) == jax.tree.structure(spectral)
    pairs = zip(each_conv(params, spectral), each_conv(params, updated), strict=True)
    for (kernel, before), (_, after) in pairs:
        matrix = as_matrix(kernel)
        v = matrix.T @ np.asarray(before["u"])
        v /= max(np.linalg.norm(v), 1e-12)
        u = matrix @ v
        u /= max(np.linalg.norm(u), 1e-12)
        k, inputs = before["v"].shape
        expected = v.reshape(inputs, k).T
        np.testing.assert_allclose(after["v"], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(after["u"], u, rtol=0, atol=1e-6)


def test_vectors_are_constants_and_the_norm_has_a_gradient():
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4, 5)), jnp.float32)
    uv = {"u": jnp.linspace(0.1, 1, 5), "v": jnp.linspace(-1, 1, 12).reshape(3, 4)}
    target = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, 5)), jnp.float32)

    def loss(kernel, uv):
        return jnp.vdot(kernel / discriminator.spectral_norm(kernel, uv), target)

    to_kernel, to_vectors = jax.grad(loss, argnums=(0, 1))(kernel, uv)
    assert all(not leaf.any() for leaf in jax.tree.leaves(to_vectors))
    w, a = np.asarray(kernel, np.float64), np.asarray(target, np.float64)
    outer = np.asarray(uv["v"])[..., None] * np.asarray(uv["u"])
    sigma = (w * outer).sum()
    expected = a / sigma - (a * w).sum() / sigma**2 * outer
    np.testing.assert_allclose(to_kernel, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_only_update_spectral_moves_the_vectors():
    features = draw_features()
    params, spectral = draw_heads(features)
    variables = jax.eval_shape(
        lambda: DiscriminatorHeads().init(jax.random.key(0), features, spectral)
    )
    assert set(variables) == {"params"}  # no hidden state that a forward pass could change
    gradient = jax.jit(
        jax.grad(lambda s: DiscriminatorHeads().apply({"params": params}, features, s).sum())
    )(spectral)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))
    # Twice the kernels: other norms, the same logits, once the vectors have followed.
    doubled = jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim == 3 else leaf, params)
    run = jax.jit(lambda p: DiscriminatorHeads().apply({"params": p}, features, spectral))
    np.testing.assert_allclose(run(doubled), run(params), rtol=0, atol=1e-5)
    through = jax.grad(
        lambda p: sum(x.sum() for x in jax.tree.leaves(discriminator.update_spectral(p, spectral)))
    )(params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(through))


# --- Local batch norm


def local_batch_norm(x, weight, bias, sizes):
    out, start = np.zeros_like(x), 0
    for size in sizes:
        group = x[start : start + size]
        mean, variance = group.mean((0, 1)), group.var((0, 1))
        out[start : start + size] = (group - mean) / np.sqrt(variance + 1e-5) * weight + bias
        start += size
    assert start == len(x)
    return out


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (1, [1]),
        (3, [3]),
        (8, [8]),
        (9, [5, 4]),
        (15, [8, 7]),
        (16, [8, 8]),
        (17, [6, 6, 5]),
        (24, [8, 8, 8]),
    ],
)
def test_local_batch_norm(batch, sizes):
    random = np.random.default_rng(batch)
    # Samples of very different scale, so that a wrong group shows.
    x = (random.standard_normal((batch, 5, 3)) + 1) * (1 + np.arange(batch)[:, None, None])
    weight, bias = random.standard_normal(3), random.standard_normal(3)
    params = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    actual = LocalBatchNorm().apply({"params": params}, jnp.asarray(x, jnp.float32))
    expected = local_batch_norm(x, weight, bias, sizes)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_local_batch_norm_in_bfloat16_computes_in_float32():
    x = jnp.asarray(3 + np.random.default_rng(0).standard_normal((16, 9, 4)), jnp.bfloat16)
    params = {"weight": jnp.full(4, 1.3), "bias": jnp.full(4, 0.2)}
    actual = LocalBatchNorm().apply({"params": params}, x)
    assert actual.dtype == jnp.bfloat16
    expected = local_batch_norm(np.asarray(x, np.float64), 1.3, 0.2, [8, 8])
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-7, atol=1e-5)


def test_token_norm_sees_one_token():
    random = np.random.default_rng(0)
    x, weight, bias = random.standard_normal((3, 5, 4)) * 7 + 2, *random.standard_normal((2, 4))
    params = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    actual = TokenNorm().apply({"params": params}, jnp.asarray(x, jnp.float32))
    centered = x - x.mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_only_heads_with_batch_norm_let_images_of_a_batch_see_each_other():
    features = draw_features(batch=4)
    params, spectral = draw_heads(features)

    def logits(token_norm, rows):
        heads = DiscriminatorHeads(token_norm=token_norm)
        return heads.apply({"params": params}, tuple(f[rows] for f in features), spectral)

    alone = jnp.concatenate([logits(True, slice(i, i + 1)) for i in range(4)])
    np.testing.assert_allclose(alone, logits(True, slice(None)), rtol=0, atol=1e-5)
    gap = jnp.abs(logits(False, slice(0, 1)) - logits(False, slice(None))[:1])
    assert gap.max() > 0.1


# --- Convolutions and whole heads


def wrapped_convolution(x, kernel, bias):
    """y[n] = bias + sum_i kernel[i] x[n + i - k // 2], tokens wrapping around, in numpy."""
    k = kernel.shape[0]
    y = np.zeros((*x.shape[:2], kernel.shape[2])) + bias
    for n in range(x.shape[1]):
        for i in range(k):
            y[:, n] += x[:, (n + i - k // 2) % x.shape[1]] @ kernel[i]
    return y


@pytest.mark.parametrize("tokens", [4, 9, 20])
def test_convolution_wraps_around(tokens):
    random = np.random.default_rng(0)
    x, kernel = random.standard_normal((2, tokens, 3)), random.standard_normal((9, 3, 4))
    bias = random.standard_normal(4)
    uv = {"u": random.standard_normal(4), "v": random.standard_normal((9, 3))}
    sigma = np.einsum("kio,ki,o->", kernel, uv["v"], uv["u"])
    single = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    params = {"kernel": single(kernel), "bias": single(bias)}
    layer = SpectralConv1d(4, 9, jnp.float32)
    actual = layer.apply({"params": params}, single(x), jax.tree.map(single, uv))
    expected = wrapped_convolution(x, kernel / sigma, bias)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def derive_head(p, uv, x, sizes):
    def conv(name, x):
        kernel = np.asarray(p[name]["kernel"], np.float64)
        u, v = (np.asarray(uv[name][k], np.float64) for k in ("u", "v"))
        sigma = np.einsum("kio,ki,o->", kernel, v, u)
        return wrapped_convolution(x, kernel / sigma, np.asarray(p[name]["bias"]))

    def stage(name, x):
        norm = p[f"{name}_norm"]
        y = conv(f"{name}_conv", x)
        y = local_batch_norm(y, np.asarray(norm["weight"]), np.asarray(norm["bias"]), sizes)
        return np.where(y > 0, y, 0.2 * y)

    x = stage("main_0", x)
    x = (stage("main_1", x) + x) / math.sqrt(2)
    return conv("cls", x)[..., 0]


@pytest.mark.parametrize(("batch", "sizes"), [(3, [3]), (9, [5, 4])])
def test_heads_equal_the_derivation(batch, sizes):
    features = draw_features(batch)
    params, spectral = draw_heads(features)
    logits = jax.jit(DiscriminatorHeads().apply)({"params": params}, features, spectral)
    assert logits.shape == (batch, 2 * 3 * 4)
    assert logits.dtype == jnp.float32
    expected = [
        derive_head(
            params[name], spectral[name], np.asarray(x, np.float64).reshape(batch, 12, -1), sizes
        )
        for name, x in zip(("heads_0", "heads_1"), features, strict=True)
    ]
    np.testing.assert_allclose(logits, np.concatenate(expected, 1), rtol=0, atol=2e-5)


def test_heads_in_bfloat16():
    features = draw_features(4)
    params, spectral = draw_heads(features)
    run = lambda dtype: jax.jit(DiscriminatorHeads(dtype).apply)(  # noqa: E731
        {"params": params}, features, spectral
    )
    exact, rough = run(jnp.float32), run(jnp.bfloat16)
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.03


@pytest.mark.parametrize(("width", "count"), [(1152, 13_279_105), (2240, 50_191_681)])
def test_published_sizes(width, count):
    features = [jax.ShapeDtypeStruct((2, 2, 2, width), jnp.bfloat16)] * 4
    heads = jax.eval_shape(discriminator.init_heads, tuple(features), jax.random.key(0))
    params, spectral = heads["params"], heads["spectral"]
    assert set(params) == set(spectral) == {f"heads_{i}" for i in range(4)}
    for name in params:
        shapes = jax.tree.map(lambda leaf: leaf.shape, params[name])
        assert shapes == {
            "main_0_conv": {"kernel": (1, width, width), "bias": (width,)},
            "main_0_norm": {"weight": (width,), "bias": (width,)},
            "main_1_conv": {"kernel": (9, width, width), "bias": (width,)},
            "main_1_norm": {"weight": (width,), "bias": (width,)},
            "cls": {"kernel": (1, width, 1), "bias": (1,)},
        }
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[name])) == count
        assert {leaf.dtype for leaf in jax.tree.leaves(heads)} == {jnp.dtype("float32")}
        assert jax.tree.map(lambda leaf: leaf.shape, spectral[name]) == {
            "main_0_conv": {"u": (width,), "v": (1, width)},
            "main_1_conv": {"u": (width,), "v": (9, width)},
            "cls": {"u": (1,), "v": (1, width)},
        }


def test_init_is_a_function_of_the_key():
    features = draw_features()
    init = jax.jit(discriminator.init_heads)
    one, same, other = (init(features, jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, same))
    kernels = [leaf for leaf in jax.tree.leaves(one["params"]) if leaf.ndim == 3]
    others = [leaf for leaf in jax.tree.leaves(other["params"]) if leaf.ndim == 3]
    assert all(bool((a != b).any()) for a, b in zip(kernels, others, strict=True))
    # Two heads of the same shape start apart.
    first, second = (one["params"][f"heads_{i}"]["main_1_conv"]["kernel"] for i in range(2))
    assert bool((first != second).any())
    bound = 1 / math.sqrt(9 * WIDTH)  # torch's default for a convolution
    assert 0.9 * bound < float(jnp.abs(first).max()) <= bound


def test_kinds_of_eight_images_may_have_a_batch_of_their_own():
    """Published code puts fakes and misaligned pairs into one batch; its norm never mixes them."""
    fakes, pairs = draw_features(batch=8, seed=1), draw_features(batch=16, seed=2)
    params, spectral = draw_heads(fakes)
    run = jax.jit(
        lambda features: DiscriminatorHeads().apply({"params": params}, features, spectral)
    )
    both = run(tuple(jnp.concatenate(pair) for pair in zip(fakes, pairs, strict=True)))
    apart = np.concatenate([run(fakes), run(pairs)])
    np.testing.assert_allclose(apart, both, atol=2e-6)
