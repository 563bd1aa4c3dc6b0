"""Tests of interop: transformers and LADD heads from files to devices and back, and files that are wrong.
Against stored outputs of diffusers, without torch."""

import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sprint_jax.core.errors import UserError
from sprint_jax.interop import nvlabs
from sprint_jax.interop.diffusers import LOGVAR, STEM, WEIGHTS, load_transformer, save_transformer
from sprint_jax.interop.discriminator import load_heads, save_heads
from sprint_jax.interop.files import save_safetensors
from sprint_jax.interop.sana import sana_table
from sprint_jax.models.discriminator import init_heads
from sprint_jax.models.sana import SanaTransformer
from sprint_jax.parallel.sharding import make_mesh, state_shardings

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "parity" / "stored" / "sana"


@pytest.fixture(scope="module", params=["student", "teacher"])
def stored(request) -> Path:
    return STORED / request.param


@pytest.fixture(scope="module")
def student():
    return load_transformer(STORED / "student")


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(STORED / "student", tmp_path / "transformer"))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert [a.dtype for a in jax.tree.leaves(one)] == [a.dtype for a in jax.tree.leaves(other)]


def test_velocity_is_that_of_diffusers(stored):
    fields, params = load_transformer(stored)
    arrays = load_file(stored / "arrays.safetensors")
    velocity = arrays.pop("velocity")
    out = jax.jit(SanaTransformer(**fields).apply)({"params": params}, **arrays)
    # Sums of up to 100 float32 products in another order: observed 5e-7 of the largest value.
    np.testing.assert_allclose(out, velocity, rtol=0, atol=2e-5 * np.abs(velocity).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_folder_loads_bit_equal(tmp_path, stored, dtype):
    fields, params = load_transformer(stored, dtype)
    save_transformer(tmp_path, fields, params, dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    again, loaded = load_transformer(tmp_path, dtype)
    assert SanaTransformer(**again) == SanaTransformer(**fields)
    assert_same(loaded, params)


@pytest.mark.parametrize("mesh", [(2, 4), (4, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_lie_where_they_are_asked_to(mesh, dtype):
    asked = []

    def shardings(structs):
        asked.append(state_shardings(make_mesh(*mesh), structs))
        return asked[0]

    _, plain = load_transformer(STORED / "student", dtype)
    _, params = load_transformer(STORED / "student", dtype, shardings=shardings)
    assert_same(params, plain)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == asked[0]
    split = [leaf for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated]
    assert len(split) >= 10


def test_logvar_head_goes_into_a_file_of_its_own(tmp_path, student):
    fields, params = student
    head = {"kernel": jnp.arange(12.0)[:, None], "bias": jnp.ones(1)}
    save_transformer(tmp_path, fields | {"logvar": True}, params | {"logvar_linear": head})
    assert not any(name.startswith("logvar") for name in load_file(tmp_path / WEIGHTS))
    again, loaded = load_transformer(tmp_path)
    assert again["logvar"] is True
    assert_same(loaded, params | {"logvar_linear": head})
    # A later save without it does not leave the old one.
    save_transformer(tmp_path, fields, params)
    assert not (tmp_path / LOGVAR).exists()
    assert "logvar" not in load_transformer(tmp_path)[0]


def test_one_file_and_fields(tmp_path, student):
    fields, params = student
    file = Path(shutil.copy(STORED / "student" / WEIGHTS, tmp_path / "weights.safetensors"))
    found, loaded = load_transformer(file, fields=fields)
    assert found == fields
    assert_same(loaded, params)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_transformer(file)


def test_many_files_and_what_an_earlier_save_left(folder, student):
    fields, params = student
    variant = folder / f"{STEM}.fp16.safetensors"
    variant.write_bytes(b"a user's own")
    save = functools.partial(save_safetensors, folder, STEM, sana_table(fields), params)
    save(jnp.float32, shard_bytes=10_000)
    files = sorted(folder.glob(f"{STEM}-*.safetensors"))
    assert len(files) > 5 and not (folder / WEIGHTS).exists()
    assert_same(load_transformer(folder)[1], params)
    files[-1].rename(folder / "elsewhere")
    with pytest.raises(UserError, match=f"{files[-1].name} is missing"):
        load_transformer(folder)
    save(jnp.float32)
    assert {path.name for path in folder.glob(f"{STEM}*")} == {WEIGHTS, variant.name}
    assert_same(load_transformer(folder)[1], params)


def test_folder_of_a_broken_save_is_refused(folder, student):
    fields, params = student
    with pytest.raises(KeyError, match="proj_out"):
        save_transformer(folder, fields, {k: v for k, v in params.items() if k != "proj_out"})
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_transformer(folder)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def shard_twice(folder):
    """Two files of an index, which have one tensor in common."""
    tensors = load_file(folder / WEIGHTS)
    save_file({NAME: tensors[NAME]}, folder / "b.safetensors")
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {NAME: "b.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def break_index(folder):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text('{"metadata": {}}')


NAME = "transformer_blocks.1.attn1.to_q.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, r"config\.json is missing"),
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "is of class None"),
        (lambda f: change_config(f, _class_name="FluxTransformer2DModel"), "is of class 'Flux"),
        (lambda f: change_config(f, gain=2), "key 'gain' is unknown"),
        (lambda f: change_config(f, norm_eps=1e-5), "norm_eps 1e-05 is not supported"),
        (lambda f: change_config(f, guidance_embeds_scale=1.0), "guidance_embeds_scale 1.0 is not"),
        (lambda f: change_config(f, norm_elementwise_affine=True), "norm_elementwise_affine True"),
        (lambda f: change_config(f, qk_norm="layer_norm"), "qk_norm 'layer_norm' is not"),
        (lambda f: change_config(f, cross_attention_dim=24), "cross_attention_dim 24 differs"),
        (lambda f: change_config(f, num_attention_heads=4), "they must be equal"),
        (lambda f: change_config(f, num_layers=3), r"transformer_blocks\.2\.\S+ is missing \(and"),
        (lambda f: change_config(f, guidance_embeds=False), r"time_embed\.\S+ has no place"),
        (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda f: cut(f / WEIGHTS, -9), f"{WEIGHTS} is no whole safetensors file"),
        (lambda f: cut(f / WEIGHTS, 100), f"{WEIGHTS} is no whole safetensors file"),
        (lambda f: cut(f / WEIGHTS, 0), f"{WEIGHTS} is no whole safetensors file"),
        (lambda f: change_tensors(f, lambda t: t.pop(NAME)), f"{NAME} is missing$"),
        (lambda f: change_tensors(f, lambda t: t.update(x=t[NAME])), "tensor x has no place"),
        (
            lambda f: change_tensors(f, lambda t: t.update({NAME: t[NAME][:1]})),
            rf"{NAME} has shape \(1, 12\), but the config makes it \(12, 12\)",
        ),
        (
            lambda f: change_tensors(f, lambda t: t.update({NAME: t[NAME].astype(np.int32)})),
            f"{NAME} is I32, not a float",
        ),
        (shard_twice, rf"[ab]\.safetensors: tensor {NAME} is in another file as well"),
        (break_index, r"index\.json cannot be read"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, message):
    damage(folder)
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        load_transformer(folder)
    assert str(folder) in str(error.value) or "they must be equal" in message
    assert "\n" not in str(error.value)
    assert sorted(folder.parent.rglob("*")) == before


def test_names_of_nvlabs_are_total():
    fields = load_transformer(STORED / "teacher")[0]
    names = nvlabs.nvlabs_names(fields)
    assert sorted(part for parts in names.values() for part in parts) == sorted(sana_table(fields))
    assert names["t_embedder.mlp.2.bias"] == ("time_embed.emb.timestep_embedder.linear_2.bias",)
    block = "transformer_blocks.0"
    qkv = tuple(f"{block}.attn1.to_{letter}.weight" for letter in "qkv")
    assert names["blocks.0.attn.qkv.weight"] == qkv
    kv = tuple(f"{block}.attn2.to_{letter}.bias" for letter in "kv")
    assert names["blocks.0.cross_attn.kv_linear.bias"] == kv


def test_arrays_for_nvlabs(student):
    fields, params = student
    head = {"kernel": jnp.arange(12.0)[:, None], "bias": jnp.ones(1)}
    arrays = nvlabs.to_nvlabs(params | {"logvar_linear": head}, fields)
    stored = load_file(STORED / "student" / WEIGHTS)
    parts = [stored[f"transformer_blocks.1.attn1.to_{letter}.weight"] for letter in "qkv"]
    np.testing.assert_array_equal(arrays["blocks.1.attn.qkv.weight"], np.concatenate(parts))
    np.testing.assert_array_equal(arrays["logvar_linear.weight"], np.arange(12.0)[None])
    assert sum(a.size for a in arrays.values()) == sum(a.size for a in stored.values()) + 13


def test_files_of_torch_without_torch(tmp_path, student, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    fields, params = student
    path = tmp_path / "model.pth"
    calls = [
        lambda: nvlabs.load_transformer(path, fields),
        lambda: nvlabs.save_transformer(path, fields, params),
        lambda: nvlabs.load_null_text(path),
        lambda: load_heads(path),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"model\.pth: .* need torch: pip install torch"):
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
    assert_same(load_heads(path), heads)
    stored = load_file(path)
    kernel = np.asarray(heads["params"]["heads_1"]["main_1_conv"]["kernel"])
    weight, vectors = (
        stored[f"heads.1.main.1.fn.0.{name}"] for name in ("weight_orig", "weight_v")
    )
    np.testing.assert_array_equal(weight[3, 5], kernel[:, 5, 3])
    v = np.asarray(heads["spectral"]["heads_1"]["main_1_conv"]["v"])
    np.testing.assert_array_equal(vectors.reshape(16, 9)[5], v[:, 5])
    # Another library's names, without the prefix.
    save_file({name.removeprefix("heads."): a for name, a in stored.items()}, path)
    assert_same(load_heads(path), heads)


def test_heads_lie_where_they_are_asked_to(tmp_path, heads):
    save_heads(tmp_path / "heads.safetensors", heads)
    shardings = functools.partial(state_shardings, make_mesh(1, 8))
    loaded = load_heads(tmp_path / "heads.safetensors", shardings=shardings)
    assert_same(loaded, heads)
    kernel = loaded["params"]["heads_0"]["main_1_conv"]["kernel"]
    assert not kernel.sharding.is_fully_replicated


@pytest.mark.parametrize(
    "change, message",
    [
        (None, r"heads\.safetensors is missing"),
        ({"heads.0.main.0.0.weight_orig": None}, "has no LADD heads"),
        ({"heads.1.cls.weight_u": None}, r"tensor heads\.1\.cls\.weight_u is missing"),
        ({"heads.1.cls.x": np.ones(1)}, r"tensor heads\.1\.cls\.x has no place"),
        ({"heads.1.cls.bias": np.ones(2)}, r"heads\.1\.cls\.bias has shape \(2,\)"),
        ({"heads.0.main.0.0.weight_orig": np.ones(3)}, "has shape"),
    ],
)
def test_damaged_heads_are_refused(tmp_path, heads, change, message):
    path = tmp_path / "heads.safetensors"
    if change is not None:
        save_heads(path, heads)
        tensors = load_file(path) | change
        save_file({name: a for name, a in tensors.items() if a is not None}, path)
    with pytest.raises(UserError, match=message) as error:
        load_heads(path)
    assert str(path) in str(error.value)


def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    path = ROOT / "benchmarks" / "load_memory.py"
    spec = importlib.util.spec_from_file_location("load_memory", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    width = dict(num_attention_heads=8, num_cross_attention_heads=8, cross_attention_head_dim=32)
    benchmark.write_random(tmp_path, width | dict(num_layers=14, qk_norm=True))
    assert 60e6 < (tmp_path / WEIGHTS).stat().st_size < 70e6
    # Holding the file and the parameters, or all leaves twice, would be 2.
    peak = benchmark.measure(tmp_path, "float32", 1)["peak_per_file"]
    assert 0.9 < peak < 1.3
