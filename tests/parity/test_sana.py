"""SanaTransformer against diffusers' own, on random weights.

Errors are max|a - b| / max|b|. Observed in float32: at most 2e-6. In bfloat16 our error against
float32 is 0.54 to 0.72 of diffusers', whose time embedding and norms round more often.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from helpers.compare import assert_same, relative_error
from helpers.reference import same_weights, sana_inputs, sana_velocity, tiny_sana

from sprint_jax.interop.diffusers import load_transformer, save_transformer
from sprint_jax.interop.files import save_safetensors
from sprint_jax.interop.sana import config_from_fields, sana_table
from sprint_jax.models.sana import SIZES, SanaTransformer


def ours(fields, **changes):
    run = jax.jit(SanaTransformer(**(fields | changes)).apply)
    return lambda params, *inputs: np.asarray(run({"params": params}, *inputs))


PATCHES = {"patch_size": 2, "interpolation_scale": 1.0}
ONE_HEAD = {"num_attention_heads": 1, "attention_head_dim": 20, "mlp_ratio": 1.7, "num_layers": 1}
ONE_HEAD |= {"num_cross_attention_heads": 5, "cross_attention_head_dim": 4}
ONE_HEAD |= {"cross_attention_dim": 20}
CASES = {
    "student": ({"guidance_embeds": True}, (3, 5)),
    "student with any timestep_scale": ({"guidance_embeds": True, "timestep_scale": 1.0}, (4, 4)),
    "teacher": ({}, (5, 3)),
    "no norm of queries": ({"qk_norm": None, "timestep_scale": 1.0}, (2, 7)),
    "positions": ({"interpolation_scale": 2.0, "guidance_embeds": True}, (6, 4)),
    "patches": (PATCHES, (6, 10)),
    "patches, student": (PATCHES | {"guidance_embeds": True, "out_channels": 6}, (8, 4)),
    "biases, more channels out": ({"attention_bias": True, "out_channels": 7}, (4, 6)),
    "channels out not said": ({"in_channels": 5, "out_channels": None}, (3, 3)),
    "one head": (ONE_HEAD, (1, 9)),
}


@pytest.mark.parametrize("case", CASES)
def test_velocity(tmp_path, case):
    changes, size = CASES[case]
    model = tiny_sana(**changes)
    model.save_pretrained(tmp_path)
    fields, params = load_transformer(tmp_path)
    x, t, text, mask, guidance = sana_inputs(fields, size)
    blocks = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda *call: blocks.append(call[2].numpy()))
    expected = sana_velocity(model, x, t, text, mask, guidance)
    run = ours(fields)
    assert relative_error(run(params, x, t, text, mask, guidance), expected) < 2e-5
    # The tapped features are the outputs of their blocks.
    taps = dict(taps=tuple(range(len(blocks))))
    apply = jax.jit(functools.partial(SanaTransformer(**fields).apply, **taps))
    features = apply({"params": params}, x, t, text, mask, guidance)
    for feature, block in zip(features, blocks, strict=True):
        assert relative_error(feature.reshape(block.shape), block) < 2e-5
    # Nothing drowns the conditions: another mask or time changes the result.
    assert relative_error(run(params, x, t, text, mask[::-1], guidance), expected) > 0.01
    assert relative_error(run(params, x, t / 2, text, mask, guidance), expected) > 0.01


@pytest.mark.parametrize("guidance", [True, False])
def test_bfloat16_is_as_near_to_float32_as_diffusers(tmp_path, guidance):
    errors = {"ours": [], "theirs": []}
    run = None
    for seed in range(6):
        model = tiny_sana(seed, guidance_embeds=guidance)
        model.save_pretrained(tmp_path)
        fields, params = load_transformer(tmp_path)
        x, t, text, mask, scale = sana_inputs(fields, (6, 6), seed)
        x, text = (np.array(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, text))
        inputs = (x, t, text, mask, scale)
        expected = sana_velocity(model, *inputs)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        run = run or ours(fields, dtype=jnp.bfloat16)
        errors["ours"].append(run(params, *inputs) - expected)
        errors["theirs"].append(sana_velocity(model.to(torch.bfloat16), *inputs) - expected)
    scale = np.abs(expected).max()
    largest = {who: np.mean([np.abs(e).max() for e in each]) for who, each in errors.items()}
    typical = {who: np.sqrt(np.mean(np.square(each))) for who, each in errors.items()}
    assert largest["theirs"] > 1e-4 * scale
    assert largest["ours"] < 1.5 * largest["theirs"]
    assert typical["ours"] < 1.5 * typical["theirs"]


@pytest.mark.parametrize("size", sorted(SIZES.keys() - {"digits"}))
def test_true_names_and_shapes(size):
    config = config_from_fields(SIZES[size])
    with torch.device("meta"):
        state = SanaTransformer2DModel(**config).state_dict()
    shapes = {name: entry.shape for name, entry in sana_table(SIZES[size]).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, dtype, guidance):
    torch_dtype = getattr(torch, dtype)
    model = tiny_sana(guidance_embeds=guidance, interpolation_scale=2.0).to(torch_dtype)
    model.save_pretrained(tmp_path / "theirs")
    fields, params = load_transformer(tmp_path / "theirs", dtype)
    save_transformer(tmp_path / "ours", fields, params, dtype)
    again = SanaTransformer2DModel.from_pretrained(tmp_path / "ours", torch_dtype=torch_dtype)
    same_weights(model, again)
    public = lambda model: {k: v for k, v in model.config.items() if k[0] != "_"}  # noqa: E731
    assert public(model) == public(again)


def test_sharded_folders(tmp_path):
    model = tiny_sana()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    fields, params = load_transformer(tmp_path / "whole")
    assert_same(load_transformer(tmp_path / "sharded")[1], params)
    folder, stem = tmp_path / "ours", "diffusion_pytorch_model"
    save_transformer(folder, fields, params)
    save_safetensors(folder, stem, sana_table(fields), params, jnp.float32, shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    same_weights(model, SanaTransformer2DModel.from_pretrained(folder))
