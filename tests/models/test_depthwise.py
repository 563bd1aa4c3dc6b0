import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sprint_jax.models.depthwise import depthwise_conv3x3

SHAPES = [(2, 5, 7, 6), (3, 8, 8, 4), (2, 4, 12, 5), (1, 1, 9, 3), (2, 6, 1, 4), (1, 1, 1, 1)]
FLOAT32_TOLERANCE = 1e-6
FLOAT64_TOLERANCE = 1e-12


def grouped_convolution(x, kernel, bias):
    return bias.reshape(1, 1, 1, -1) + jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision="highest",
    )


def make_arguments(shape, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    shapes = [shape, (3, 3, shape[-1]), shape[-1:]]
    return tuple(jnp.asarray(random.normal(size=each), dtype) for each in shapes)


def assert_close(actual, expected, tolerance):
    """Compares trees leaf by leaf; errors are relative to the largest entry of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        scale = np.abs(other).max()
        assert scale > 0
        np.testing.assert_allclose(one / scale, other / scale, rtol=0, atol=tolerance)


def gradients(convolution, arguments, cotangent):
    loss = lambda *args: jnp.vdot(convolution(*args).astype(cotangent.dtype), cotangent)  # noqa: E731
    return jax.grad(loss, argnums=(0, 1, 2))(*arguments)


def tangent_matching_loss(convolution, arguments, tangents):
    """The shape of the sCM loss: the gradient goes through the primal of a jvp alone."""

    def loss(kernel, bias):
        x, dx = arguments[0], tangents[0]
        y, dy = jax.jvp(lambda x: jnp.tanh(convolution(jnp.sin(x), kernel, bias)), (x,), (dx,))
        return jnp.mean(jnp.square(y - jax.lax.stop_gradient(y + dy)) * (1 + jnp.square(y)))

    return jax.grad(loss, argnums=(0, 1))(*arguments[1:])


def tangent_gradient(convolution, arguments, tangents):
    """A gradient through the tangent too: the derivative of the derivative."""

    def loss(*arguments):
        y, dy = jax.jvp(lambda *args: jnp.tanh(convolution(*args) / 8), arguments, tangents)
        return jnp.mean(jnp.square(dy) * y)

    return jax.grad(loss, argnums=(0, 1, 2))(*arguments)


DERIVATIVES = {
    "value": lambda f, arguments, tangents: f(*arguments),
    "jvp": lambda f, arguments, tangents: jax.jvp(f, arguments, tangents),
    "gradient": lambda f, arguments, tangents: gradients(f, arguments, tangents[0]),
    "reverse over forward": tangent_matching_loss,
    "through the tangent": tangent_gradient,
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_agrees_with_grouped_convolution_float32(derivative):
    for shape in SHAPES:
        arguments, tangents = make_arguments(shape), make_arguments(shape, seed=1)
        actual = jax.jit(derivative, static_argnums=0)(depthwise_conv3x3, arguments, tangents)
        expected = jax.jit(derivative, static_argnums=0)(grouped_convolution, arguments, tangents)
        assert_close(actual, expected, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_agrees_with_grouped_convolution_float64(derivative):
    with jax.enable_x64(True):
        for shape in [(2, 5, 7, 6), (2, 4, 12, 5)]:
            arguments = make_arguments(shape, np.float64)
            tangents = make_arguments(shape, np.float64, seed=1)
            actual = derivative(depthwise_conv3x3, arguments, tangents)
            expected = derivative(grouped_convolution, arguments, tangents)
            assert_close(actual, expected, FLOAT64_TOLERANCE)


def test_bfloat16_is_rounded_once():
    shape = (4, 8, 8, 6)
    arguments = make_arguments(shape, jnp.bfloat16)
    exact = [np.asarray(each, np.float32) for each in arguments]
    cotangent = make_arguments(shape, jnp.bfloat16, seed=1)[0]
    actual = gradients(depthwise_conv3x3, arguments, cotangent)
    expected = gradients(grouped_convolution, exact, np.asarray(cotangent, np.float32))
    # bfloat16 keeps 8 bits: one rounding is at most 2^-9 of the entry, sums in bfloat16 lose more.
    for one, other in zip(actual[:2], expected[:2], strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=2**-8, atol=1e-6)
    value = depthwise_conv3x3(*arguments[:2], jnp.zeros(6))
    assert value.dtype == jnp.bfloat16
    expected_value = grouped_convolution(*exact[:2], np.zeros(6, np.float32))
    np.testing.assert_allclose(np.asarray(value, np.float32), expected_value, rtol=2**-8, atol=1e-6)


def test_is_a_cross_correlation_with_zero_padding():
    """Torch's order: kernel[0, 0] weighs the neighbour above and to the left."""
    x = jnp.zeros((1, 3, 3, 1)).at[0, 0, 0, 0].set(1.0)
    kernel = jnp.arange(1.0, 10.0).reshape(3, 3, 1)
    y = depthwise_conv3x3(x, kernel, jnp.full((1,), 100.0))[0, :, :, 0]
    np.testing.assert_array_equal(y, [[105, 104, 100], [102, 101, 100], [100, 100, 100]])


@pytest.mark.parametrize("derivative", ["gradient", "reverse over forward"])
def test_stack_under_scan_and_checkpoint(derivative):
    """Three blocks that share a shape, each convolving twice, under scan and checkpoint."""
    _, kernel, bias = make_arguments((3, 1, 1, 5))
    kernels, biases = jnp.stack([kernel, -kernel, 2 * kernel]) / 3, jnp.stack([bias] * 3)

    def stack(convolution, wrap):
        def block(x, weights):
            x = x + jnp.tanh(convolution(x, *weights))
            return convolution(x, *weights) / 4, None

        return lambda x, kernels, biases: jax.lax.scan(wrap(block), x, (kernels, biases))[0]

    x, dx = (make_arguments((2, 4, 6, 5), seed=seed)[0] for seed in (2, 3))
    arguments, tangents = (x, kernels, biases), (dx, kernels, biases)
    compute = jax.jit(DERIVATIVES[derivative], static_argnums=0)
    actual = compute(stack(depthwise_conv3x3, jax.checkpoint), arguments, tangents)
    expected = compute(stack(grouped_convolution, lambda block: block), arguments, tangents)
    assert_close(actual, expected, 5e-6)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 2, 1), (3, 0, 0), (4, 3, None)], ids=str)
