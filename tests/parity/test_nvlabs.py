"""Checkpoints of NVlabs/Sana: the same network in both kinds of file, and damaged or hostile files of torch."""

import hashlib
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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


@pytest.fixture
def make(tmp_path, path):
    """``make(changes) -> (fields and params by way of diffusers, tensors of the file that we write)``."""

    def make(changes, dtype="float32"):
        tiny_sana(**changes).to(getattr(torch, dtype)).save_pretrained(tmp_path / "diffusers")
        loaded = diffusers.load_transformer(tmp_path / "diffusers", dtype)
        nvlabs.save_transformer(path, *loaded, dtype)
        return loaded, torch.load(path, weights_only=True)["state_dict"]

    return make


@pytest.mark.parametrize(
    ("changes", "digest"), [(STUDENT, "750e4f32284b58cd"), (TEACHER, "403f16076808841f")]
)
def test_names_and_shapes_are_those_of_nvlabs(path, make, changes, digest):
    # Frozen from a table that was written apart from ours.
    lines = sorted(f"{name} {tuple(a.shape)}" for name, a in make(changes)[1].items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [STUDENT, TEACHER], ids=["student", "teacher"])
def test_both_files_give_the_same_parameters(path, make, changes, dtype):
    (fields, params), state = make(changes, dtype)
    buffers = {"y_embedder.y_embedding": torch.ones(5, 10), "pos_embed": torch.zeros(1, 16, 24)}
    torch.save({"state_dict": state | buffers, "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    found, loaded = nvlabs.load_transformer(path, fields, dtype)
    assert found == fields
    assert_same(loaded, params)
    # A file may also be the dict of tensors itself, and be without buffers.
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
        ({}, ["cfg_embedder.mlp.0.bias"]),  # of another model than the fields
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
    refused(path, fields if change else fields | {"guidance_embeds": False}, *names)


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
