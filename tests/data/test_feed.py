"""Tests of feed: cached and online training are the same, in buckets, on any number of hosts."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from helpers.encoding import Pictures, encode_small
from helpers.runs import quick_compilation, records, tiny
from PIL import Image

from sprint_jax import SprintPipeline, train
from sprint_jax.core.errors import UserError
from sprint_jax.data import feed
from sprint_jax.data.cached import latent_batches
from sprint_jax.data.latents.cache import open_cache
from sprint_jax.data.loader import prefetch
from sprint_jax.data.online import RejectLog
from sprint_jax.data.order import make_order
from sprint_jax.data.rejects import read_rejects
from sprint_jax.data.sources.image_records import write_image_records
from sprint_jax.data.sources.records import Rejected
from sprint_jax.training import setup

TEACHER, STUDENT = "configs/digits.py:teacher,small", "configs/digits.py:student,small"
SIZES = ("8x16", "16x8", "8x8", "8x20")
TWO = ("8x16", "16x8")
OFTEN = {"model__sample_size": 8, "log__every": 1, "log__checkpoint_every": 4}
KEYS = {"data.sizes": SIZES, "data.max_rejected": 0.5, "data.encoders": "", "encode.threads": 2}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """An ArrayRecord file of the pictures of `Pictures(120)`, and the folder of their latents."""
    folder = tmp_path_factory.mktemp("feed")
    source = Pictures(120)
    write_pictures(folder / "pictures.array_record", source)
    encode_small(
        folder / "latents", source, data__sizes=SIZES, encode__unit=32, encode__dtype="float32"
    )
    return folder


def write_pictures(path, source):
    def files():
        for key, image, captions in (source[i] for i in range(len(source))):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            yield key, file.getvalue(), captions

    write_image_records(path, files())


def of_images(c, folder):
    paths = {"data.images": (str(folder / "pictures.array_record"),), "data.dir": str(folder)}
    return c.override(KEYS | {"data.source": "images", "encode.dtype": "float32"} | paths)


def of_latents(c, folder):
    return c.override({"data.source": "latents", "data.latents": (str(folder / "latents"),)})


def open_both(c, folder):
    """Data of latents and of images, of a config."""
    mesh = setup.mesh_from(c)
    return [feed.open_data(each(c, folder), mesh) for each in (of_latents, of_images)]


def test_cached_and_online_batches_are_the_same(packed, tmp_path):
    cached, online = open_both(tiny(TEACHER, tmp_path), packed)
    assert cached.shapes == online.shapes and len(cached.shapes) == 4
    assert [shape["latents"].shape[1:] for shape in cached.shapes[:1]] == [(8, 4, 12)]
    for i in range(12):
        first, second = cached.batches(i), online.batches(i)
        for name in first:
            assert first[name].dtype == second[name].dtype
            np.testing.assert_array_equal(first[name], second[name])
    np.testing.assert_array_equal(cached.null_text, online.null_text)
    np.testing.assert_array_equal(cached.null_mask, online.null_mask)
    for first, second in zip(cached.prompts(5), online.prompts(5), strict=True):
        np.testing.assert_array_equal(first, second)


def test_batches_have_the_shapes_that_were_compiled_for(packed, tmp_path):
    for data in open_both(tiny(TEACHER, tmp_path), packed):
        for i in range(8):
            batch = data.batches(i)
            shape = next(s for s in data.shapes if s["latents"].shape == batch["latents"].shape)
            assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
                name: (each.shape, each.dtype) for name, each in shape.items()
            }
        assert data.batches(data.next_of_first(3))["latents"].shape[1:] == (8, 4, 12)


def test_a_run_on_latents_draws_samples_with_encoders_and_says_how_without(teacher, tmp_path):
    folder, trained = teacher
    with pytest.raises(UserError, match=r"with --config.data.encoders=PIPELINE"):
        SprintPipeline.from_pretrained(trained)
    shutil.copytree(trained, tmp_path / "run")
    changes = {"data.encoders": "digits", "steps": 9, "model.sample_size": 8, "log.sample_every": 9}
    c = of_latents(tiny(TEACHER, folder, **OFTEN), folder).override(changes)
    run(c, tmp_path / "run")
    picture = np.asarray(Image.open(tmp_path / "run" / "samples" / "00000009_ema.png"))
    assert picture.shape[2] == 3 and picture.std() > 0
    pipe = SprintPipeline.from_pretrained(tmp_path / "run")
    assert pipe(["a red 3"], steps=2)[0].size == (16, 16)


def test_held_out_records_are_the_same_and_are_not_trained_on(packed, tmp_path):
    c = tiny(TEACHER, tmp_path).override({"data.holdout": 24})
    cached, online = open_both(c, packed)
    batch = cached.held_out(6)
    np.testing.assert_array_equal(batch["latents"], online.held_out(6)["latents"])
    kept = {latents.tobytes() for latents in batch["latents"]}
    assert len(kept) == 6
    drawn = {row.tobytes() for i in range(30) for row in cached.batches(i)["latents"]}
    assert len(drawn) == 120 - 24 and not kept & drawn
    with pytest.raises(UserError, match="larger --config"):
        cached.held_out(100)


def test_cached_and_online_training_have_the_same_losses(teacher, tmp_path):
    folder, teacher_folder = teacher
    c = tiny(STUDENT, tmp_path, steps=5, log__every=1, log__diagnostics_every=2)
    c = c.override({"teacher": str(teacher_folder)})
    found = []
    for name, each in (("cached", of_latents(c, folder)), ("online", of_two(c, folder))):
        run(each, tmp_path / name)
        found.append(records(tmp_path / name))
    assert list(found[0]) == list(found[1]) == list(range(1, 6))
    compared = 0
    for step in found[0]:
        for key in (key for key in found[0][step] if key.startswith("loss/")):
            assert found[0][step][key] == pytest.approx(found[1][step][key], rel=1e-5)
            compared += 1
    assert compared == 5 * 4


def run(c, workdir, steps=None):
    with contextlib.ExitStack() as stack:
        stack.enter_context(quick_compilation())
        train.train(c.override({"steps": steps}) if steps else c, workdir)


def of_two(c, folder):
    return of_images(c, folder).override({"data.sizes": TWO})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder of pictures and their latents in two sizes, as programs take long; and a teacher of them."""
    folder = tmp_path_factory.mktemp("two")
    write_pictures(folder / "pictures.array_record", Pictures(60))
    encode_small(
        folder / "latents", Pictures(60), data__sizes=TWO, encode__unit=32, encode__dtype="float32"
    )
    run(of_latents(tiny(TEACHER, folder, steps=8, **OFTEN), folder), folder / "teacher")
    return folder, folder / "teacher"


