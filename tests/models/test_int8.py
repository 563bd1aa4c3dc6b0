"""Weights in eight bits: a little error, half the memory, blocks alone; and what it does not go with."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pipeline_folder import write_pipeline
from helpers.workdirs import random_params, tiny_config

from sprint_jax import SprintPipeline
from sprint_jax.core.errors import UserError
from sprint_jax.digits.encoders import digits_parts
from sprint_jax.models.inference import int8
from sprint_jax.models.sana import from_fields
from sprint_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick")

PROMPTS = ["a red cat", "a wall"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(int8, "LEAST", 1)


def error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_folder_draws_with_half_the_weights(tmp_path):
    folder = write_pipeline(tmp_path / "student")
    plain, narrow = (SprintPipeline.from_pretrained(folder, int8=each) for each in (False, True))
    text, mask = plain.encode_text(PROMPTS)
    features, _ = narrow.encode_text(PROMPTS)
    # A step of 1/127 of a channel's largest weight; observed 0.01 and 0.02.
    assert 1e-4 < error(features, text) < 0.05
    noise, _ = plain.draw_noise(0, np.arange(2), plain.latent_shape(), 2)
    latents = [each.denoise(text, mask, noise, steps=2) for each in (plain, narrow)]
    assert 1e-4 < error(latents[1], latents[0]) < 0.1
    assert np.stack(narrow(PROMPTS, steps=1)).shape == (2, 16, 16, 3)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(narrow.text_encoder._weights["layers"])}
    assert jnp.dtype("int8") in dtypes
    assert jax.tree.structure(narrow.params) == jax.tree.structure(plain.params)


def test_blocks_alone_are_narrow(monkeypatch):
    fields = dict(tiny_config("distill")["model"]) | dict(num_layers=3, control_blocks=1)
    fields |= dict(qk_norm=True, guidance_embeds=True)
    how = dict(is_student=True, sigma_d=0.5, shift=1.0, midpoint=1.3, guidance=3.0, size=(8, 8))
    parts = from_fields(fields), random_params(fields, 1), *digits_parts("small")[:2]
    pipe = SprintPipeline(*parts, arranged=True, int8=True, **how)
    narrow = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(pipe._weights)
        if leaf.dtype == jnp.int8
    }
    # Of a block: q, k and v together; four of the attention to the text; two of the MLP.
    assert len(narrow) == (3 + 1) * (1 + 4 + 2)
    assert all("blocks" in name and "'attn1']['to_out_0'" not in name for name in narrow)


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
