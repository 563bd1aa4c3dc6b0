"""The training data of a config: cached and online batches are the same, in buckets, on any number of hosts."""

import contextlib
import io
import json
import shutil

import chex
import jax
import numpy as np
import pytest
from helpers.encoding import Pictures, encode_small
from helpers.runs import quick_compilation, records, tiny, write_digits
from PIL import Image

from sprint_jax import SprintPipeline, train
from sprint_jax.core.errors import UserError
from sprint_jax.data import feed
from sprint_jax.data.loader import prefetch
from sprint_jax.data.order import VERSION
from sprint_jax.data.sources.image_records import RecordSource, write_image_records
from sprint_jax.data.sources.records import Rejected
from sprint_jax.digits.dataset import open_digits
from sprint_jax.training import setup

TEACHER = "configs/digits.py:teacher,small"
SIZES = ("8x16", "16x8", "8x8", "8x20")
TWO = ("8x16", "16x8")
OFTEN = {"model__sample_size": 8, "log__every": 1, "log__checkpoint_every": 4}
KEYS = {"data.sizes": SIZES, "data.max_rejected": 0.5, "encode.threads": 2}
FLOATS = {"encode__unit": 32, "encode__dtype": "float32"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """An ArrayRecord file of the pictures of `Pictures(120)`, and the folder of their latents."""
    folder = tmp_path_factory.mktemp("feed")
    write_pictures(folder / "pictures.array_record", Pictures(120))
    encode_small(folder / "latents", Pictures(120), data__sizes=SIZES, **FLOATS)
    return folder


def write_pictures(path, source):
    def files():
        for key, image, captions, *_ in map(source.__getitem__, range(len(source))):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            yield key, file.getvalue(), captions

    write_image_records(path, files())


def of_images(c, folder):
    paths = {"data.images": (str(folder / "pictures.array_record"),), "data.dir": str(folder)}
    return c.override(KEYS | {"data.source": "images", "encode.dtype": "float32"} | paths)


def of_latents(c, *folders):
    paths = tuple(str(folder) for folder in folders)
    return c.override({"data.source": "latents", "data.latents": paths})


def opened(c, workdir=None):
    return feed.open_data(c, setup.mesh_from(c), workdir)


def open_both(c, folder):
    """Data of latents and of images, of a config."""
    return opened(of_latents(c, folder / "latents")), opened(of_images(c, folder))


def test_cached_and_online_batches_are_the_same_and_have_the_shapes_compiled_for(packed, tmp_path):
    cached, online = open_both(tiny(TEACHER, tmp_path), packed)
    assert cached.shapes == online.shapes and len(cached.shapes) == 4
    assert cached.shapes[0]["latents"].shape[1:] == (8, 4, 12)
    for i in range(12):
        batch = cached.batches(i)
        chex.assert_trees_all_equal(batch, online.batches(i), strict=True)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
        assert shapes in cached.shapes
    chex.assert_trees_all_equal(
        (cached.null_text, cached.null_mask, cached.prompts(5)),
        (online.null_text, online.null_mask, online.prompts(5)),
    )
    assert cached.batches(cached.next_of_first(3))["latents"].shape[1:] == (8, 4, 12)


def test_held_out_records_are_the_same_and_are_not_trained_on(packed, tmp_path):
    c = tiny(TEACHER, tmp_path).override({"data.holdout": 24})
    cached, online = open_both(c, packed)
    batch = cached.held_out(6)
    chex.assert_trees_all_equal(batch, online.held_out(6))
    kept = {latents.tobytes() for latents in batch["latents"]}
    drawn = {row.tobytes() for i in range(30) for row in cached.batches(i)["latents"]}
    assert len(kept) == 6 and len(drawn) == 120 - 24 and not kept & drawn
    with pytest.raises(UserError, match=r"config\.data\.holdout"):
        cached.held_out(100)


def test_sizes_that_fill_no_batch_are_joined_in_images_and_named_in_latents(
    packed, tmp_path, capfd
):
    c = tiny(TEACHER, tmp_path, data__batch_size=32)
    cached, online = open_both(c, packed)
    repeated, joined = capfd.readouterr().err.splitlines()
    assert "3 of 4 sizes" in repeated and "8x8 (24)" in repeated
    assert "2 of 4 sizes" in joined and "8x20 (24) to 8x16" in joined
    kept = repeated.partition("--config.data.sizes=")[2].partition(" ")[0].rstrip(",").split(",")
    assert sorted(kept) == ["16x8", "8x16"]
    assert len(cached.shapes) == 4 and len(online.shapes) == 2
    encode_small(tmp_path / "two", Pictures(120), data__sizes=tuple(kept), **FLOATS)
    again = opened(of_latents(c, tmp_path / "two"))
    for i in range(4):
        chex.assert_trees_all_equal(again.batches(i), online.batches(i), strict=True)
    assert not capfd.readouterr().err.count("sizes have fewer")


def test_a_run_of_another_version_of_the_order_has_another_identity(packed, tmp_path, monkeypatch):
    c = of_latents(tiny(TEACHER, tmp_path), packed / "latents")
    mine = opened(c).identity
    monkeypatch.setattr(feed, "VERSION", VERSION + 1)
    assert opened(c).identity != mine and mine.startswith(f"order {VERSION}, ")


def test_a_survey_is_kept_and_made_anew_where_it_was_cut_short(packed, tmp_path, monkeypatch):
    c = of_images(tiny(TEACHER, tmp_path), packed)
    c = c.override({"data.dir": str(tmp_path)})
    first = opened(c).identity
    (kept,) = tmp_path.glob("survey-*")
    assert kept.stat().st_size == 120
    measured = []
    measure = RecordSource.measure
    monkeypatch.setattr(
        RecordSource, "measure", lambda self, k: measured.append(k) or measure(self, k)
    )
    assert opened(c).identity == first and not measured
    kept.write_bytes(kept.read_bytes()[:-1])
    assert opened(c).identity == first and sorted(measured) == list(range(120))


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_data_without_files_of_the_user(tmp_path, source):
    changes = {"data__source": source, "data__latent_size": (4, 4), "data__text_length": 12}
    data = opened(tiny(TEACHER, write_digits(tmp_path), **changes))
    held_out = data.held_out(3)
    for batch in (data.batches(0), data.batches(10**6), held_out):
        assert batch["latents"].shape[1:] == (4, 4, 12) and batch["text"].shape[1:] == (12, 64)
        assert data.null_text.shape == (12, 64) and data.null_mask.tolist() == [1] + [0] * 11
    assert data.next_of_first(7) == 7
    chex.assert_trees_all_equal(data.held_out(3), held_out)
    drawn = {row.tobytes() for i in range(13) for row in data.batches(i)["latents"]}
    assert not drawn & {row.tobytes() for row in held_out["latents"]}
    if source == "digits":
        assert data.decode(held_out["latents"]).shape == (3, 8, 8, 3)
        assert data.prompts(5)[0].shape == (5, 12, 64)
        with pytest.raises(UserError, match=r"21 .*20"):
            data.held_out(21)


def test_digits_as_a_data_set_are_those_of_the_world(tmp_path):
    names = {"data__images": ("tfds:digits/small:test",), "data__dir": str(tmp_path)}
    (source,) = feed.open_sources(tiny(TEACHER, tmp_path, **names))
    theirs = open_digits(tmp_path, "small", "test")
    assert len(source) == len(theirs)
    for index in (0, 1234):
        key, image, captions, *_ = source[index]
        assert (key, captions[0].text) == (f"test_{index:08d}", theirs[index]["caption"])
        np.testing.assert_array_equal(image, theirs[index]["image"])
    with pytest.raises(UserError, match="huge"):
        feed.open_sources(tiny(TEACHER, tmp_path, data__images=("tfds:digits/huge",)))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_hold_parts_of_one_batch_and_prefetch_resumes_anywhere(
    packed, tmp_path, monkeypatch, hosts
):
    c = of_latents(tiny(TEACHER, tmp_path, data__batch_size=8), packed / "latents")
    whole = opened(c).batches
    mine = []
    for part in np.array_split(np.arange(8), hosts):
        monkeypatch.setattr(feed, "local_rows", lambda *_, part=part: part)
        mine.append((part, opened(c).batches))
    for start in np.random.default_rng(0).integers(0, 45, 20).tolist():
        expected = whole(start)
        for part, batches in mine:
            with contextlib.closing(prefetch(batches, start)) as stream:
                i, batch = next(stream)
            assert i == start
            chex.assert_trees_all_equal(batch, {name: a[part] for name, a in expected.items()})


class Failing:
    """A source of which two images turn out to be broken once they are decoded."""

    def __init__(self, inner):
        self.inner, self.name, self.identity = inner, inner.name, inner.identity + "broken"
        self.measure = inner.measure

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        if index in (3, 8):
            raise Rejected(f"picture-{index:03d}", "truncated: it ends early")
        return self.inner[index]


def test_a_broken_image_is_replaced_named_and_counted(packed, tmp_path, monkeypatch, capfd):
    c = of_images(tiny(TEACHER, tmp_path), packed)
    open_images = feed.open_images
    monkeypatch.setattr(feed, "open_images", lambda *a, **k: [*map(Failing, open_images(*a, **k))])
    data, again = (opened(c, tmp_path / name) for name in ("run", "again"))
    for i in range(12):
        chex.assert_trees_all_equal(data.batches(i), again.batches(i))
    assert data.prompts(40)[0].shape[0] == 40
    lines = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == {"picture-003", "picture-008"}
    assert len(lines) == 2 and "picture-003" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"2 of 120 .*config\.data\.max_rejected"):
        data = opened(c.override({"data.max_rejected": 0.01}))
        for i in range(30):
            data.batches(i)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data.source": "latents", "data.latents": ()}, r"config\.data\.latents"),
        ({"data.source": "images"}, r"config\.data\.images"),
        ({"data.source": "pictures"}, r"config\.data\.source 'pictures'.*digits.*latents"),
        ({"model.in_channels": 4}, r"12 .*config\.model\.in_channels is 4"),
        ({"model.caption_channels": 9}, r"64 .*config\.model\.caption_channels is 9"),
        ({"data.weights": (1.0, 2.0)}, r"config\.data\.weights .*1 sources"),
        ({"data.holdout": 500}, r"config\.data\.holdout: 500 .*120"),
    ],
)
def test_what_cannot_be_trained_on_is_named(packed, tmp_path, changes, named):
    c = of_latents(tiny(TEACHER, tmp_path), packed / "latents")
    with pytest.raises(UserError, match=named):
        opened(c.override(changes))


