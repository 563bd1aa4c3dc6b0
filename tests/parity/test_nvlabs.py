"""Checkpoints of NVlabs/Sana: the same network in both kinds of file, and damaged or hostile files of torch."""

import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.compare import assert_same
from helpers.reference import tiny_sana
from helpers.workdirs import random_params

from sprint_jax.checkpoints.weights import find_weights
from sprint_jax.core.errors import UserError
from sprint_jax.interop import diffusers, nvlabs
from sprint_jax.models.sana import SIZES, from_fields

STUDENT = {"guidance_embeds": True, "patch_size": 2, "out_channels": 6}
TEACHER = {"qk_norm": None, "attention_bias": True}
# NVlabs' modules, and diffusers' whose tensors they hold one after another.
OUTER = {
    "x_embedder.proj": ["patch_embed.proj"],
    "t_embedder.mlp.0": ["time_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_embed.timestep_embedder.linear_2"],
    "cfg_embedder.mlp.0": ["time_embed.guidance_embedder.linear_1"],
    "cfg_embedder.mlp.2": ["time_embed.guidance_embedder.linear_2"],
    "y_embedder.y_proj.fc1": ["caption_projection.linear_1"],
    "y_embedder.y_proj.fc2": ["caption_projection.linear_2"],
    "t_block.1": ["time_embed.linear"],
    "attention_y_norm": ["caption_norm"],
    "final_layer.linear": ["proj_out"],
}
BLOCK = {
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "cross_attn.q_linear": ["attn2.to_q"],
    "cross_attn.kv_linear": ["attn2.to_k", "attn2.to_v"],
}
for ours, theirs in (("attn", "attn1"), ("cross_attn", "attn2")):
    BLOCK |= {f"{ours}.proj": [f"{theirs}.to_out.0"]}
    BLOCK |= {f"{ours}.{letter}_norm": [f"{theirs}.norm_{letter}"] for letter in "qk"}
for kind in ("inverted", "depth", "point"):
    BLOCK[f"mlp.{kind}_conv.conv"] = [f"ff.conv_{kind}"]


def nvlabs_state(theirs: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """What NVlabs' code would save of the network that diffusers saves as ``theirs``."""
    theirs = {name.replace("time_embed.emb.", "time_embed."): a for name, a in theirs.items()}
    modules, ours = dict(OUTER), {}
    ours["final_layer.scale_shift_table"] = theirs["scale_shift_table"]
    for n in range(layers):
        new, old = f"blocks.{n}.", f"transformer_blocks.{n}."
        modules |= {new + name: [old + part for part in parts] for name, parts in BLOCK.items()}
        ours[new + "scale_shift_table"] = theirs[old + "scale_shift_table"]
    for name, parts in modules.items():
        for leaf in (".weight", ".bias"):
            if parts[0] + leaf in theirs:
                ours[name + leaf] = torch.cat([theirs[part + leaf] for part in parts])
    assert sum(a.numel() for a in ours.values()) == sum(a.numel() for a in theirs.values())
    return ours


@pytest.fixture
def make(tmp_path):
    """``make(changes) -> (fields and params by way of diffusers, NVlabs' tensors)``."""

    def make(changes, dtype=torch.float32):
        model = tiny_sana(**changes).to(dtype)
        model.save_pretrained(tmp_path / "diffusers")
        loaded = diffusers.load_transformer(tmp_path / "diffusers", str(dtype).split(".")[1])
        return loaded, nvlabs_state(model.state_dict(), model.config.num_layers)

    return make


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [STUDENT, TEACHER], ids=["student", "teacher"])
def test_both_files_give_the_same_parameters(path, make, changes, dtype):
    (fields, params), state = make(changes, getattr(torch, dtype))
    null_text = torch.randn(5, 10)
    buffers = {"y_embedder.y_embedding": null_text, "pos_embed": torch.zeros(1, 16, 24)}
    torch.save({"state_dict": state | buffers, "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    found, loaded = nvlabs.load_transformer(path, fields, dtype)
    assert found == fields
    assert_same(loaded, params)
    np.testing.assert_array_equal(nvlabs.load_null_text(path), null_text.numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_file_is_theirs(path, make, dtype):
    (fields, params), state = make(STUDENT, getattr(torch, dtype))
    nvlabs.save_transformer(path, fields, params, dtype)
    assert not list(path.parent.glob("*.partial"))
    written = torch.load(path, weights_only=True)["state_dict"]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    with pytest.raises(UserError, match=r"y_embedder\.y_embedding"):
        nvlabs.load_null_text(path)
    # A file may also be the dict of tensors itself.
    torch.save(state, path)
    assert_same(nvlabs.load_transformer(path, fields, dtype)[1], params)


def test_logvar_head(path, make):
    (fields, params), state = make(STUDENT)
    head = {"logvar_linear.weight": torch.randn(1, 24), "logvar_linear.bias": torch.randn(1)}
    torch.save({"state_dict": state | head}, path)
    found, loaded = nvlabs.load_transformer(path, fields)
    assert found == fields | {"logvar": True}
    assert_same({k: v for k, v in loaded.items() if k != "logvar_linear"}, params)
    np.testing.assert_array_equal(loaded["logvar_linear"]["kernel"], head["logvar_linear.weight"].T)
    nvlabs.save_transformer(path, found, loaded)
    written = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(written[name], tensor) for name, tensor in (state | head).items())


def test_dtype_is_that_asked_for(path, make):
    (fields, params), state = make(TEACHER)
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, path)
    _, loaded = nvlabs.load_transformer(path, fields, jnp.bfloat16)
    assert_same(loaded, jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.bfloat16), params))


