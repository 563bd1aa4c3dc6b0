"""Tests of data/cache: records as bytes, folders that are whole, and folders that are refused."""

import json
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.encoding import Pictures, encode_small

from sprint_jax.core.errors import UserError
from sprint_jax.data.latents import cache
from sprint_jax.data.latents.cache import (
    CachedRecord,
    open_cache,
    pack,
    pad_texts,
    unpack,
    verify_cache,
)
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


def bits(array: np.ndarray) -> bytes:
    return array.tobytes() + str((array.dtype, array.shape)).encode()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_record_comes_back_bit_by_bit(dtype):
    old = record(dtype)
    data = pack(old)
    new = unpack(data)
    assert (new.key, new.captions) == (old.key, old.captions)
    assert bits(new.latents) == bits(old.latents)
    assert list(map(bits, new.texts)) == list(map(bits, old.texts))
    assert pack(new) == data == pack(record(dtype))


def test_unpacking_copies_no_array():
    data = pack(record())
    new = unpack(data)
    for array in (new.latents, *new.texts):
        start = array.__array_interface__["data"][0] - np.frombuffer(data, np.uint8).ctypes.data
        assert 0 < start < len(data) and not array.flags.writeable


@pytest.mark.parametrize(
    "data", [b"", b"12", b"\0" * 64, pack(record())[:120], b"\x02" + b"{}" * 9]
)
def test_what_is_no_record_is_a_value_error(data):
    with pytest.raises(ValueError):
        unpack(data)


def test_records_that_cannot_be_stored():
    old = record()
    for changes, message in [
        (dict(texts=old.texts[:1]), "1 texts for 2 captions"),
        (dict(latents=old.latents.astype(np.float32)), r"\['bfloat16', 'float32'\]"),
        (dict(latents=old.latents.astype(np.float16)), "float16"),
        (dict(texts=(), captions=()), "0 texts for 0 captions"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack(old._replace(**changes))


def test_texts_are_padded_to_a_batch():
    texts = record().texts
    text, mask = pad_texts(texts, 6)
    assert text.shape == (2, 6, 8) and text.dtype == texts[0].dtype
    assert mask.dtype == np.int32 and mask.tolist() == [[1] * 5 + [0], [1] + [0] * 5]
    np.testing.assert_array_equal(text[0, :5], texts[0])
    assert not text[mask == 0].astype(np.float32).any()
    with pytest.raises(ValueError, match="text 0 has 5 tokens, more than 4"):
        pad_texts(texts, 4)


def test_a_folder_gives_every_record_under_its_bucket(written):
    cache = verify_cache(written)
    assert len(cache) == 38 == cache.manifest["records"]
    assert cache.text_length == 12 and cache.null_text.shape == (12, 64)
    assert cache.null_mask.tolist() == [1] + [0] * 11
    numbers = np.concatenate(list(cache.buckets.values()))
    assert sorted(numbers) == list(range(38))
    for size, bucket in cache.buckets.items():
        assert {item.latents.shape[:2] for item in cache.__getitems__(bucket)} == {size}
    keys = [cache[i].key for i in range(38)]
    assert set(keys) == {f"picture-{i:03d}" for i in range(40) if i not in (5, 21)}
    order = [31, 0, 17, 0]
    assert [item.key for item in cache.__getitems__(order)] == [keys[i] for i in order]


def test_an_open_folder_can_be_sent_to_another_process(written):
    cache = open_cache(written)
    cache[0]
    assert pickle.loads(pickle.dumps(cache))[7].key == cache[7].key


def test_folders_of_one_pair_of_encoders_have_one_identity(written, tmp_path):
    other = open_cache(encode_small(tmp_path / "other", Pictures(8)))
    assert other.identity == open_cache(written).identity and len(other.identity) == 64


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
    ("damage", "message"),
    [
        (
            lambda f: (f / "manifest.json").unlink(),
            r"not a whole folder .*manifest.json is missing",
        ),
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: cut(f / "manifest.json", 100), r"manifest\.json cannot be read"),
        (lambda f: change_manifest(f, format=0), "is of format 0, this version reads 1"),
        (lambda f: (f / SHARD).unlink(), rf"{SHARD} is missing or empty"),
        (lambda f: cut(f / SHARD, 70_000), rf"{SHARD} has 70000 bytes instead of 131072"),
        (lambda f: cut(f / SHARD, 0), rf"{SHARD} is missing or empty"),
        # Of the right size, with the end still to come: what some copying tools leave.
        (lambda f: cut(f / SHARD, 65_536, 131_072), rf"{SHARD} is not the shard"),
        (lambda f: (f / SHARD).rename(f / f"{SHARD}.part"), rf"{SHARD} is missing"),
        (
            lambda f: shutil.copy(f / SHARD, f / "shards/00001-0.array_record"),
            "00001-0.* is not the",
        ),
        (
            lambda f: shutil.copy(f / SHARD, f / "shards/9-0.array_record"),
            "9-0.* not of this folder",
        ),
        (lambda f: (f / "null_text.safetensors").unlink(), "null_text.* is missing"),
        (lambda f: flip(f / "null_text.safetensors", -1), "null_text.* not the one"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        open_cache(folder)
    assert "\n" not in str(raised.value)


def test_a_damaged_byte_is_found_by_its_hash_and_by_reading(folder):
    cache = open_cache(folder)
    first = cache.manifest["shards"][2]
    flip(folder / SHARD, 10_000)
    cache = open_cache(folder)
    with pytest.raises(UserError, match=rf"{SHARD} is damaged"):
        verify_cache(folder)
    start = sum(shard["records"] for shard in cache.manifest["shards"][:2])
    with pytest.raises(UserError, match=r"latents: records .* cannot be read"):
        cache.__getitems__(range(start, start + first["records"]))


def test_more_shards_than_files_may_be_open_are_refused(monkeypatch):
    limits = []
    monkeypatch.setattr(cache.resource, "getrlimit", lambda _: (100, 2000))
    monkeypatch.setattr(cache.resource, "setrlimit", lambda _, limit: limits.append(limit))
    cache._allow_open_files(1500)
    assert limits == [(2000, 2000)]
    with pytest.raises(
        UserError, match="1800 shards cannot be open at once: this system allows 2000"
    ):
        cache._allow_open_files(1800)
