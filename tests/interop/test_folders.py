"""Weights of all networks from files to devices and back, and files that are wrong.

The files are those of diffusers and transformers (tests/parity/stored), read without torch.
"""

import functools
import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close, assert_same
from safetensors.numpy import load_file, save_file

from sprint_jax.benchmarking.scripts import run_on_devices
from sprint_jax.core.errors import UserError
from sprint_jax.interop import dc_ae, diffusers, gemma2, nvlabs
from sprint_jax.interop.diffusers import LOGVAR, load_transformer, save_transformer
from sprint_jax.interop.discriminator import load_heads, save_heads
from sprint_jax.interop.files import is_finite, save_safetensors
from sprint_jax.interop.sana import sana_table
from sprint_jax.models.discriminator import init_heads
from sprint_jax.models.sana import SanaTransformer
from sprint_jax.parallel.sharding import make_mesh, state_shardings

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "parity" / "stored"


Kind = namedtuple("Kind", "stored load save table stem tensor")
DIFFUSERS = "diffusion_pytorch_model"
SANA = load_transformer, save_transformer, sana_table, DIFFUSERS
DC_AE = diffusers.load_autoencoder, diffusers.save_autoencoder, dc_ae.dc_ae_table, DIFFUSERS
GEMMA2 = gemma2.load_text_encoder, gemma2.save_text_encoder, gemma2.gemma2_table, "model"
KINDS = {
    "student": Kind(STORED / "sana/student", *SANA, "transformer_blocks.1.attn1.to_q.weight"),
    "teacher": Kind(STORED / "sana/teacher", *SANA, "transformer_blocks.0.attn1.to_q.weight"),
    "dc_ae": Kind(STORED / "dc_ae", *DC_AE, "decoder.conv_in.weight"),
    "gemma2": Kind(STORED / "gemma2/text_encoder", *GEMMA2, "layers.1.mlp.up_proj.weight"),
}
WEIGHTS = f"{DIFFUSERS}.safetensors"


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def student():
    return load_transformer(STORED / "sana/student")


