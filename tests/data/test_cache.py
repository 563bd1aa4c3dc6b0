"""The cache of latents: records as bytes, folders that are whole, and folders that are refused."""

import json
import shutil

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.encoding import Pictures, encode_small

from sprint_jax.core.errors import UserError
from sprint_jax.data.latents import cache
from sprint_jax.data.latents.cache import CachedRecord, open_cache, pack, pad_texts, unpack
from sprint_jax.data.sources.records import Caption

SHARD = "shards/00002-0.array_record"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return encode_small(tmp_path_factory.mktemp("cache") / "latents")


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "latents")


def record(dtype="bfloat16"):
    captions = (Caption("a é\n\ud800 漢", 0.5, 0.25), Caption(""))
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape) for shape in ((4, 6, 3), (5, 8), (1, 8))]
    latents, *texts = (array.astype(jnp.dtype(dtype)) for array in arrays)
    return CachedRecord("shard/κ 1.jpg", latents, captions, tuple(texts))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_record_comes_back_bit_by_bit_and_no_array_is_copied(dtype):
    old = record(dtype)
    data = pack(old)
    new = unpack(data)
    assert (new.key, new.captions) == (old.key, old.captions)
    chex.assert_trees_all_equal((new.latents, new.texts), (old.latents, old.texts), strict=True)
    assert pack(new) == data == pack(record(dtype))
    for array in (new.latents, *new.texts):
        start = array.__array_interface__["data"][0] - np.frombuffer(data, np.uint8).ctypes.data
        assert 0 < start < len(data) and not array.flags.writeable


@pytest.mark.parametrize(
    "data", [b"", b"12", b"\0" * 64, pack(record())[:120], b"\x02" + b"{}" * 9]
)
def test_what_is_no_record_is_a_value_error(data):
    with pytest.raises(ValueError):
        unpack(data)


def test_texts_are_padded_to_a_batch():
    texts = record().texts
    text, mask = pad_texts(texts, 6)
    assert text.shape == (2, 6, 8) and text.dtype == texts[0].dtype
    assert mask.dtype == np.int32 and mask.tolist() == [[1] * 5 + [0], [1] + [0] * 5]
    np.testing.assert_array_equal(text[0, :5], texts[0])
    assert not text[mask == 0].astype(np.float32).any()


def test_a_folder_gives_every_record_under_its_bucket(written, tmp_path):
    found = open_cache(written)
    assert len(found) == 38 == found.manifest["records"]
    assert found.text_length == 12 and found.null_text.shape == (12, 64)
    assert found.null_mask.tolist() == [1] + [0] * 11
    assert sorted(np.concatenate(list(found.buckets.values()))) == list(range(38))
    for size, bucket in found.buckets.items():
        assert {item.latents.shape[:2] for item in found.__getitems__(bucket)} == {size}
    keys = [found[i].key for i in range(38)]
    assert set(keys) == {f"picture-{i:03d}" for i in range(40) if i not in (5, 21)}
    order = [31, 0, 17, 0]
    assert [item.key for item in found.__getitems__(order)] == [keys[i] for i in order]
    other = open_cache(encode_small(tmp_path / "other", Pictures(8)))
    assert other.identity == found.identity and len(other.identity) == 64


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut(path, size, to=None):
    with path.open("r+b") as file:
        file.truncate(size)
        file.truncate(to or size)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
        (lambda f: shutil.rmtree(f), "latents/manifest.json"),
        (lambda f: cut(f / "manifest.json", 100), "manifest.json"),
        (lambda f: change_manifest(f, format=0), "manifest.json .*format 0.* 1"),
        (lambda f: (f / SHARD).unlink(), SHARD),
        (lambda f: cut(f / SHARD, 70_000), SHARD),
        (lambda f: cut(f / SHARD, 0), SHARD),
        # Of the right size, with the end still to come: what some copying tools leave.
        (lambda f: cut(f / SHARD, 65_536, 131_072), SHARD),
        (lambda f: shutil.copy(f / SHARD, f / "shards/00001-0.array_record"), "00001-0"),
        (lambda f: shutil.copy(f / SHARD, f / "shards/9-0.array_record"), "shards/9-0"),
        (lambda f: (f / "null_text.safetensors").unlink(), "null_text.safetensors"),
        (lambda f: flip(f / "null_text.safetensors", -1), "null_text.safetensors"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(folder, damage, named):
    damage(folder)
    with pytest.raises(UserError, match=named) as raised:
        open_cache(folder)
    assert "\n" not in str(raised.value)


def test_a_damaged_byte_is_found_when_its_record_is_read(folder):
    flip(folder / SHARD, 10_000)
    found = open_cache(folder)
    with pytest.raises(UserError, match=str(folder)):
        found.__getitems__(range(len(found)))


def test_more_shards_than_files_may_be_open_are_refused(monkeypatch):
    limits = []
    monkeypatch.setattr(cache.resource, "getrlimit", lambda _: (100, 2000))
    monkeypatch.setattr(cache.resource, "setrlimit", lambda _, limit: limits.append(limit))
    cache._allow_open_files(1500)
    assert limits == [(2000, 2000)]
    with pytest.raises(UserError, match=r"1800 .*2000.*config\.encode\.unit"):
        cache._allow_open_files(1800)
