"""Tests of gemma2 and its interop: against stored outputs of transformers, no torch."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sprint_jax.core.errors import UserError
from sprint_jax.interop.gemma2 import gemma2_table, load_text_encoder, save_text_encoder
from sprint_jax.models.gemma2 import Gemma2

STORED = Path(__file__).parents[1] / "parity" / "stored" / "gemma2"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(STORED / "text_encoder", tmp_path / "text_encoder"))


@pytest.fixture(scope="module")
def loaded():
    return load_text_encoder(STORED / "text_encoder")


@pytest.fixture(scope="module")
def arrays():
    return load_file(STORED / "arrays.safetensors")


def assert_close(ours, theirs):
    # Float32 sums in another order, through three layers: observed 2e-6 of the largest value.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_hidden_states_of_transformers(loaded, arrays):
    gemma, params = loaded
    # Rows of 1, 13 and 20 tokens, and a window of 9: states of padding are equal, too.
    assert_close(gemma.encode(params, arrays["ids"], arrays["mask"]), arrays["hidden"])


def test_padding_and_later_tokens_are_not_seen(loaded, arrays):
    gemma, params = loaded
    ids, mask = arrays["ids"].copy(), arrays["mask"]
    before = gemma.encode(params, ids, mask)
    ids[1, 13:] = 7
    ids[2, 13:] = 7
    after = gemma.encode(params, ids, mask)
    np.testing.assert_array_equal(after[1:, :13], before[1:, :13])
    assert (after[2, 13:] != before[2, 13:]).any(-1).all()


@pytest.mark.parametrize("past", [1, 10])
def test_constant_prefix(loaded, arrays, past):
    gemma, params = loaded
    ids = jnp.asarray(arrays["ids"]).at[:, :past].set(arrays["ids"][:1, :past])
    mask = jnp.asarray(arrays["mask"]).at[:, :past].set(1)
    whole = gemma.encode(params, ids, mask)
    prefix = gemma.prefix_cache(params, ids[0, :past])
    assert prefix.keys.shape == (3, past, 2, 8)
    assert_close(gemma.encode(params, ids[:, past:], mask[:, past:], prefix), whole[:, past:])
    assert_close(prefix.hidden, whole[0, :past])


def test_bfloat16_is_near_float32(loaded, arrays):
    gemma, params = load_text_encoder(STORED / "text_encoder", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    wide = loaded[0].encode(loaded[1], arrays["ids"], arrays["mask"])
    narrow = gemma.encode(params, arrays["ids"], arrays["mask"])
    assert narrow.dtype == jnp.float32
    # Eight bits of mantissa in weights and three layers.
    assert 1e-4 < np.abs(narrow - wide).max() / np.abs(wide).max() < 0.1


def test_parameters_may_be_wider_than_the_matmuls(loaded, arrays):
    gemma = dataclasses.replace(loaded[0], dtype=jnp.bfloat16)
    narrow = gemma.encode(loaded[1], arrays["ids"], arrays["mask"])
    error = np.abs(narrow - arrays["hidden"]).max() / np.abs(arrays["hidden"]).max()
    assert 1e-4 < error < 0.1


def test_published_size():
    shapes = {name: entry.shape for name, entry in gemma2_table(Gemma2()).items()}
    assert len(shapes) == 288
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 2_614_341_888
    assert shapes["layers.25.self_attn.k_proj.weight"] == (1024, 2304)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_folder_loads_bit_equal(tmp_path, loaded, dtype):
    gemma = dataclasses.replace(loaded[0], dtype=jnp.dtype(dtype))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), loaded[1])
    save_text_encoder(tmp_path / "a", gemma, params, dtype)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.json", WEIGHTS}
    again, loaded_params = load_text_encoder(tmp_path / "a", dtype)
    assert again == gemma
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((a == b).all()), params, loaded_params
    )
    assert all(jax.tree.leaves(same))


def test_head_and_its_prefix_are_dropped(folder, loaded):
    tensors = load_file(folder / WEIGHTS)
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named | {"lm_head.weight": tensors["embed_tokens.weight"]}, folder / WEIGHTS)
    change_config(folder, architectures=["Gemma2ForCausalLM"])
    gemma, params = load_text_encoder(folder)
    assert gemma == loaded[0]
    jax.tree.map(np.testing.assert_array_equal, params, loaded[1])


def test_keys_that_change_nothing_here(folder, loaded):
    change_config(folder, cache_implementation="hybrid", eos_token_id=[1, 107], hidden_act="gelu")
    assert load_text_encoder(folder)[0] == loaded[0]


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


NAME = "layers.1.mlp.up_proj.weight"
SCALED = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "architectures is None, not one of"),
        (lambda f: change_config(f, architectures=["GemmaModel"]), r"architectures is \['GemmaMo"),
        (lambda f: change_config(f, architectures=[["a"]]), r"architectures is \[\['a'\]\]"),
        (lambda f: change_config(f, model_type="gemma3"), "model_type 'gemma3' is not supported"),
        (lambda f: change_config(f, hidden_activation="silu"), "hidden_activation 'silu' is not"),
        (lambda f: change_config(f, attention_bias=True), "attention_bias True is not supported"),
        (lambda f: change_config(f, rope_scaling={"factor": 2}), "rope_scaling {'factor': 2} is"),
        (lambda f: change_config(f, rope_parameters=SCALED), "rope_parameters {.* not supp"),
        (lambda f: change_config(f, rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn' is"),
        (lambda f: change_config(f, rope_parameters=3), "rope_parameters 3 are not supported"),
        (lambda f: change_config(f, use_bidirectional_attention=True), "use_bidirectional_att"),
        (lambda f: change_config(f, num_key_value_heads=3), "not a multiple of num_key_value_he"),
        (lambda f: change_config(f, head_dim=7), "head_dim 7 must be even"),
        (lambda f: change_config(f, layer_types=["full_attention"]), "1 layer_types for 3 layers"),
        (lambda f: change_config(f, layer_types=["chunked"] * 3), "layer type 'chunked' is unk"),
        (lambda f: change_config(f, hidden_size=2.5), "hidden_size 2.5 must be a whole number"),
        (lambda f: change_config(f, rms_norm_eps="no"), "rms_norm_eps 'no' must be a number"),
        (lambda f: change_config(f, sliding_window=0), "sliding_window 0 must be a whole number"),
        (lambda f: change_config(f, layer_types="all"), "layer_types 'all' must be a list"),
        (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "no whole"),
        (lambda f: change_tensors(f, lambda t: t.pop(NAME)), f"{NAME} is missing"),
        (lambda f: change_tensors(f, lambda t: t.update(x=t[NAME])), "tensor x has no place"),
        (lambda f: change_tensors(f, lambda t: t.update({NAME: t[NAME][:1]})), f"{NAME} has shape"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_text_encoder(folder)
    assert "\n" not in str(caught.value)