def copy(kind: Kind, tmp_path: Path) -> tuple[Path, Path]:
    """A folder that a test may damage, and its file of weights."""
    folder = Path(shutil.copytree(kind.stored, tmp_path / "network"))
    return folder, folder / f"{kind.stem}.safetensors"


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_velocity_is_that_of_diffusers(which):
    fields, params = load_transformer(KINDS[which].stored)
    arrays = load_file(KINDS[which].stored / "arrays.safetensors")
    velocity = arrays.pop("velocity")
    out = jax.jit(SanaTransformer(**fields).apply)({"params": params}, **arrays)
    # Sums of up to 100 float32 products in another order: observed 5e-7.
    assert_close(out, velocity, 2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_folder_loads_bit_equal(tmp_path, kind, dtype):
    network, params = kind.load(kind.stored, dtype)
    kind.save(tmp_path, network, params, dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", f"{kind.stem}.safetensors"}
    again, loaded = kind.load(tmp_path, dtype)
    if kind.load is load_transformer:
        network, again = SanaTransformer(**network), SanaTransformer(**again)
    assert again == network
    assert_same(loaded, params)


def test_many_files_and_what_an_earlier_save_left(tmp_path, kind):
    folder, whole = copy(kind, tmp_path)
    network, params = kind.load(folder)
    variant = folder / f"{kind.stem}.fp16.safetensors"
    variant.write_bytes(b"a user's own")
    save = functools.partial(save_safetensors, folder, kind.stem, kind.table(network), params)
    save(jnp.float32, shard_bytes=3_000)
    files = sorted(folder.glob(f"{kind.stem}-*.safetensors"))
    assert len(files) > 2 and not whole.exists()
    assert_same(kind.load(folder)[1], params)
    index = folder / f"{kind.stem}.safetensors.index.json"
    moved = index.rename(folder / f"{kind.stem}.safetensors.index.bf16.json")
    assert_same(kind.load(folder)[1], params)
    moved.rename(index)
    files[-1].rename(folder / "elsewhere")
    with pytest.raises(UserError, match=files[-1].name):
        kind.load(folder)
    # Hub repositories may hold a variant alone.
    save(jnp.float32)
    whole.rename(variant)
    assert_same(kind.load(folder)[1], params)
    save(jnp.float32)
    assert {path.name for path in folder.glob(f"{kind.stem}*")} == {whole.name, variant.name}
    assert_same(kind.load(folder)[1], params)


@pytest.mark.parametrize("mesh", [(2, 4), (4, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_lie_where_they_are_asked_to(mesh, dtype):
    asked = []

    def shardings(structs):
        asked.append(state_shardings(make_mesh(*mesh), structs))
        return asked[0]

    _, plain = load_transformer(STORED / "sana/student", dtype)
    _, params = load_transformer(STORED / "sana/student", dtype, shardings=shardings)
    assert_same(params, plain)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == asked[0]
    split = [leaf for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated]
    assert len(split) >= 10


HEAD = {"kernel": jnp.arange(12.0)[:, None], "bias": jnp.ones(1)}


def test_logvar_head_goes_into_a_file_of_its_own(tmp_path, student):
    fields, params = student
    save_transformer(tmp_path, fields | {"logvar": True}, params | {"logvar_linear": HEAD})
    assert not any(name.startswith("logvar") for name in load_file(tmp_path / WEIGHTS))
    again, loaded = load_transformer(tmp_path)
    assert again["logvar"] is True
    assert_same(loaded, params | {"logvar_linear": HEAD})
    # A later save without it does not leave the old one.
    save_transformer(tmp_path, fields, params)
    assert not (tmp_path / LOGVAR).exists()
    assert "logvar" not in load_transformer(tmp_path)[0]
    # One file without a config takes the fields.
    file = (tmp_path / WEIGHTS).rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").unlink()
    found, loaded = load_transformer(file, fields=fields)
    assert found == fields
    assert_same(loaded, params)


def test_folder_of_a_broken_save_is_refused(tmp_path, student):
    folder, _ = copy(KINDS["student"], tmp_path)
    fields, params = student
    with pytest.raises(KeyError, match="proj_out"):
        save_transformer(folder, fields, {k: v for k, v in params.items() if k != "proj_out"})
    with pytest.raises(UserError, match=r"config\.json"):
        load_transformer(folder)


# --- Files that are wrong


def refused(kind: Kind, folder: Path, *names: str) -> None:
    """Loading ends in one line with these names, and writes nothing."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        kind.load(folder)
    message = str(error.value)
    assert all(name in message for name in names) and "\n" not in message, message
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"_class_name": "Other"}', '{"_class_name": []}', "[" * 100_000]
)
def test_damaged_configs_are_refused(tmp_path, kind, content):
    folder, _ = copy(kind, tmp_path)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    refused(kind, folder, f"{folder}/config.json")


@pytest.mark.parametrize("size", [None, 0, 100, -9])
def test_missing_and_cut_weights_are_refused(tmp_path, kind, size):
    folder, weights = copy(kind, tmp_path)
    whole = weights.read_bytes()
    weights.unlink()
    if size is not None:
        weights.write_bytes(whole[:size])
    refused(kind, folder, str(weights))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "whole numbers"])
def test_wrong_tensors_are_refused(tmp_path, kind, change):
    folder, weights = copy(kind, tmp_path)
    tensors, name = load_file(weights), kind.tensor
    tensor = tensors.pop(name)
    if change == "unknown":
        tensors |= {name: tensor, "x": tensor}
    if change == "shape":
        tensors[name] = tensor[:1]
    if change == "whole numbers":
        tensors[name] = tensor.astype(np.int32)
    save_file(tensors, weights)
    shapes = (str((1, *tensor.shape[1:])), str(tensor.shape)) if change == "shape" else ()
    refused(kind, folder, str(folder), "tensor x" if change == "unknown" else name, *shapes)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_tensors_that_are_not_finite_are_refused(tmp_path, kind, value):
    folder, weights = copy(kind, tmp_path)
    tensors = load_file(weights)
    tensors[kind.tensor].flat[-1] = value
    save_file(tensors, weights)
    refused(kind, folder, str(folder), f"tensor {kind.tensor} ")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_finite_numbers_of_every_kind(dtype):
    good = np.asarray([0, -0.0, 1, -1, jnp.finfo(dtype).max, jnp.finfo(dtype).min]).astype(dtype)
    assert is_finite(good) and is_finite(good[:0])
    for bad in np.asarray([np.inf, -np.inf, np.nan, -np.nan]).astype(dtype):
        assert not is_finite(np.append(good, bad))


def test_damaged_indices_are_refused(tmp_path):
    kind = KINDS["student"]
    folder, weights = copy(kind, tmp_path)
    tensors, index = load_file(weights), folder / f"{WEIGHTS}.index.json"
    weights.rename(folder / "a.safetensors")
    index.write_text('{"metadata": {}}')
    refused(kind, folder, str(index))
    # Two files that have one tensor in common.
    save_file({kind.tensor: tensors[kind.tensor]}, folder / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {kind.tensor: "b.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(kind, folder, ".safetensors", kind.tensor)


SCALED = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("which", "changes", "names"),
    [
        ("student", {"gain": 2}, ["gain"]),
        ("student", {"norm_eps": 1e-5}, ["norm_eps 1e-05"]),
        ("student", {"guidance_embeds_scale": 1.0}, ["guidance_embeds_scale 1.0"]),
        ("student", {"norm_elementwise_affine": True}, ["norm_elementwise_affine True"]),
        ("student", {"qk_norm": "layer_norm"}, ["qk_norm 'layer_norm'"]),
        ("student", {"cross_attention_dim": 24}, ["cross_attention_dim 24"]),
        ("student", {"num_attention_heads": 4}, ["num_attention_heads"]),
        ("student", {"num_layers": 3}, ["transformer_blocks.2."]),
        ("student", {"guidance_embeds": False}, ["time_embed."]),
        ("student", {"patch_size": 10**9}, ["config.json: patch_size=1000000000"]),
        ("student", {"num_layers": -1}, ["config.json: num_layers=-1"]),
        ("student", {"sample_size": None}, ["config.json: sample_size=None"]),
        ("student", {"mlp_ratio": 1e400}, ["config.json: mlp_ratio=inf"]),
        ("student", {"qk_norm": {}}, ["config.json: qk_norm {}"]),
        ("dc_ae", {"scaling_factor": 0}, ["config.json: ", "scaling_factor=0"]),
        ("dc_ae", {"encoder_block_out_channels": None}, ["encoder_block_out_channels=None"]),
        ("dc_ae", {"latent_channels": 7}, ["config.json: ", "widths"]),
        ("gemma2", {"vocab_size": 10**30}, ["config.json: vocab_size=1000"]),
        ("dc_ae", {"gain": 2}, ["gain"]),
        ("dc_ae", {"decoder_block_types": "Conv"}, ["decoder_block_types='Conv'"]),
        ("dc_ae", {"decoder_norm_types": "batch_norm"}, ["decoder_norm_types='batch_norm'"]),
        ("gemma2", {"architectures": ["GemmaModel"]}, ["architectures ", "GemmaModel"]),
        ("gemma2", {"architectures": [["a"]]}, ["architectures "]),
        ("gemma2", {"model_type": "gemma3"}, ["model_type 'gemma3'"]),
        ("gemma2", {"hidden_activation": "silu"}, ["hidden_activation 'silu'"]),
        ("gemma2", {"attention_bias": True}, ["attention_bias True"]),
        ("gemma2", {"rope_scaling": {"factor": 2}}, ["rope_scaling {'factor': 2}"]),
        ("gemma2", {"rope_parameters": SCALED}, ["rope_parameters {"]),
        ("gemma2", {"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters ", "'yarn'"]),
        ("gemma2", {"rope_parameters": 3}, ["rope_parameters 3"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention True"]),
        ("gemma2", {"num_key_value_heads": 3}, ["num_key_value_heads 3"]),
        ("gemma2", {"head_dim": 7}, ["head_dim 7"]),
        ("gemma2", {"layer_types": ["full_attention"]}, ["1 layer_types", "3 layers"]),
        ("gemma2", {"layer_types": ["chunked"] * 3}, ["layer_types", "chunked"]),
        ("gemma2", {"layer_types": "all"}, ["layer_types='all'"]),
        ("gemma2", {"hidden_size": 2.5}, ["hidden_size=2.5"]),
        ("gemma2", {"rms_norm_eps": "no"}, ["rms_norm_eps='no'"]),
        ("gemma2", {"sliding_window": 0}, ["sliding_window=0"]),
    ],
)
def test_configs_of_other_networks_are_refused(tmp_path, which, changes, names):
    folder, _ = copy(KINDS[which], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused(KINDS[which], folder, *names)


def test_text_encoders_with_a_head_and_other_keys(tmp_path):
    folder, weights = copy(KINDS["gemma2"], tmp_path)
    network, params = gemma2.load_text_encoder(folder)
    tensors = load_file(weights)
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named | {"lm_head.weight": tensors["embed_tokens.weight"]}, weights)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Gemma2ForCausalLM"], "eos_token_id": [1, 107], "use_cache": True}
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]  # as transformers 4 has it
    (folder / "config.json").write_text(json.dumps(config))
    again, loaded = gemma2.load_text_encoder(folder)
    assert again == network
    assert_same(loaded, params)


# --- NVlabs and LADD heads


def test_arrays_for_nvlabs(student):
    fields, params = student
    arrays = nvlabs.to_nvlabs(params | {"logvar_linear": HEAD}, fields)
    stored = load_file(STORED / "sana/student" / WEIGHTS)
    block = "transformer_blocks.1"
    parts = {
        "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
        "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    }
    for name, old in parts.items():
        expected = np.concatenate([stored[f"{block}.{part}.weight"] for part in old.split()])
        np.testing.assert_array_equal(arrays[f"blocks.1.{name}.weight"], expected)
    np.testing.assert_array_equal(arrays["logvar_linear.weight"], np.arange(12.0)[None])
    assert sum(a.size for a in arrays.values()) == sum(a.size for a in stored.values()) + 13
    for each in student[0], load_transformer(STORED / "sana/teacher")[0]:
        names = nvlabs.nvlabs_names(each).values()
        assert sorted(part for parts in names for part in parts) == sorted(sana_table(each))


def test_files_of_torch_without_torch(tmp_path, student, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "model.pth"
    calls = [
        lambda: nvlabs.load_transformer(path, student[0]),
        lambda: nvlabs.save_transformer(path, *student),
        lambda: load_heads(path),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"model\.pth.*pip install torch"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def heads():
    features = tuple(jnp.zeros((1, 2, 2, 16)) for _ in range(2))
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(init_heads, features, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), a.dtype), shapes)


def test_heads_load_bit_equal(tmp_path, heads):
    path = tmp_path / "heads.safetensors"
    save_heads(path, heads)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = load_heads(path, shardings=functools.partial(state_shardings, make_mesh(1, 8)))
    assert_same(loaded, heads)
    assert not loaded["params"]["heads_0"]["main_1_conv"]["kernel"].sharding.is_fully_replicated
    # Another library's names, without the prefix.
    save_file({name.removeprefix("heads."): a for name, a in load_file(path).items()}, path)
    assert_same(load_heads(path), heads)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (None, "heads.safetensors"),
        ({"heads.0.main.0.0.weight_orig": None}, "heads.0.main.0.0.weight_orig"),
        ({"heads.1.cls.weight_u": None}, "heads.1.cls.weight_u"),
        ({"heads.1.cls.x": np.ones(1)}, "heads.1.cls.x"),
        ({"heads.1.cls.bias": np.ones(2)}, "heads.1.cls.bias has shape (2,)"),
        ({"heads.0.main.0.0.weight_orig": np.ones(3)}, "shape"),
    ],
)
def test_damaged_heads_are_refused(tmp_path, heads, change, names):
    path = tmp_path / "heads.safetensors"
    if change is not None:
        save_heads(path, heads)
        tensors = load_file(path) | change
        save_file({name: a for name, a in tensors.items() if a is not None}, path)
    with pytest.raises(UserError) as error:
        load_heads(path)
    assert str(path) in str(error.value) and names in str(error.value)


def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    script = ROOT / "benchmarks" / "load_memory.py"
    spec = importlib.util.spec_from_file_location("load_memory", script)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    width = dict(num_attention_heads=8, num_cross_attention_heads=8, cross_attention_head_dim=32)
    benchmark.write_random(tmp_path, width | dict(num_layers=14, qk_norm=True))
    assert 60e6 < (tmp_path / WEIGHTS).stat().st_size < 70e6
    words = [f"--load={tmp_path}", "--dtypes=float32", "--devices=1"]
    # Holding the file and the parameters, or all leaves twice, would be 2.
    assert 0.9 < run_on_devices(str(script), 1, *words)["peak_per_file"] < 1.3