def test_a_run_over_buckets_resumes_exactly(teacher, tmp_path):
    folder, whole_folder = teacher
    c = of_latents(tiny(TEACHER, folder, steps=8, **OFTEN), folder)
    run(c, tmp_path / "parts", steps=4)
    run(c, tmp_path / "parts")
    whole, parts = records(whole_folder), records(tmp_path / "parts")
    timeless = [
        {step: {k: v for k, v in record.items() if k.startswith(("loss", "grad", "health"))}
         for step, record in each.items()}
        for each in (whole, parts)
    ]  # fmt: skip
    assert timeless[0] == timeless[1] and len(whole) == 8


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_hold_parts_of_one_batch_and_prefetch_resumes_anywhere(packed, hosts):
    cache = open_cache(packed / "latents")
    order = make_order([cache.buckets], batch_size=8, seed=1)
    parts = np.array_split(np.arange(8), hosts)
    whole = latent_batches([cache], order, rows=range(8), batch_size=8, seed=1)
    mine = [latent_batches([cache], order, rows=part, batch_size=8, seed=1) for part in parts]
    for start in np.random.default_rng(0).integers(0, 45, 20):
        for part, batches in zip(parts, mine, strict=True):
            with contextlib.closing(prefetch(batches, int(start))) as stream:
                i, batch = next(stream)
            assert i == start
            for name, array in whole(i).items():
                np.testing.assert_array_equal(batch[name], array[part])


