"""The command encode: the folder that it writes, and the jobs that it refuses."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.encoding import (
    SMALL,
    STORED,
    Pictures,
    encode_small,
    hashes,
    small_config,
    words,
)
from helpers.recording import Recording
from helpers.runs import ROOT, run_here, write_digits
from PIL import Image
from safetensors.numpy import load_file, save_file

from configs import default
from sprint_jax import encode
from sprint_jax.core import cli
from sprint_jax.core.config import flatten, load_config
from sprint_jax.core.errors import UserError
from sprint_jax.core.pixels import nearest_size
from sprint_jax.data.buckets import fit_image
from sprint_jax.data.feed import open_data
from sprint_jax.data.latents import manifest, units
from sprint_jax.data.latents.cache import open_cache
from sprint_jax.encoders.load import encode_captions, encode_images, load_encoders, style_of
from sprint_jax.parallel.sharding import make_mesh

SIZES = tuple(tuple(map(int, size.split("x"))) for size in SMALL["data.sizes"])
TWO = ("8x16", "16x8")


def read_records(folder) -> dict:
    cache = open_cache(folder)
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


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("digits", "float32", 1e-6),
        pytest.param("real", "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("real", "bfloat16", 0.05, marks=pytest.mark.slow),
    ],
)
def test_every_record_is_its_picture_and_its_captions_encoded(
    pipeline, tmp_path, kind, dtype, tolerance
):
    path = {"digits": "", "real": str(pipeline)}[kind]
    # Parameters are split over devices as well.
    how = dict(data__encoders=path, encode__dtype=dtype, data__sizes=TWO, mesh__fsdp=2)
    out, source = encode_small(tmp_path / "latents", Pictures(12, (5,)), **how), Pictures(12)
    cache, found = open_cache(out), read_records(out)
    encoders = load_encoders(path, jnp.float32)

    def check(stored, expected):
        assert stored.dtype == jnp.dtype(dtype)
        difference = np.abs(stored.astype(np.float32) - expected).max()
        assert difference <= tolerance * np.abs(expected).max()

    assert sorted(found) == [f"picture-{i:03d}" for i in range(12) if i != 5]
    for key, image, captions, *_ in map(source.__getitem__, [i for i in range(12) if i != 5]):
        image = fit_image(image, nearest_size(*image.shape[:2], SIZES[:2]))
        check(found[key].latents, np.asarray(encode_images(encoders.autoencoder, image[None]))[0])
        assert found[key].captions == captions
        text, mask = encode_captions(encoders.text_encoder, [caption.text for caption in captions])
        for stored, tokens, kept in zip(found[key].texts, text, mask, strict=True):
            check(stored, tokens[kept == 1])
    null, mask = encoders.text_encoder.encode_plain([""])
    # Its padding too, which other masks than its own show.
    np.testing.assert_allclose(cache.null_text, null[0], atol=tolerance * np.abs(null).max())
    if kind == "real":
        assert mask.sum() < 300 and (np.abs(cache.null_text).max(1) > 0).all()
    assert cache.null_mask.tolist() == mask[0].tolist()
    identity = cache.manifest["encoders"]
    if kind == "real":
        assert cache.text_length == 300 and cache.manifest["text_features"] == 16
        assert identity["text_encoder"]["instruction"].endswith("User Prompt: ")
        assert style_of(identity) == "diffusers"
        assert identity["autoencoder"]["scaling_factor"] == 0.41407


def test_captions_are_put_as_the_config_says(pipeline, written, tmp_path):
    encoders = load_encoders(str(pipeline), jnp.float32, style="nvlabs")
    assert style_of(encoders.identity) == "nvlabs"
    assert not encoders.text_encoder.lower and encoders.text_encoder.instruction.count('"') == 2
    with pytest.raises(UserError, match=r"prompt_style 'own'.*diffusers, nvlabs"):
        load_encoders(str(pipeline), jnp.float32, style="own")
    folder = Path(shutil.copytree(written, tmp_path / "latents"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["encoders"]["text_encoder"] |= encoders.identity["text_encoder"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    c = small_config(data__source="latents", data__latents=(str(folder),), data__batch_size=8)
    with pytest.raises(UserError, match=r"latents.*'nvlabs'.*data\.prompt_style=nvlabs"):
        open_data(c, make_mesh(-1))
    del manifest["null_padding"]  # as older versions wrote it
    (folder / "manifest.json").write_text(json.dumps(manifest))
    c = c.override({"data.prompt_style": "nvlabs", "data.null_mask": "caption"})
    with pytest.raises(UserError, match=r"latents.*data\.null_mask=own"):
        open_data(c, make_mesh(-1))


def test_the_manifest_counts_and_measures(written):
    cache, found = open_cache(written), read_records(written)
    made = cache.manifest
    latents = [record.latents.reshape(-1, 12).astype(np.float64) for record in found.values()]
    values = np.concatenate(latents)
    np.testing.assert_allclose(made["latents"]["mean"], values.mean(0), rtol=1e-9)
    np.testing.assert_allclose(made["latents"]["std"], values.std(0), rtol=1e-9)
    np.testing.assert_allclose(made["latents"]["overall_std"], values.std(), rtol=1e-9)
    captions = [record.captions for record in found.values()]
    assert made["captions"] == sum(map(len, captions))
    assert made["without_caption"] == sum(texts[0].text == "" for texts in captions) > 0
    for bucket in made["buckets"]:
        items = cache.__getitems__(cache.buckets[tuple(bucket["latents"])])
        assert bucket["records"] == len(items)
    assert {tuple(bucket["pixels"]) for bucket in made["buckets"]} == set(SIZES)
    lines = map(json.loads, (written / "rejected.jsonl").read_text().splitlines())
    assert [line["key"] for line in lines] == ["picture-005", "picture-021"]
    assert made["rejected"] == 2
    with Image.open(written / "preview.png") as sheet:
        assert sheet.size[1] > 200


@pytest.mark.parametrize(("std", "words"), [(0.97, r"0\.485"), (2.0, r"scaling factor .* 0\.207")])
def test_the_manifest_says_whether_sigma_d_fits(std, words):
    sums = {"count": 1000, "sums": [0.0] * 4, "squares": [1000 * std**2] * 4}
    nothing = {"count": 0, "sums": [0.0], "squares": [0.0]}
    told = manifest.describe_latents([nothing, sums], 0.41407, 0.5)
    assert told["fits"] == (std < 1) and told["overall_std"] == pytest.approx(std)
    assert re.search(words, told["in_words"])


@pytest.mark.slow
def test_a_changed_text_encoder_is_not_mixed_with_the_old(pipeline, tmp_path):
    out, other = tmp_path / "latents", shutil.copytree(pipeline, tmp_path / "other")
    encode_small(out, Pictures(8), data__encoders=str(pipeline), data__sizes=TWO)
    before = hashes(out)
    weights = load_file(other / "text_encoder" / "model.safetensors")
    name = sorted(weights)[3]
    save_file(weights | {name: weights[name] * 1.001}, other / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match=r"encoders\.text_encoder\.params"):
        encode_small(out, Pictures(8), data__encoders=str(other), data__sizes=TWO)
    assert hashes(out) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(encode__dtype="bfloat16"), "dtype float32.* bfloat16"),
        (dict(data__sizes=TWO), r"sizes \[\[8, 16\]"),
        (dict(encode__unit=16), "unit 8.* 16"),
        (dict(source=Pictures(40)), r"source\.identity pictures 40 \(5"),
        (dict(limit=16), r"source\.records 40.* 16"),
    ],
)
def test_another_job_is_not_mixed_with_the_old(written, changes, named):
    before = hashes(written)
    with pytest.raises(UserError, match=named) as raised:
        encode_small(written, **changes)
    assert "\n" not in str(raised.value) and hashes(written) == before


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match=f"--out {out}"):
            encode_small(out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_done_is_not_done_again(written, monkeypatch, capsys):
    monkeypatch.setattr(Pictures, "__getitem__", None)
    encode_small(written)
    assert "38 records with 44 captions in 3 buckets" in capsys.readouterr().out


def test_too_many_rejected_records_end_the_job_early(tmp_path):
    source = Pictures(40, tuple(range(5, 13)))
    with pytest.raises(UserError, match=r"8 of 16 .*max_rejected = 0\.15.*picture-005"):
        encode_small(tmp_path / "a", source, data__max_rejected=0.15)
    assert len((tmp_path / "a" / "rejected.jsonl").read_text().splitlines()) == 8
    assert len(list((tmp_path / "a" / "units").iterdir())) == 2
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_cache(tmp_path / "a")
    # The same folder goes on once more are allowed, and a share that is just met is allowed.
    encode_small(tmp_path / "a", source, data__max_rejected=0.2)
    assert len(open_cache(tmp_path / "a")) == 32
    with pytest.raises(UserError, match="pictures"):
        encode_small(tmp_path / "b", Pictures(9, tuple(range(9))), data__max_rejected=1.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(encode__dtype="float16"), "encode.dtype='float16'"),
        (dict(encode__batch_size=12), "encode.batch_size is 12.* 8"),
        (dict(encode__unit=0), "encode.unit=0"),
        (dict(data__sizes=("8x15",)), "8x15"),
        (dict(data__encoders="nowhere"), "data.encoders nowhere"),
        (dict(source=Pictures(0)), "pictures"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        encode_small(tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()


def test_latents_that_are_not_finite_are_not_stored(tmp_path, monkeypatch):
    broken = lambda *a: jnp.full((8, 4, 8, 12), jnp.nan)  # noqa: E731
    monkeypatch.setattr(units, "encode_images", broken)
    with pytest.raises(UserError, match=r"picture-000.*encode\.dtype"):
        encode_small(tmp_path / "a", Pictures(8))


def test_wrong_flags_and_a_folder_of_images_as_output_are_refused(tmp_path, monkeypatch, capfd):
    (tmp_path / "images").mkdir()
    spec = ["--config", f"{ROOT / 'configs' / 'encode.py'}:digits"]
    inside = [f"--config.data.images={tmp_path / 'images'}", f"--out={tmp_path / 'images' / 'a'}"]
    for flags, named in ((inside, "--out"), ([f"--out={tmp_path}", "--limit=0"], "--limit")):
        ended = run_here([*spec, *flags], monkeypatch, capfd, encode.main)
        assert ended.code == 2 and named in ended.error
    assert not any((tmp_path / "images").iterdir())


@pytest.mark.parametrize(
    "flag", ["steps=5", "data.batch_size=8", "model.num_layers=3", "mesh.dcn_data=1"]
)
def test_keys_that_encode_does_not_read_are_refused(tmp_path, monkeypatch, capfd, flag):
    spec = ["--config", f"{ROOT / 'configs' / 'encode.py'}:digits", f"--out={tmp_path / 'a'}"]
    ended = run_here([*spec, f"--config.{flag}"], monkeypatch, capfd, encode.main)
    assert ended.code == 2 and f"--config.{flag.partition('=')[0]} " in ended.error
    assert not (tmp_path / "a").exists()


def test_the_keys_that_encode_lets_pass_are_those_that_it_reads(tmp_path, monkeypatch):
    read: set[str] = set()
    monkeypatch.setattr(cli, "load_config", lambda *how: Recording(load_config(*how), read))
    data = write_digits(tmp_path, "full")
    flags = [*words(tmp_path / "a", data__dir=data), "--limit=1"]
    flags[1] = str(ROOT / flags[1])
    encode.main(flags)
    keys = flatten(default.get_config())
    assert read == {key for key in keys if key.startswith(encode.READ)}


def test_the_command_encodes_the_digits_world(tmp_path, monkeypatch, capfd):
    data = write_digits(tmp_path, "full")
    flags = [*words(tmp_path / "a", data__dir=data, data__max_rejected=0.0), "--limit=9"]
    flags[1] = str(ROOT / flags[1])
    assert run_here(flags, monkeypatch, capfd, encode.main).code == 0
    found = read_records(tmp_path / "a")
    assert sorted(found) == [f"train_{i:08d}" for i in range(9)]