@pytest.mark.parametrize("derivative", ["value", "jvp", "gradient"])
def test_vmap(axes, derivative):
    size = 3
    stacked = [make_arguments((2, 4, 5, 6), seed=seed) for seed in range(size)]
    arguments = tuple(
        leaves[0] if axis is None else jnp.stack(leaves, axis)
        for leaves, axis in zip(zip(*stacked, strict=True), axes, strict=True)
    )
    tangents = make_arguments((2, 4, 5, 6), seed=9)

    def compute(convolution):
        one = lambda *args: DERIVATIVES[derivative](convolution, args, tangents)  # noqa: E731
        return jax.vmap(one, in_axes=axes)(*arguments)

    assert_close(compute(depthwise_conv3x3), compute(grouped_convolution), FLOAT32_TOLERANCE)


def test_batch_sharded_over_eight_devices():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    arguments = make_arguments((16, 4, 4, 6))
    cotangent = make_arguments((16, 4, 4, 6), seed=1)[0]
    compute = jax.jit(lambda *args: gradients(depthwise_conv3x3, args[:3], args[3]))
    expected = compute(*arguments, cotangent)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    sharded = jax.device_put((*arguments, cotangent), (rows, whole, whole, rows))
    actual = compute(*sharded)
    assert actual[0].sharding.is_equivalent_to(rows, 4)
    assert_close(jax.device_get(actual), jax.device_get(expected), FLOAT32_TOLERANCE)
    program = compute.lower(*sharded).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program
    assert "all-to-all" not in program


@pytest.mark.parametrize("derivative", ["value", "jvp", "gradient"])
def test_accelerators_run_convolutions(derivative):
    arguments = make_arguments((2, 4, 4, 6))
    compute = jax.jit(lambda *args: DERIVATIVES[derivative](depthwise_conv3x3, args, args))
    for platform in ("tpu", "cuda", "rocm"):
        program = compute.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.convolution" in program
        assert program.count("stablehlo.multiply") < 9
    program = compute.trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.convolution" not in program
    assert program.count("stablehlo.multiply") >= 9


def test_weight_gradient_on_cpu_is_one_reduction():
    """Autodiff of nine shifts makes nine reductions over the image, the reason for this module."""
    x, kernel, bias = make_arguments((2, 12, 12, 6))
    compute = jax.jit(lambda *args: gradients(depthwise_conv3x3, args, args[0])[1])
    program = compute.lower(x, kernel, bias).compile().as_text()
    assert len(re.findall(r" reduce\(.*dimensions=\{(?:0,)?1,2\}", program)) == 1


def test_export_holds_every_platform():
    arguments = make_arguments((2, 4, 4, 6))
    compute = jax.jit(lambda *args: gradients(depthwise_conv3x3, args, args[0]))
    exported = jax.export.export(compute, platforms=("cpu", "cuda", "tpu"))(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert_close(exported.call(*arguments), compute(*arguments), FLOAT32_TOLERANCE)


def test_saves_only_its_arguments_for_the_backward_pass():
    x, kernel, bias = make_arguments((2, 4, 4, 6))
    _, backward = jax.vjp(depthwise_conv3x3, x, kernel, bias)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(backward) if leaf.size > 1)
    assert shapes == sorted([x.shape, kernel.shape])


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 4, 6), (3, 3, 6), (6,)],
        [(1, 2, 4, 6), (3, 3, 5), (6,)],
        [(1, 2, 4, 6), (3, 3, 6), (5,)],
    ],
)
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="depthwise_conv3x3 takes x"):
        depthwise_conv3x3(*map(jnp.zeros, shapes))