def test_three_epochs_have_every_record_thrice(packed):
    cache = open_cache(packed / "latents")
    batch_size = 4
    order = make_order([cache.buckets], batch_size=batch_size, seed=0)
    counts = np.zeros(len(cache), int)
    batches = sum(-(-3 * len(records) // batch_size) for records in cache.buckets.values())
    for i in range(batches):
        rows = order.rows(i)
        np.add.at(counts, rows.records, 1)
    assert counts.min() == 3
    assert counts.sum() - 3 * len(cache) < 4 * batch_size


def test_a_broken_image_is_replaced_named_and_counted(packed, tmp_path, capfd):
    path = tmp_path / "some.array_record"
    write_pictures(path, Pictures(40))
    sharding_mesh = setup.mesh_from(tiny(TEACHER, tmp_path))
    c = of_images(tiny(TEACHER, tmp_path), packed).override({"data.images": (str(path),)})

    class Failing:
        """The same source, of which two images turn out to be broken once they are decoded."""

        def __init__(self, inner):
            self.inner, self.name, self.identity = inner, inner.name, inner.identity + "broken"

        def __len__(self):
            return len(self.inner)

        def measure(self, index):
            return self.inner.measure(index)

        def __getitem__(self, index):
            if index in (3, 8):
                raise Rejected(f"picture-{index:03d}", "truncated: it ends early")
            return self.inner[index]

    with pytest.MonkeyPatch.context() as patch:
        opened = feed.open_images
        patch.setattr(feed, "open_images", lambda *a, **k: tuple(map(Failing, opened(*a, **k))))
        data = feed.open_data(c, sharding_mesh, tmp_path / "run")
        again = feed.open_data(c, sharding_mesh, tmp_path / "again")
        for i in range(12):
            np.testing.assert_array_equal(data.batches(i)["latents"], again.batches(i)["latents"])
        assert data.prompts(40)[0].shape[0] == 40
    lines = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "truncated: it ends early" in lines[0]
    assert "left out: picture-003" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "latents"}, "config.data.latents is empty"),
        ({"data.source": "images"}, "set config.data.images"),
        ({"data.source": "pictures"}, "is not one of digits, latents, images, synthetic"),
        ({"model.in_channels": 4}, "has 12 channels where config.model.in_channels is 4"),
        ({"model.caption_channels": 9}, "has 64 channels where config.model.caption_channels is 9"),
        ({"data.weights": (1.0, 2.0)}, "give one number above 0 for each of 1 sources"),
        ({"data.holdout": 500}, "config.data.holdout: 500 records cannot be held out of 120"),
    ],
)
def test_what_cannot_be_trained_on_is_said(packed, tmp_path, changes, message):
    c = tiny(TEACHER, tmp_path)
    if "data.source" not in changes:
        c = of_latents(c, packed)
    with pytest.raises(UserError, match=message):
        feed.open_data(c.override(changes), setup.mesh_from(c))


def test_too_many_broken_images_end_a_run_however_often_they_are_drawn(tmp_path):
    log = RejectLog(tmp_path / "rejected.jsonl", 0.1)
    log.count(40)
    for number in range(4):
        for _ in range(3):
            log.add(Rejected(f"picture-{number}", "truncated: it ends early"), "pictures")
    with pytest.raises(UserError, match="5 of 40 records cannot be used"):
        log.add(Rejected("picture-4", "truncated: it ends early"), "pictures")
    path = tmp_path / "rejected.jsonl"
    assert len(path.read_text().splitlines()) == 5
    # A killed process may leave half of a line; the next run names no record twice.
    path.write_bytes(path.read_bytes()[:-9])
    again = RejectLog(path, 0.5)
    again.count(40)
    for number in range(5):
        again.add(Rejected(f"picture-{number}", "truncated: it ends early"), "pictures")
    assert [each.key for each in read_rejects(path)] == [f"picture-{n}" for n in range(5)]


def test_a_run_does_not_go_on_with_other_data(teacher, tmp_path):
    folder, trained = teacher
    shutil.copytree(trained, tmp_path / "run")
    other = encode_small(
        tmp_path / "latents", Pictures(50), data__sizes=TWO, encode__dtype="float32"
    )
    c = of_latents(tiny(TEACHER, folder, steps=12, **OFTEN), folder)
    with pytest.raises(UserError, match=r"data is .* in the checkpoint but .* in this run"):
        run(c.override({"data.latents": (str(other),)}), tmp_path / "run")


def test_pictures_are_decoded_by_the_autoencoder_that_made_the_latents(packed, tmp_path):
    c = of_latents(tiny(TEACHER, tmp_path), packed).override({"data.encoders": "digits"})
    feed.open_data(c, setup.mesh_from(c))
    copied = tmp_path / "latents"
    shutil.copytree(packed / "latents", copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["encoders"]["autoencoder"]["scaling_factor"] = 0.5
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has not the autoencoder that made"):
        feed.open_data(c.override({"data.latents": (str(copied),)}), setup.mesh_from(c))


def test_latents_of_different_encoders_are_not_mixed(packed, tmp_path):
    other = encode_small(tmp_path / "other", data__sizes=SIZES, encode__dtype="float32")
    c = of_latents(tiny(TEACHER, tmp_path), packed)
    folders = (str(packed / "latents"), str(other))
    mesh = setup.mesh_from(c)
    both = feed.open_data(c.override({"data.latents": folders}), mesh)
    assert both.batches(0)["latents"].shape[0] == c.data.batch_size
    manifest = (other / "manifest.json").read_text()
    identity = open_cache(other).identity
    (other / "manifest.json").write_text(manifest.replace(identity, "f" * len(identity)))
    with pytest.raises(UserError, match="different encoders"):
        feed.open_data(c.override({"data.latents": folders}), mesh)
