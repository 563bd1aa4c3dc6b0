"""SanaTransformer against diffusers' own, on random weights.

Errors are max|a - b| / max|b|. Observed in float32: at most 2e-6. In bfloat16 our error against
float32 is 0.54 to 0.72 of diffusers', whose time embedding and norms round more often.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from helpers.reference import sana_inputs, sana_velocity, tiny_sana

from sprint_jax.interop.diffusers import load_transformer, save_transformer
from sprint_jax.interop.files import save_safetensors
from sprint_jax.interop.sana import config_from_fields, sana_table
from sprint_jax.models.sana import SIZES, SanaTransformer

pytestmark = pytest.mark.filterwarnings("ignore")


def ours(fields, **changes):
    run = jax.jit(SanaTransformer(**(fields | changes)).apply)
    return lambda params, *inputs: np.asarray(run({"params": params}, *inputs))


def relative_error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


PATCHES = {"patch_size": 2, "interpolation_scale": 1.0}
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
    "one head": (
        {
            "num_attention_heads": 1,
            "attention_head_dim": 20,
            "num_cross_attention_heads": 5,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 20,
            "mlp_ratio": 1.7,
            "num_layers": 1,
        },
        (1, 9),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_velocity(tmp_path, case):
    changes, size = CASES[case]
    model = tiny_sana(**changes)
    model.save_pretrained(tmp_path)
    fields, params = load_transformer(tmp_path)
    x, t, text, mask, guidance = sana_inputs(fields, size)
    expected = sana_velocity(model, x, t, text, mask, guidance)
    run = ours(fields)
    assert relative_error(run(params, x, t, text, mask, guidance), expected) < 2e-5
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


def assert_same_weights(model, again):
    one, other = model.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, dtype, guidance):
    torch_dtype = getattr(torch, dtype)
    model = tiny_sana(guidance_embeds=guidance, interpolation_scale=2.0).to(torch_dtype)
    model.save_pretrained(tmp_path / "theirs")
    fields, params = load_transformer(tmp_path / "theirs", dtype)
    save_transformer(tmp_path / "ours", fields, params, dtype)
    again = SanaTransformer2DModel.from_pretrained(tmp_path / "ours", torch_dtype=torch_dtype)
    assert_same_weights(model, again)
    configs = [
        {key: value for key, value in each.config.items() if not key.startswith("_")}
        for each in (model, again)
    ]
    assert configs[0] == configs[1]


def test_their_sharded_folder(tmp_path):
    model = tiny_sana()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    _, whole = load_transformer(tmp_path / "whole")
    _, sharded = load_transformer(tmp_path / "sharded")
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)


def test_our_sharded_folder(tmp_path):
    model = tiny_sana()
    model.save_pretrained(tmp_path / "theirs")
    fields, params = load_transformer(tmp_path / "theirs")
    folder, stem = tmp_path / "ours", "diffusion_pytorch_model"
    save_transformer(folder, fields, params)
    save_safetensors(folder, stem, sana_table(fields), params, jnp.float32, shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same_weights(model, SanaTransformer2DModel.from_pretrained(folder))
