"""The inference form of the transformer: the plain form's latents, nothing constant, few kernels on a GPU."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gpu_programs as gpu
from helpers.jaxprs import constant_work
from helpers.workdirs import random_params, tiny_config

from sprint_jax import SprintPipeline
from sprint_jax.digits.encoders import digits_parts
from sprint_jax.models.control import WIRINGS, Control
from sprint_jax.models.inference import transformer
from sprint_jax.models.sana import SIZES, SanaTransformer, from_fields

pytestmark = pytest.mark.usefixtures("quick")

PROMPTS = ["a red 3 on blue", "a 7"]


def pipeline(student: bool, arranged: bool, **changes) -> SprintPipeline:
    fields = tiny_config("distill" if student else "flow")["model"]
    fields = dict(fields) | {"qk_norm": True, "guidance_embeds": student} | changes
    how = dict(is_student=student, sigma_d=0.5, shift=1.0, midpoint=1.3, guidance=3.0)
    parts = from_fields(fields), random_params(fields, 1), *digits_parts("small")[:2]
    return SprintPipeline(*parts, size=(8, 8), arranged=arranged, **how)


@pytest.mark.parametrize("student", [True, False])
def test_latents_and_pictures_are_those_of_the_plain_form(student):
    plain, arranged = (pipeline(student, each) for each in (False, True))
    text, mask = plain.encode_text(PROMPTS)
    steps = 2 if student else 3
    noise, _ = plain.draw_noise(1, np.arange(2), plain.latent_shape(), steps)
    expected, found = (each.denoise(text, mask, noise, steps=steps) for each in (plain, arranged))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    pictures = [
        np.asarray([np.asarray(picture, int) for picture in each(PROMPTS, steps=steps)])
        for each in (plain, arranged)
    ]
    difference = np.abs(pictures[0] - pictures[1])
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
    # What export and a server look at stays the plain form.
    assert jax.tree.structure(arranged.params) == jax.tree.structure(plain.params)


@pytest.mark.slow
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("student", [True, False])
def test_a_control_branch_steers_as_in_the_plain_form(student, wiring):
    changes = dict(num_layers=4, control_blocks=2, control_wiring=wiring, interpolation_scale=1.0)
    plain, arranged = (pipeline(student, each, **changes) for each in (False, True))
    text, mask = plain.encode_text(PROMPTS)
    noise, _ = plain.draw_noise(1, np.arange(2), plain.latent_shape(), 2)
    maps = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    condition = plain.encode_control(maps)
    for control, scale in ((None, 1.0), (condition, 0.0), (condition, np.array([0.5, 1.0]))):
        how = dict(steps=2, control=control, control_scale=scale)
        expected, found = (each.denoise(text, mask, noise, **how) for each in (plain, arranged))
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        if control is None:
            trunk, alone = expected, found
        elif np.ndim(scale) == 0:  # 0: the trunk's, bit for bit in float32
            np.testing.assert_array_equal(found, alone)
    assert np.abs(expected - trunk).max() > 0.01 * np.abs(trunk).max()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_stacked_blocks_have_a_branch_as_well(wiring):
    changes = dict(num_layers=4, control_blocks=2, control_wiring=wiring)
    pipe = pipeline(True, False, **changes)
    text, mask = pipe.encode_text(PROMPTS)
    x, latents = np.random.default_rng(0).normal(size=(2, 2, *pipe.latent_shape())).astype("f")
    t = np.full(2, 0.7, np.float32)
    guidance, control = jnp.full(2, 0.3), Control(latents, 0.8)
    found = []
    for unrolled in (True, False):
        ready = transformer.prepare(pipe.model, pipe.params, unrolled)
        shared = transformer.context(pipe.model, ready, text, mask, control)
        found.append(transformer.velocity(pipe.model, ready, shared, guidance)(x, t))
    expected = pipe.model.apply(
        {"params": pipe.params}, x, t, text, mask, guidance, control=control
    )
    for each in found:
        np.testing.assert_allclose(each, expected, atol=1e-4 * np.abs(expected).max())


def abstract(layers: int, attention=transformer.softmax_attention):
    """A 0.6B student with few blocks: the model, its arranged weights and its inputs at 1024 px, as shapes."""
    model = SanaTransformer(**(SIZES["600m"] | dict(num_layers=layers, dtype=jnp.bfloat16)))
    shape = jax.ShapeDtypeStruct
    text, mask = shape((1, 300, 2304), jnp.float32), shape((1, 300), jnp.int32)
    x, one = shape((1, 32, 32, 32), jnp.float32), shape((1,), jnp.float32)
    init = jax.eval_shape(model.init, jax.random.key(0), x, one, text, mask, one)["params"]
    params = jax.tree.map(lambda leaf: shape(leaf.shape, jnp.bfloat16), init)
    prepare = functools.partial(transformer.prepare, model, unrolled=True)
    ready = jax.eval_shape(prepare, params)
    shared = jax.eval_shape(functools.partial(transformer.context, model), ready, text, mask)

    def step(params, shared, x, t, guidance):
        return transformer.velocity(model, params, shared, guidance, attention)(x, t)

    return step, ready, (shared, x, one, one)


def abstract_control(layers: int, blocks: int):
    """As `abstract`, from text and condition to the velocity."""
    fields = dict(num_layers=layers, control_blocks=blocks, dtype=jnp.bfloat16)
    model = SanaTransformer(**(SIZES["600m"] | fields))
    shape = jax.ShapeDtypeStruct
    text, mask = shape((1, 300, 2304), jnp.float32), shape((1, 300), jnp.int32)
    x, one = shape((1, 32, 32, 32), jnp.float32), shape((1,), jnp.float32)
    init = jax.eval_shape(model.init, jax.random.key(0), x, one, text, mask, one)["params"]
    params = jax.tree.map(lambda leaf: shape(leaf.shape, jnp.bfloat16), init)
    ready = jax.eval_shape(functools.partial(transformer.prepare, model, unrolled=True), params)

    def step(ready, text, mask, latents, scale, x, t, guidance):
        shared = transformer.context(model, ready, text, mask, Control(latents, scale))
        attention = transformer.cudnn_attention
        return transformer.velocity(model, ready, shared, guidance, attention)(x, t)

    return step, ready, (text, mask, x, one, x, one, one)


def test_attention_is_cudnn_s_where_it_works(monkeypatch, capsys):
    """On devices that are described and not here, it is planned; of one that is here it is tried."""
    model = SanaTransformer(**(SIZES["600m"] | dict(num_layers=1, dtype=jnp.bfloat16)))
    card = dict(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    find = lambda **changes: transformer.attention_on(model, SimpleNamespace(**(card | changes)))  # noqa: E731
    assert find() is transformer.cudnn_attention
    for changes in (
        dict(compute_capability="7.5"),
        dict(device_kind="AMD MI300X"),
        dict(platform="tpu"),
    ):
        assert find(**changes) is transformer.softmax_attention
    exact = model.clone(dtype=jnp.float32)
    assert transformer.attention_on(exact, SimpleNamespace(**card)) is transformer.softmax_attention
    # A CPU has no cuDNN.
    assert not transformer.cudnn_agrees(model, jax.devices()[0])
    assert "without cuDNN" in capsys.readouterr().err
    monkeypatch.setattr(transformer, "cudnn_attention", transformer.softmax_attention)
    assert transformer.cudnn_agrees(model, jax.devices()[0])
    monkeypatch.setattr(transformer, "cudnn_attention", lambda q, *_: 0 * q)
    assert not transformer.cudnn_agrees(model, jax.devices()[0])


def test_nothing_is_computed_from_weights_alone():
    step, ready, inputs = abstract(1)
    assert constant_work(step, ready, *inputs) == []


@pytest.mark.skipif(not gpu.HAS_PLUGIN, reason="JAX's CUDA plugin is not installed")
def test_kernels_of_a_block_and_its_copy_on_an_h200():
    """With keys and values of the text in both."""
    counts = []
    for layers in (3, 4):
        step, ready, inputs = abstract_control(layers, blocks=layers - 2)
        counts.append(gpu.count(gpu.kernels(gpu.compile_for_h200(step, ready, *inputs).as_text())))
    assert counts[1] - counts[0] <= 44


@pytest.mark.skipif(not gpu.HAS_PLUGIN, reason="JAX's CUDA plugin is not installed")
def test_kernels_of_a_block_on_an_h200():
    counts, reads = [], []
    for layers in (1, 2):
        step, ready, inputs = abstract(layers, transformer.cudnn_attention)
        found = gpu.kernels(gpu.compile_for_h200(step, ready, *inputs).as_text())
        assert [each for each in found if each.constant] == []
        counts.append(gpu.count(found))
        reads.append(sum(each.weights for each in found))
    assert counts[1] - counts[0] <= 20
    # Every weight of a block is read once: none is copied, none is cast by a kernel of its own.
    used = dict(ready["blocks"][1]) | {"attn2": dict(ready["blocks"][1]["attn2"])}
    for name in ("to_k", "to_v", "norm_k"):  # of the text, once for all steps
        used["attn2"].pop(name)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(used))
    assert 0.99 * size < reads[1] - reads[0] < 1.01 * size