def test_latents_of_different_encoders_are_not_mixed_and_their_own_decoder_is_needed(
    packed, tmp_path
):
    other = encode_small(tmp_path / "other", data__sizes=SIZES, encode__dtype="float32")
    c = of_latents(tiny(TEACHER, tmp_path), packed / "latents", other)
    assert opened(c).batches(0)["latents"].shape[0] == c.data.batch_size
    alone = of_latents(c, other).override({"data.encoders": "digits"})
    assert opened(alone).decode is not None
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["encoders"]["autoencoder"]["scaling_factor"] = 0.5
    (other / "manifest.json").write_text(json.dumps(manifest | {"identity": "f" * 64}))
    with pytest.raises(UserError, match=str(other)):
        opened(c)
    with pytest.raises(UserError, match=rf"config\.data\.encoders=digits .*{other}"):
        opened(alone)


def run(c, workdir, steps=None):
    with quick_compilation():
        train.train(c.override({"steps": steps}) if steps else c, workdir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Latents in two sizes, the config of a run on them, and its workdir after 8 steps."""
    folder = tmp_path_factory.mktemp("two")
    latents = encode_small(folder / "latents", Pictures(60), data__sizes=TWO, **FLOATS)
    c = of_latents(tiny(TEACHER, folder, steps=8, **OFTEN), latents)
    run(c, folder / "whole")
    return c, folder / "whole"


@pytest.mark.slow
def test_a_run_over_buckets_resumes_exactly(trained, tmp_path):
    c, whole = trained
    run(c, tmp_path / "parts", steps=4)
    run(c, tmp_path / "parts")
    chex.assert_trees_all_equal(records(whole), records(tmp_path / "parts"))
    assert len(records(whole)) == 8


@pytest.mark.slow
def test_a_run_on_latents_draws_samples_with_encoders_and_needs_them_to_be_loaded(
    trained, tmp_path
):
    c, whole = trained
    with pytest.raises(UserError, match=r"config\.data\.encoders"):
        SprintPipeline.from_pretrained(whole)
    shutil.copytree(whole, tmp_path / "run")
    run(
        c.override({"data.encoders": "digits", "steps": 9, "log.sample_every": 9}), tmp_path / "run"
    )
    picture = np.asarray(Image.open(tmp_path / "run" / "samples" / "00000009_ema.png"))
    assert picture.shape[2] == 3 and picture.std() > 0
    pipe = SprintPipeline.from_pretrained(tmp_path / "run")
    assert pipe(["a red 3"], steps=2)[0].size == (16, 16)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data(trained, tmp_path):
    c, whole = trained
    shutil.copytree(whole, tmp_path / "run")
    other = encode_small(tmp_path / "latents", Pictures(50), data__sizes=TWO, **FLOATS)
    with pytest.raises(UserError, match=r"data is .* in the checkpoint"):
        run(of_latents(c, other).override({"steps": 12}), tmp_path / "run")
