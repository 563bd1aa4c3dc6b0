"""Checkpoints of NVlabs/Sana: the same network through both kinds of file, and files of torch that are
damaged or hold code."""

import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.reference import tiny_sana

from sprint_jax.checkpoints.weights import find_weights
from sprint_jax.core.errors import UserError
from sprint_jax.interop import diffusers, nvlabs
from sprint_jax.interop.sana import example_inputs
from sprint_jax.models.sana import SIZES, from_fields

pytestmark = pytest.mark.filterwarnings("ignore")
STUDENT = {"guidance_embeds": True, "patch_size": 2, "out_channels": 6}
TEACHER = {"qk_norm": None, "attention_bias": True}


def nvlabs_state(theirs: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """What NVlabs' code would save of the network that diffusers saves as ``theirs``."""
    ours = {}

    def move(new, *old):
        for leaf in ("weight", "bias"):
            parts = [theirs[f"{name}.{leaf}"] for name in old if f"{name}.{leaf}" in theirs]
            if parts:
                ours[f"{new}.{leaf}"] = torch.cat(parts)

    time = (
        "time_embed.emb"
        if "time_embed.emb.timestep_embedder.linear_1.bias" in theirs
        else "time_embed"
    )
    move("x_embedder.proj", "patch_embed.proj")
    for i, layer in enumerate(("mlp.0", "mlp.2"), 1):
        move(f"t_embedder.{layer}", f"{time}.timestep_embedder.linear_{i}")
        move(f"cfg_embedder.{layer}", f"time_embed.guidance_embedder.linear_{i}")
        move(f"y_embedder.y_proj.fc{i}", f"caption_projection.linear_{i}")
    move("t_block.1", "time_embed.linear")
    move("attention_y_norm", "caption_norm")
    move("final_layer.linear", "proj_out")
    ours["final_layer.scale_shift_table"] = theirs["scale_shift_table"]
    for n in range(layers):
        new, old = f"blocks.{n}", f"transformer_blocks.{n}"
        ours[f"{new}.scale_shift_table"] = theirs[f"{old}.scale_shift_table"]
        move(f"{new}.attn.qkv", *(f"{old}.attn1.to_{letter}" for letter in "qkv"))
        move(f"{new}.cross_attn.q_linear", f"{old}.attn2.to_q")
        move(f"{new}.cross_attn.kv_linear", *(f"{old}.attn2.to_{letter}" for letter in "kv"))
        for theirs_attn, attn in (("attn1", "attn"), ("attn2", "cross_attn")):
            move(f"{new}.{attn}.proj", f"{old}.{theirs_attn}.to_out.0")
            move(f"{new}.{attn}.q_norm", f"{old}.{theirs_attn}.norm_q")
            move(f"{new}.{attn}.k_norm", f"{old}.{theirs_attn}.norm_k")
        for kind in ("inverted", "depth", "point"):
            move(f"{new}.mlp.{kind}_conv.conv", f"{old}.ff.conv_{kind}")
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


def assert_same_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert [a.dtype for a in jax.tree.leaves(one)] == [a.dtype for a in jax.tree.leaves(other)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [STUDENT, TEACHER], ids=["student", "teacher"])
def test_both_files_give_the_same_parameters(tmp_path, make, changes, dtype):
    (fields, params), state = make(changes, dtype)
    buffers = {
        "y_embedder.y_embedding": torch.randn(5, 10),
        "pos_embed": torch.zeros(1, 16, 24),
    }
    path = tmp_path / "model.pth"
    torch.save({"state_dict": state | buffers, "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    found, loaded = nvlabs.load_transformer(path, fields, str(dtype).split(".")[1])
    assert found == fields
    assert_same_trees(loaded, params)
    null_text = nvlabs.load_null_text(path)
    np.testing.assert_array_equal(null_text, buffers["y_embedder.y_embedding"].numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_file_is_theirs(tmp_path, make, dtype):
    (fields, params), state = make(STUDENT, getattr(torch, dtype))
    path = tmp_path / "model.pth"
    nvlabs.save_transformer(path, fields, params, dtype)
    assert not list(tmp_path.glob("*.partial"))
    written = torch.load(path, weights_only=True)["state_dict"]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    assert_same_trees(nvlabs.load_transformer(path, fields, dtype)[1], params)
    with pytest.raises(UserError, match="has no tensor y_embedder"):
        nvlabs.load_null_text(path)


def test_logvar_head(tmp_path, make):
    (fields, params), state = make(STUDENT)
    head = {"logvar_linear.weight": torch.randn(1, 24), "logvar_linear.bias": torch.randn(1)}
    torch.save({"state_dict": state | head}, tmp_path / "model.pth")
    found, loaded = nvlabs.load_transformer(tmp_path / "model.pth", fields)
    assert found == fields | {"logvar": True}
    logvar = loaded.pop("logvar_linear")
    np.testing.assert_array_equal(logvar["kernel"], head["logvar_linear.weight"].T)
    np.testing.assert_array_equal(logvar["bias"], head["logvar_linear.bias"])
    assert_same_trees(loaded, params)
    nvlabs.save_transformer(tmp_path / "again.pth", found, loaded | {"logvar_linear": logvar})
    written = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(written[name], tensor) for name, tensor in (state | head).items())


def test_file_that_is_the_dict_itself(tmp_path, make):
    (fields, params), state = make(STUDENT)
    torch.save(state, tmp_path / "model.pth")
    assert_same_trees(nvlabs.load_transformer(tmp_path / "model.pth", fields)[1], params)


@pytest.mark.parametrize("size", ["600m", "1600m-teacher"])
def test_names_hold_every_tensor_once(size):
    table = nvlabs.sana_table(SIZES[size])
    names = nvlabs.nvlabs_names(SIZES[size])
    assert sorted(part for parts in names.values() for part in parts) == sorted(table)
    # Of each block's tensors, one holds three and two hold two.
    assert len(names) == len(table) - 4 * SIZES[size]["num_layers"]


NAME = "blocks.1.attn.qkv.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blocks.1.attn.w": torch.ones(3)}, "tensor blocks.1.attn.w has no place in this model"),
        ({NAME: None}, f"tensor {NAME} is missing"),
        ({NAME: torch.ones(71, 24)}, rf"tensor {NAME} has shape \(71, 24\)"),
        ({NAME: torch.ones(72, 24, dtype=torch.int32)}, f"tensor {NAME} is torch.int32"),
        ({NAME: "text"}, f"entry {NAME} is no tensor"),
        ({"logvar_linear.weight": torch.ones(1, 24)}, "tensor logvar_linear.bias is missing"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, make, change, message):
    (fields, _), state = make(STUDENT)
    state = {name: value for name, value in (state | change).items() if value is not None}
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=message) as error:
        nvlabs.load_transformer(tmp_path / "model.pth", fields)
    assert str(tmp_path / "model.pth") in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_of_another_model_are_refused(tmp_path, make):
    (fields, _), state = make(STUDENT)
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"cfg_embedder\.mlp\.0\.bias has no place"):
        nvlabs.load_transformer(tmp_path / "model.pth", fields | {"guidance_embeds": False})


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_code_in_a_file_does_not_run(tmp_path, form):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    value = {"state_dict": {"x": torch.ones(1)}, "payload": Payload(trace)}
    if form == "bare":
        path.write_bytes(pickle.dumps({"state_dict": Payload(trace)}))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    message = r"holds posix\.mkdir" if form == "zip" else "no file that torch 1.6 or newer wrote"
    with pytest.raises(UserError, match=message) as error:
        nvlabs.load_transformer(path, SIZES["600m"])
    assert "\n" not in str(error.value)
    assert not trace.exists()
    # The file does what the test takes it for.
    torch.load(path, weights_only=False) if form == "zip" else pickle.loads(pickle.dumps(value))
    assert trace.exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is cut short"),
        (lambda path: torch.save([torch.ones(2)], path), "holds no tensors by name"),
        (lambda path: torch.save({"state_dict": 3}, path), "holds no tensors by name"),
        (lambda path: torch.save({"epoch": 3}, path), "entry epoch is no tensor"),
        # What NVlabs' training loop saves beside the tensors.
        (
            lambda path: torch.save({"rng": np.random.get_state()}, path),
            r"multiarray\._reconstruct",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {"x": torch.ones(1000)}}, path)
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        nvlabs.load_transformer(path, SIZES["600m"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_dtype_is_that_asked_for(tmp_path, make):
    (fields, params), state = make(TEACHER)
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, tmp_path / "model.pth")
    _, loaded = nvlabs.load_transformer(tmp_path / "model.pth", fields, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}
    expected = jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.bfloat16), params)
    assert_same_trees(loaded, expected)


def test_a_file_says_its_depth_its_norms_and_whether_it_embeds_guidance(tmp_path):
    """What a teacher is prepared from: the rest is taken from the config."""
    fields = SIZES["digits"] | {"num_layers": 3, "num_attention_heads": 1}
    fields |= {"num_cross_attention_heads": 1, "qk_norm": False}
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(
        from_fields(fields).init,
        jax.random.key(0),
        *example_inputs(from_fields(fields)),
    )["params"]
    params = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), a.dtype), shapes)
    path = tmp_path / "sana.pth"
    nvlabs.save_transformer(path, fields, params)
    found = find_weights(str(path), fields | {"num_layers": 7, "qk_norm": True})
    assert (found.kind, found.is_teacher) == ("nvlabs", True)
    assert from_fields(found.fields) == from_fields(fields)
    loaded, _ = found.load(None)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
