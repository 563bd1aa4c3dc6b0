"""Float32 that is float32 on accelerators, and their branches beside the CPU's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.accelerators import BFLOAT16, TF32, on_accelerator, rounded_products
from helpers.compare import assert_close
from helpers.runs import ROOT, TINY
from helpers.tiny_sana import STUDENT, cast, setup
from helpers.workdirs import slow_time_params, tiny_config

from sprint_jax.core.config import load_config
from sprint_jax.interop.diffusers import load_autoencoder
from sprint_jax.interop.gemma2 import load_text_encoder
from sprint_jax.models import functions
from sprint_jax.models.convolution import convolve, depthwise_conv, upsampled_conv3x3
from sprint_jax.models.depthwise import depthwise_conv3x3
from sprint_jax.models.discriminator import DiscriminatorHeads, init_heads, update_spectral
from sprint_jax.models.layers import TimeEmbedding
from sprint_jax.models.sana import from_fields
from sprint_jax.parallel.sharding import make_mesh
from sprint_jax.training.diagnostics import tangent_checks
from sprint_jax.training.setup import abstract_run
from sprint_jax.training.stages import stage_of
from sprint_jax.training.updates import check_tangent

pytestmark = pytest.mark.usefixtures("quick")

STORED = ROOT / "tests" / "parity" / "stored"


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# --- The helpers


@pytest.mark.parametrize(("bits", "error"), [(TF32, 2**-11), (BFLOAT16, 2**-8)])
def test_default_products_are_rounded_at_any_depth(bits, error):
    a, b = draw(16, 16), draw(16, 16, seed=1)

    def loop(precision):
        def step(x, _):
            return jax.checkpoint(lambda x: jnp.dot(x, b, precision=precision) / 4)(x), x.sum()

        return jax.jit(lambda a: jax.lax.scan(step, a, None, length=2))

    for precision, rounded in ((None, True), ("default", True), ("high", True), ("highest", False)):
        function = loop(precision)
        assert len(rounded_products(function, a)) == rounded
        found, exact = on_accelerator(function, bits)(a)[0], function(a)[0]
        gap = float(jnp.abs(found - exact).max() / jnp.abs(exact).max())
        assert error / 8 < gap < 4 * error if rounded else gap == 0


# --- Networks


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def sana(dtype):
    _, params, inputs = setup((2, 2))
    model = from_fields(STUDENT | {"flow_map": True}, dtype=dtype)
    embed = params["time_embed"]
    embed = embed | {"target_timestep_embedder": embed["guidance_embedder"]}
    params, (x, t, *rest) = cast((params | {"time_embed": embed}, inputs), jnp.float32)

    def run(params, x, t):
        return model.apply({"params": params}, x, t, *rest, target=t / 2, with_logvar=True)

    return run, (params, x, t)


def heads(dtype):
    features = (jax.ShapeDtypeStruct((4, 2, 2, 6), dtype),)
    made = jax.eval_shape(init_heads, features, jax.random.key(0))

    def run(made, features):
        spectral = update_spectral(made["params"], made["spectral"])
        critic = DiscriminatorHeads(jnp.dtype(dtype))
        return critic.apply({"params": made["params"]}, features, spectral)

    return run, (made, features)


def text_encoder(dtype):
    gemma, params = load_text_encoder(STORED / "gemma2" / "text_encoder", dtype)
    gemma = dataclasses.replace(gemma, dtype=jnp.dtype(dtype))
    ids = np.arange(6).reshape(2, 3)
    return lambda params: gemma.encode(params, ids, np.ones_like(ids)), (params,)


def autoencoder(dtype):
    config, params = load_autoencoder(STORED / "dc_ae", dtype)
    config = dataclasses.replace(config, dtype=jnp.dtype(dtype))
    run = lambda params, x: config.decode(params, config.encode(params, x))  # noqa: E731
    return run, (params, draw(1, 16, 16, 3))


NETWORKS = {f.__name__: f for f in (sana, heads, text_encoder, autoencoder)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_no_float32_product_of_a_network_may_be_rounded(network, dtype):
    function, arguments = network(dtype)
    shapes = shapes_of(arguments)
    assert rounded_products(function, *shapes) == []
    assert rounded_products(lambda *a: jax.jvp(function, a, a), *shapes) == []

    def loss(*arguments):
        return sum(leaf.sum() for leaf in jax.tree.leaves(function(*arguments)))

    assert rounded_products(jax.grad(loss), *shapes) == []


def test_no_float32_product_of_a_step_may_be_rounded():
    changes = TINY | {"ladd.taps": (1,), "model.dtype": "bfloat16"}
    c = load_config(str(ROOT / "configs/digits.py:student,small,sprint"), changes)
    nets, *arrays = abstract_run(c, make_mesh(1, 1, devices=jax.devices()[:1]))
    for update in (*stage_of(c).updates(c), check_tangent):
        assert rounded_products(functools.partial(update, nets, c), *shapes_of(arrays)) == []


def test_teacher_checks_and_the_jvp_of_a_run_measure_the_network():
    """The central difference divides by 0.01 what rounding leaves."""
    fields = tiny_config("flow")["model"] | {"num_layers": 1}
    params = jax.tree.map(lambda leaf: 0.5 * np.asarray(leaf), slow_time_params(fields, 1))
    x, text, mask = draw(2, 4, 4, 12), draw(2, 5, 64, seed=1), jnp.ones((2, 5), jnp.int32)
    model = from_fields(fields)

    def F(dtype):
        return functions.trigflow(functions.in_dtype(model, dtype), params, text, mask)

    def check(x, t, dx, dt):
        return tangent_checks(F("float32"), F("bfloat16"), x, t, dx, dt)["check/jvp"]

    arguments = x, jnp.full(2, 0.7), draw(2, 4, 4, 12, seed=2) / 2, jnp.full(2, 0.5)
    expected = float(jax.jit(check)(*arguments))
    assert expected < 0.01
    for bits in (TF32, BFLOAT16):
        assert float(on_accelerator(check, bits)(*arguments)) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("bits", [TF32, BFLOAT16], ids=["tf32", "bfloat16"])
def test_time_guidance_and_logvar_are_float32_in_a_bfloat16_network(bits):
    _, params, (_, t, _, _, guidance) = setup()
    params, t, guidance = cast((params, t, guidance), jnp.float32)
    embed = TimeEmbedding(STUDENT["num_attention_heads"] * STUDENT["attention_head_dim"], True)
    run = functools.partial(embed.apply, {"params": params["time_embed"]})
    assert_close(on_accelerator(run, bits)(t, guidance), run(t, guidance), 1e-6)
    function, arguments = sana("bfloat16")
    # The head of logvar reads the embedding alone.
    logvar = lambda *arguments: function(*arguments)[1]  # noqa: E731
    found = on_accelerator(logvar, bits)(*arguments)
    np.testing.assert_allclose(found, jax.jit(logvar)(*arguments), rtol=1e-6)


# --- Branches for accelerators


def plain_upsampling(x, kernel):
    return convolve(x.repeat(2, 1).repeat(2, 2), kernel)


def depthwise_3x3(x, kernel):
    return depthwise_conv3x3(x, kernel, kernel[1, 1])


BRANCHES = {  # the function on a CPU, that of an accelerator, and the kernel's shape
    "upsampling": (upsampled_conv3x3, on_accelerator(plain_upsampling, TF32), (3, 3, 6, 4)),
    "depthwise 5x5": (depthwise_conv, on_accelerator(depthwise_conv, TF32), (5, 5, 6)),
    "depthwise 3x3": (depthwise_3x3, on_accelerator(depthwise_3x3, TF32), (3, 3, 6)),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_for_accelerators_agree_with_those_of_the_cpu(name):
    cpu, accelerator, shape = BRANCHES[name]
    arguments = draw(2, 5, 7, 6), draw(*shape, seed=1)
    tangents = draw(2, 5, 7, 6, seed=2), draw(*shape, seed=3)

    def everything(function):
        @jax.jit
        def run(arguments, tangents):
            out, tangent = jax.jvp(function, arguments, tangents)
            loss = lambda *a: jnp.square(function(*a)).sum()  # noqa: E731
            both = lambda a: jax.jvp(jax.grad(loss, (0, 1)), a, tangents)  # noqa: E731
            return out, tangent, both(arguments)

        return run

    found, program = everything(accelerator), str(jax.make_jaxpr(accelerator)(*arguments))
    assert "conv_general_dilated" in program and "depthwise_convolve" not in program
    assert_close(found(arguments, tangents), everything(cpu)(arguments, tangents), 2e-6)
