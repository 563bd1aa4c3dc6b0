"""Weights in eight bits: a little error, half the memory, blocks alone; and what it does not go with."""

import functools
import json
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pipeline_folder import write_pipeline
from helpers.workdirs import make_workdir, random_params, tiny_config

from sprint_jax import SprintPipeline, evaluate
from sprint_jax.core.errors import UserError
from sprint_jax.digits.encoders import digits_parts
from sprint_jax.models.blocks import unstack
from sprint_jax.models.inference import int8, transformer
from sprint_jax.models.inference.operations import arrange
from sprint_jax.models.sana import from_fields
from sprint_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick")

PROMPTS = ["a red cat", "a wall"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(int8, "LEAST", 1)


def error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def kernels(params):
    """Bytes of the kernels of the layers, their scales included."""
    leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
    return sum(leaf.nbytes for path, leaf in leaves if "'kernel'" in jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_folder_draws_with_a_part_of_the_weights(tmp_path, dtype):
    folder = write_pipeline(tmp_path / "student")
    load = functools.partial(SprintPipeline.from_pretrained, folder, dtype)
    plain, narrow = load(), load(int8=True)
    text, mask = plain.encode_text(PROMPTS)
    features, _ = narrow.encode_text(PROMPTS)
    # A step of 1/127 of a channel's largest weight; observed 0.01 and 0.02.
    assert 1e-4 < error(features, text) < 0.05
    noise, _ = plain.draw_noise(0, np.arange(2), plain.latent_shape(), 2)
    latents = [each.denoise(text, mask, noise, steps=2) for each in (plain, narrow)]
    assert 1e-4 < error(latents[1], latents[0]) < 0.1
    assert np.stack(narrow(PROMPTS, steps=1)).shape == (2, 16, 16, 3)
    wide, less = (kernels(each.text_encoder._weights) for each in (plain, narrow))
    # One byte a weight; a scale for each channel of 16 rows or more.
    assert 1 < less * jnp.dtype(dtype).itemsize / wide < 1.3
    assert jax.tree.structure(narrow.params) == jax.tree.structure(plain.params)


def test_blocks_alone_are_narrow(monkeypatch):
    fields = dict(tiny_config("distill")["model"]) | dict(num_layers=3, control_blocks=1)
    fields |= dict(qk_norm=True, guidance_embeds=True)
    how = dict(is_student=True, sigma_d=0.5, shift=1.0, midpoint=1.3, guidance=3.0, size=(8, 8))
    parts = from_fields(fields), random_params(fields, 1), *digits_parts("small")[:2]
    plain, pipe = (
        SprintPipeline(*parts, arranged=True, int8=each, **how) for each in (False, True)
    )
    narrow = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(pipe._weights)
        if leaf.dtype == jnp.int8
    }
    # Of a block: q, k and v together; four of the attention to the text; two of the MLP.
    assert len(narrow) == (3 + 1) * (1 + 4 + 2)
    assert all("blocks" in name and "'attn1']['to_out_0'" not in name for name in narrow)
    text, mask = plain.encode_text(["a red 3 on blue"])
    noise, _ = plain.draw_noise(0, np.arange(1), plain.latent_shape(), 1)
    control = plain.encode_control(np.full((1, 8, 8, 3), 255, np.uint8))
    drawn = [each.denoise(text, mask, noise, steps=1, control=control) for each in (plain, pipe)]
    assert 1e-4 < error(drawn[1], drawn[0]) < 0.1


def test_blocks_are_arranged_one_by_one_from_the_hosts_memory():
    """Blocks of a stack are views, each goes to the device by itself; numbers are those of one program."""
    fields = dict(tiny_config("distill")["model"]) | dict(num_layers=3, qk_norm=True)
    model, params = from_fields(fields), jax.device_get(random_params(fields, 1))
    stacked = params["transformer_blocks"]["attn1"]["to_q"]["kernel"]
    assert all(
        np.shares_memory(block["attn1"]["to_q"]["kernel"], stacked)
        for block in unstack(params["transformer_blocks"])
    )
    form = functools.partial(transformer.prepare, model, unrolled=True, finish=int8.quantize)
    by_parts, kept = arrange(form, params, by_parts=True)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(by_parts))
    assert jax.tree.leaves(kept)[0] is jax.tree.leaves(params)[0]
    chex.assert_trees_all_equal(by_parts, jax.jit(form)(params))


def test_reports_say_that_weights_were_narrow(tmp_path):
    workdir, out = make_workdir(tmp_path / "student", "distill"), tmp_path / "report.json"
    words = ["--model", str(workdir), "--count", "12", "--out", str(out), "--int8"]
    evaluate.main(words)
    assert json.loads(out.read_text())["model"]["int8"] is True


def test_what_it_does_not_go_with(tmp_path, monkeypatch):
    folder = write_pipeline(tmp_path / "student")
    for how in (dict(low_memory=True), dict(mesh=make_mesh(1, 8))):
        with pytest.raises(UserError, match="one device") as raised:
            SprintPipeline.from_pretrained(folder, int8=True, **how)
        assert raised.value.exit_code == 2
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match="qwix") as raised:
        SprintPipeline.from_pretrained(folder, int8=True)
    assert raised.value.exit_code == 2