def test_a_file_says_its_depth_its_norms_and_whether_it_embeds_guidance(path):
    """A teacher is prepared from these; the rest is taken from the config."""
    heads = {"num_attention_heads": 1, "num_cross_attention_heads": 1}
    fields = SIZES["digits"] | heads | {"num_layers": 3, "qk_norm": False}
    params = random_params(fields, 0)
    nvlabs.save_transformer(path, fields, params)
    found = find_weights(str(path), fields | {"num_layers": 7, "qk_norm": True})
    assert (found.kind, found.is_teacher) == ("nvlabs", True)
    assert from_fields(found.fields) == from_fields(fields)
    assert_same(found.load(None)[0], params)


# --- Files that are wrong

NAME = "blocks.1.attn.qkv.weight"


def refused(path, fields, *names):
    """Loading ends in one line with the file and these names."""
    with pytest.raises(UserError) as error:
        nvlabs.load_transformer(path, fields)
    message = str(error.value)
    assert all(name in message for name in (str(path), *names)) and "\n" not in message, message


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"blocks.1.attn.w": torch.ones(3)}, ["blocks.1.attn.w"]),
        ({NAME: None}, [NAME]),
        ({NAME: torch.ones(71, 24)}, [NAME, "(71, 24)", "(72, 24)"]),
        ({NAME: torch.ones(72, 24, dtype=torch.int32)}, [NAME, "int32"]),
        ({NAME: "text"}, [NAME]),
        ({"logvar_linear.weight": torch.ones(1, 24)}, ["logvar_linear.bias"]),
    ],
)
def test_wrong_tensors_are_refused(path, make, change, names):
    (fields, _), state = make(STUDENT)
    state = {name: value for name, value in (state | change).items() if value is not None}
    torch.save({"state_dict": state}, path)
    refused(path, fields, *names)


def test_fields_of_another_model_are_refused(path, make):
    (fields, _), state = make(STUDENT)
    torch.save({"state_dict": state}, path)
    refused(path, fields | {"guidance_embeds": False}, "cfg_embedder.mlp.0.bias")


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_code_in_a_file_does_not_run(tmp_path, path, form):
    trace = tmp_path / "trace"
    value = {"state_dict": {"x": torch.ones(1)}, "payload": Payload(trace)}
    if form == "bare":
        path.write_bytes(pickle.dumps({"state_dict": Payload(trace)}))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    refused(path, SIZES["600m"], "posix.mkdir" if form == "zip" else "torch 1.6")
    assert not trace.exists()
    # The file does what the test takes it for.
    torch.load(path, weights_only=False) if form == "zip" else pickle.loads(pickle.dumps(value))
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (None, "missing"),
        ("cut", "cut short"),
        ([torch.ones(2)], "no tensors"),
        ({"state_dict": 3}, "no tensors"),
        ({"epoch": 3}, "entry epoch"),
        # NVlabs' training loop saves it beside the tensors.
        ({"rng": np.random.get_state()}, "multiarray._reconstruct"),
    ],
)
def test_damaged_files_are_refused(path, content, name):
    if content is not None:
        torch.save({"state_dict": {"x": torch.ones(1000)}} if content == "cut" else content, path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    refused(path, SIZES["600m"], name)
