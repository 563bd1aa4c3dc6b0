"""The depthwise convolution and its derivatives against XLA's grouped one."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sprint_jax.models.depthwise import depthwise_conv3x3

SHAPES = [(2, 5, 7, 6), (2, 4, 12, 5), (1, 1, 9, 3), (2, 6, 1, 4), (1, 1, 1, 1)]


def grouped_convolution(x, kernel, bias):
    how = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
    how |= dict(window_strides=(1, 1), padding="SAME", feature_group_count=x.shape[-1])
    y = jax.lax.conv_general_dilated(x, kernel[:, :, None], **how)
    return bias.reshape(1, 1, 1, -1) + y


def make_arguments(shape, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    shapes = [shape, (3, 3, shape[-1]), shape[-1:]]
    return tuple(jnp.asarray(random.normal(size=each), dtype) for each in shapes)


def agree(actual, expected, limit=1e-6):
    chex.assert_trees_all_equal_dtypes(actual, expected)
    assert_close(actual, expected, limit)


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


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [pytest.param(np.float32, 1e-6, marks=pytest.mark.slow), (np.float64, 1e-12)],
)
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_agrees_with_grouped_convolution(derivative, dtype, limit):
    with jax.enable_x64(dtype == np.float64):
        compute = jax.jit(derivative, static_argnums=0)
        for shape in SHAPES if dtype == np.float32 else SHAPES[:2]:
            both = make_arguments(shape, dtype), make_arguments(shape, dtype, seed=1)
            agree(compute(depthwise_conv3x3, *both), compute(grouped_convolution, *both), limit)


def test_bfloat16_is_rounded_once():
    arguments = make_arguments((4, 8, 8, 6), jnp.bfloat16)
    exact = [np.asarray(each, np.float32) for each in arguments]
    cotangent = make_arguments((4, 8, 8, 6), jnp.bfloat16, seed=1)[0]
    actual = gradients(depthwise_conv3x3, arguments, cotangent)[:2]
    expected = gradients(grouped_convolution, exact, np.asarray(cotangent, np.float32))[:2]
    actual += (depthwise_conv3x3(*arguments[:2], jnp.zeros(6)),)
    expected += (grouped_convolution(*exact[:2], np.zeros(6, np.float32)),)
    assert {leaf.dtype for leaf in actual} == {jnp.dtype("bfloat16")}
    # bfloat16 keeps 8 bits: one rounding is at most 2^-9 of the entry, sums in bfloat16 lose more.
    actual = tuple(leaf.astype(jnp.float32) for leaf in actual)
    chex.assert_trees_all_close(actual, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 2, 1), (3, 0, 0), (4, 3, None)], ids=str)
@pytest.mark.parametrize(
    "derivative", ["value", "jvp", pytest.param("gradient", marks=pytest.mark.slow)]
)
def test_vmap(axes, derivative):
    stacked = zip(*(make_arguments((2, 4, 5, 6), seed=seed) for seed in range(3)), strict=True)
    arguments = tuple(
        leaves[0] if axis is None else jnp.stack(leaves, axis)
        for leaves, axis in zip(stacked, axes, strict=True)
    )
    tangents = make_arguments((2, 4, 5, 6), seed=9)

    def compute(convolution):
        one = lambda *args: DERIVATIVES[derivative](convolution, args, tangents)  # noqa: E731
        return jax.vmap(one, in_axes=axes)(*arguments)

    agree(compute(depthwise_conv3x3), compute(grouped_convolution))


def test_batch_sharded_over_eight_devices():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    arguments = (*make_arguments((16, 4, 4, 6)), make_arguments((16, 4, 4, 6), seed=1)[0])
    compute = jax.jit(lambda *args: gradients(depthwise_conv3x3, args[:3], args[3]))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    sharded = jax.device_put(arguments, (rows, whole, whole, rows))
    actual = compute(*sharded)
    assert actual[0].sharding.is_equivalent_to(rows, 4)
    agree(actual, compute(*arguments))
    program = compute.lower(*sharded).compile().as_text()
    found = [name for name in ("all-reduce", "all-gather", "all-to-all") if name in program]
    assert found == ["all-reduce"]


@pytest.mark.parametrize("derivative", ["value", "jvp", "gradient"])
def test_accelerators_run_convolutions(derivative):
    arguments = make_arguments((2, 4, 4, 6))
    compute = jax.jit(lambda *args: DERIVATIVES[derivative](depthwise_conv3x3, args, args))
    for platform in ("tpu", "cuda", "rocm", "cpu"):
        program = compute.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in program) == (platform != "cpu")
        assert (program.count("stablehlo.multiply") < 9) == (platform != "cpu")


def test_weight_gradient_on_cpu_is_one_reduction():
    """Autodiff of nine shifts makes nine reductions over the image, the reason for this module."""
    x, kernel, bias = make_arguments((2, 12, 12, 6))
    compute = jax.jit(lambda *args: gradients(depthwise_conv3x3, args, args[0])[1])
    program = compute.lower(x, kernel, bias).compile().as_text()
    assert len(re.findall(r" reduce\(.*dimensions=\{(?:0,)?1,2\}", program)) == 1


def test_saves_only_its_arguments_for_the_backward_pass():
    x, kernel, bias = make_arguments((2, 4, 4, 6))
    _, backward = jax.vjp(depthwise_conv3x3, x, kernel, bias)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(backward) if leaf.size > 1)
    assert shapes == sorted([x.shape, kernel.shape])


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_wrong_shapes_are_refused(wrong):
    shapes = [(1, 2, 4, 6), (3, 3, 6), (6,)]
    shapes[wrong] = shapes[wrong][1:] if wrong == 0 else (*shapes[wrong][:-1], 5)
    with pytest.raises(AssertionError, match=re.escape(str(shapes[wrong]).rstrip(",)"))):
        depthwise_conv3x3(*map(jnp.zeros, shapes))
