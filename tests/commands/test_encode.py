"""Tests of encode: what is written, and what is refused."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.encoding import SMALL, STORED, Pictures, encode_small, hashes, small_config, words
from helpers.runs import ROOT, run_here
from PIL import Image
from safetensors.numpy import load_file, save_file

from sprint_jax import encode
from sprint_jax.core.errors import UserError
from sprint_jax.core.pixels import nearest_size
from sprint_jax.data.buckets import fit_image
from sprint_jax.data.latents import units
from sprint_jax.data.latents.cache import open_cache, verify_cache
from sprint_jax.data.sources.records import Caption, Record
from sprint_jax.encoders.load import encode_captions, encode_images, load_encoders

SIZES = tuple(tuple(map(int, size.split("x"))) for size in SMALL["data.sizes"])
GOOD = [i for i in range(40) if i not in (5, 21)]


def records_of(folder) -> dict:
    cache = verify_cache(folder)
    return {record.key: record for record in cache.__getitems__(range(len(cache)))}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return encode_small(tmp_path_factory.mktemp("encode") / "latents")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline folder without a transformer: tiny networks of the real kinds, and their weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(STORED / "dc_ae", folder / "vae")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(STORED / "gemma2" / part, folder / part)
    return folder


def test_every_record_is_its_picture_and_its_captions_encoded(written):
    source, found = Pictures(40, (5, 21)), records_of(written)
    encoders = load_encoders("", jnp.float32)
    assert len(found) == len(GOOD)
    for index in GOOD:
        key, image, captions = source[index]
        image = fit_image(image, nearest_size(*image.shape[:2], SIZES))
        latents = np.asarray(encode_images(encoders.autoencoder, image[None]))[0]
        np.testing.assert_allclose(found[key].latents, latents, atol=1e-6)
        assert found[key].captions == captions
        text, mask = encode_captions(encoders.text_encoder, [caption.text for caption in captions])
        for k in range(len(captions)):
            np.testing.assert_array_equal(found[key].texts[k], text[k, mask[k] == 1])


def test_the_manifest_counts_and_measures(written):
    cache, found = open_cache(written), records_of(written)
    made = cache.manifest
    latents = [record.latents.reshape(-1, 12).astype(np.float64) for record in found.values()]
    values = np.concatenate(latents)
    np.testing.assert_allclose(made["latents"]["mean"], values.mean(0), rtol=1e-9)
    np.testing.assert_allclose(made["latents"]["std"], values.std(0), rtol=1e-9)
    np.testing.assert_allclose(made["latents"]["overall_std"], values.std(), rtol=1e-9)
    captions = [record.captions for record in found.values()]
    assert made["captions"] == sum(map(len, captions))
    assert {tuple(b["latents"]): b["captions"] for b in made["buckets"]} == {
        size: sum(len(item.captions) for item in cache.__getitems__(numbers))
        for size, numbers in cache.buckets.items()
    }
    assert made["without_caption"] == sum(texts[0].text == "" for texts in captions) > 0
    assert {tuple(b["latents"]): b["records"] for b in made["buckets"]} == {
        size: len(numbers) for size, numbers in cache.buckets.items()
    }
    assert {tuple(bucket["pixels"]) for bucket in made["buckets"]} == set(SIZES)
    rejected = (written / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in rejected] == ["picture-005", "picture-021"]
    assert made["rejected"] == 2 and "it is no picture" in rejected[0]
    with Image.open(written / "preview.png") as sheet:
        assert sheet.size[1] > 200


@pytest.mark.parametrize(
    ("std", "words"),
    [(0.97, "0.97: sigma_d 0.5 stands for 0.485, which fits"), (2.0, r"does not fit; .* of 0.207")],
)
def test_the_manifest_says_whether_sigma_d_fits(std, words):
    values = np.random.default_rng(0).standard_normal((1000, 4))
    values *= std / values.std()
    values -= values.mean()
    sums = {"count": 1000, "sums": values.sum(0), "squares": (values**2).sum(0)}
    nothing = {"count": 0, "sums": [0.0], "squares": [0.0]}
    told = encode.manifest.describe_latents([nothing, sums], 0.41407, 0.5)
    assert told["fits"] == (std < 1)
    assert pytest.approx(std, rel=1e-6) == told["overall_std"]
    assert re.search(words, told["in_words"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_networks_of_the_real_kinds(pipeline, tmp_path, dtype):
    source = Pictures(12)
    how = dict(data__encoders=str(pipeline), encode__dtype=dtype, data__sizes=("8x16", "16x8"))
    how |= dict(mesh__fsdp=2)  # parameters split over devices as well
    found = records_of(encode_small(tmp_path / "latents", source, **how))
    cache = open_cache(tmp_path / "latents")
    # Of the same programs, which numbers in bfloat16 depend on.
    encoders = encode.make_job(small_config(**how), source, tmp_path, None).encoders
    assert cache.text_length == 300 and cache.manifest["text_features"] == 16
    identity = cache.manifest["encoders"]
    assert identity == encoders.identity
    assert identity["text_encoder"]["instruction"].endswith("User Prompt: ")
    assert identity["autoencoder"]["scaling_factor"] == 0.41407
    null, mask = encoders.text_encoder.encode_plain([""])
    np.testing.assert_allclose(cache.null_text[0], null[0, 0], atol=1e-6)
    assert cache.null_mask.tolist() == mask[0].tolist()
    texts = [caption.text for index in range(12) for caption in source[index].captions]
    text, mask = encode_captions(encoders.text_encoder, texts)
    for size in SIZES[:2]:
        rows = [i for i in range(12) if nearest_size(*source[i].image.shape[:2], SIZES[:2]) == size]
        images = np.stack([fit_image(source[i].image, size) for i in (rows + rows)[:8]])
        latents = np.asarray(encode_images(encoders.autoencoder, images, encoders.sharding))
        for index, expected in zip(rows, latents, strict=False):
            record = found[source[index].key]
            assert record.latents.dtype == record.texts[0].dtype == jnp.dtype(dtype)
            assert_same(record.latents, expected)
            for k, caption in enumerate(record.captions):
                row = texts.index(caption.text)
                assert_same(record.texts[k], text[row, mask[row] == 1])


def assert_same(stored: np.ndarray, expected: np.ndarray) -> None:
    """That stored numbers are the expected ones, rounded to their dtype."""
    rounded = expected.astype(stored.dtype).astype(np.float32)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(stored.astype(np.float32) / scale, rounded / scale, atol=1e-6)


def test_a_changed_text_encoder_is_not_mixed_with_the_old(pipeline, tmp_path):
    out, other = tmp_path / "latents", shutil.copytree(pipeline, tmp_path / "other")
    encode_small(out, Pictures(8), data__encoders=str(pipeline), data__sizes=("8x16", "16x8"))
    before = hashes(out)
    weights = load_file(other / "text_encoder" / "model.safetensors")
    name = sorted(weights)[3]
    save_file(weights | {name: weights[name] * 1.001}, other / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match=r"with encoders\.text_encoder\.params \w+.*not mixed"):
        encode_small(out, Pictures(8), data__encoders=str(other), data__sizes=("8x16", "16x8"))
    assert hashes(out) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(encode__dtype="bfloat16"), "with dtype float32, this is bfloat16"),
        (dict(data__sizes=("8x16", "16x8")), r"with sizes \[\[8, 16\]"),
        (dict(encode__unit=16), "with unit 8, this is 16"),
        (dict(source=Pictures(40)), r"with source\.identity pictures 40 \(5"),
        (dict(limit=16), r"with source\.records 40, this is 16"),
    ],
)
def test_another_job_is_not_mixed_with_the_old(written, changes, message):
    before = hashes(written)
    with pytest.raises(UserError, match=message) as raised:
        encode_small(written, **changes)
    assert "\n" not in str(raised.value) and hashes(written) == before


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is something else"):
        encode_small(tmp_path)
    with pytest.raises(UserError, match="is something else"):
        encode_small(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_done_is_not_done_again(written, monkeypatch, capsys):
    monkeypatch.setattr(Pictures, "__getitem__", None)
    encode_small(written)
    assert "is done already: 38 records with 44 captions in 3 buckets" in capsys.readouterr().out


def test_a_large_unit_is_cut_into_shards(written, tmp_path, monkeypatch):
    make = encode.make_job
    monkeypatch.setattr(
        encode, "make_job", lambda *a: units.dataclasses.replace(make(*a), shard_bytes=5_000)
    )
    cut = encode_small(tmp_path / "latents")
    assert len(list((cut / "shards").iterdir())) > 2 * len(list((written / "shards").iterdir()))
    whole, found = open_cache(written), open_cache(cut)
    assert [r.key for r in found.__getitems__(range(38))] == [whole[i].key for i in range(38)]
    assert {size: list(found.buckets[size]) for size in found.buckets} == {
        size: list(whole.buckets[size]) for size in whole.buckets
    }


def test_too_many_rejected_records_end_the_job_early(tmp_path, monkeypatch):
    source = Pictures(40, tuple(range(5, 13)))
    with pytest.raises(UserError, match=r"8 of 16 records cannot be used, .* = 0\.15") as e:
        encode_small(tmp_path / "a", source, data__max_rejected=0.15)
    assert "For example: picture-005 (it is no picture)" in str(e.value)
    assert len((tmp_path / "a" / "rejected.jsonl").read_text().splitlines()) == 8
    assert len(list((tmp_path / "a" / "units").iterdir())) == 2
    with pytest.raises(UserError, match="is missing"):
        open_cache(tmp_path / "a")
    # The same folder goes on once more are allowed, and a share that is just met is allowed.
    encode_small(tmp_path / "a", source, data__max_rejected=0.2)
    assert len(open_cache(tmp_path / "a")) == 32


def test_a_source_of_nothing_but_rejects(tmp_path):
    with pytest.raises(UserError, match="no record of pictures can be used"):
        encode_small(tmp_path / "a", Pictures(9, tuple(range(9))), data__max_rejected=1.0)


def test_options_that_cannot_be(tmp_path):
    for changes, message in [
        (dict(encode__dtype="float16"), "encode.dtype is 'float16'"),
        (dict(encode__batch_size=12), "encode.batch_size 12 is not a multiple of the 8 devices"),
        (dict(encode__unit=0), "encode.unit is 0"),
        (dict(data__sizes=("8x15",)), "8x15 cannot be encoded"),
        (dict(data__encoders="nowhere"), "data.encoders nowhere does not exist"),
        (dict(source=Pictures(0)), "pictures has no record"),
    ]:
        with pytest.raises(UserError, match=message):
            encode_small(tmp_path / "a", **changes)
    with pytest.raises(UserError, match="--limit 0") as raised:
        encode.main([*words(tmp_path / "a"), "--limit", "0"])
    assert raised.value.exit_code == 2 and not (tmp_path / "a").exists()


class Infinite(Pictures):
    """A picture that no network can be blamed for."""

    def __getitem__(self, index):
        return Record(f"{index}", np.zeros((8, 16, 3), np.uint8), (Caption("a red 3"),))


def test_latents_that_are_not_finite_are_not_stored(tmp_path, monkeypatch):
    broken = lambda *a: jnp.full((8, 4, 8, 12), jnp.nan)  # noqa: E731
    monkeypatch.setattr(units, "encode_images", broken)
    with pytest.raises(UserError, match="latents of 0 are not finite"):
        encode_small(tmp_path / "a", Infinite(8))


def test_a_folder_of_images_is_not_written_into(tmp_path, monkeypatch, capfd):
    (tmp_path / "images").mkdir()
    spec = f"{ROOT / 'configs' / 'encode.py'}:digits"
    words = ["--config", spec, f"--config.data.images={tmp_path / 'images'}"]
    words += ["--out", str(tmp_path / "images" / "latents")]
    ended = run_here(words, monkeypatch, capfd, encode.main)
    assert ended.code == 2 and "lies in the images of" in ended.error
    assert not any((tmp_path / "images").iterdir())
