"""The same set of images in every form of source; paths, several sources, rejects."""

import concurrent.futures
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import image_sets

from sprint_jax.core.errors import UserError
from sprint_jax.data.rejects import RejectLog
from sprint_jax.data.sources.image_records import write_image_records
from sprint_jax.data.sources.open import open_images
from sprint_jax.data.sources.records import Caption, Concatenation, Rejected

COUNT = 400
WRITERS = {
    "folder": image_sets.write_folder,
    "tar": image_sets.write_tars,
    "array_record": image_sets.write_array_records,
    "tfds": image_sets.write_tfds,
}


def open_form(form, folder):
    path = "tfds:photos" if form == "tfds" else folder / form
    features = dict(image_feature="picture", caption_feature="captions")
    return open_images([path], data_dir=folder / "tfds", **features)[0]


def read_all(source):
    """Good records as key -> (digest of the pixels, shape, captions), and the rejects as key -> reason."""
    records, rejects = {}, {}

    def read(index):
        try:
            record = source[index]
        except Rejected as rejected:
            rejects[rejected.key] = rejected.reason
            return rejected.key
        assert record.image.dtype == np.uint8 and record.image.shape[2:] == (3,)
        digest = hashlib.sha256(record.image).hexdigest()
        records[record.key] = digest, record.image.shape[:2], record.captions
        return record.key

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        keys = list(pool.map(read, range(len(source))))
    assert len(set(keys)) == len(keys)
    return {key: records[key] for key in keys if key in records}, rejects


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "damaged"])
def image_set(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    samples = image_sets.make_samples(COUNT, damaged=request.param)
    for form, write in WRITERS.items():
        write(folder / form, samples)
    return samples, folder


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_records_and_names_what_is_damaged(image_set, form):
    samples, folder = image_set
    source = open_form(form, folder)
    records, rejects = read_all(source)
    # Where neither JSON nor members can be broken, such a sample is whole.
    possible = {"cannot be decoded", "empty file", "not an image", "too many pixels", "bad JSON"}
    if form in ("array_record", "tfds"):
        possible.remove("bad JSON")
    if form == "tar":
        possible.add("broken tar member")
    bad = {sample.key: sample.reason for sample in samples if sample.reason in possible}
    found = {key: reason.partition(":")[0] for key, reason in rejects.items()}
    lost = set()
    if form == "tar":  # damage between members is named by its place, and refuses those beside it
        broken = list(bad.values()).count("broken tar member")
        places = [key for key in found if re.fullmatch(r"set-00\d\.tar@\d+", key)]
        assert len(places) == broken and {found.pop(key) for key in places} <= {"broken tar"}
        lost = {key for key in found if key not in bad}
        assert {found.pop(key) for key in lost} <= {"broken tar member"} and len(lost) <= broken
    assert found == bad
    good = {s.key: s.captions for s in samples if s.key not in bad.keys() | lost}
    assert {key: captions for key, (_, _, captions) in records.items()} == good
    reference, _ = read_all(open_form("folder", folder))
    common = reference.keys() & records.keys()
    assert {key: records[key] for key in common} == {key: reference[key] for key in common}
    for index in range(len(source)):
        try:
            key, size = source.measure(index)
        except Rejected as rejected:
            assert rejected.key in rejects
            continue
        assert key in rejects or records[key][1] == size


@pytest.mark.parametrize("form", WRITERS)
def test_identity_is_of_files_and_sizes(tmp_path, form):
    samples = image_sets.make_samples(20)
    changed = [*samples[:-1], samples[-1]._replace(image=samples[0].image + b"0")]
    for name, content in (("a", samples), ("b", samples), ("c", changed)):
        WRITERS[form](tmp_path / name / form, content)
    same, again, other = (open_form(form, tmp_path / name).identity for name in "abc")
    assert same == again != other and re.fullmatch("[0-9a-f]{64}", same)


def test_several_sources_are_one_whose_keys_differ(tmp_path):
    samples = image_sets.make_samples(5)
    image_sets.write_folder(tmp_path / "a", samples)
    image_sets.write_array_records(tmp_path / "b", samples, files=1)
    (tmp_path / "a" / "龥.png").write_bytes(b"")
    sources = open_images([tmp_path / "a", tmp_path / "b"])
    both, alone = Concatenation(sources), Concatenation(sources[:1])
    records, rejects = read_all(both)
    assert list(records) == [f"{number}/{sample.key}" for number in (0, 1) for sample in samples]
    assert list(rejects) == ["0/龥"] and len(both) == 11
    assert alone[0].key == samples[0].key and alone.identity != both.identity


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Folders with nine images in three forms, and with what is no source."""
    folder, samples = tmp_path_factory.mktemp("forms"), image_sets.make_samples(9)
    image_sets.write_folder(folder / "images", samples)
    image_sets.write_tfds(folder / "tfds", samples)
    for name in ("tars", "both", "mixed"):
        image_sets.write_tars(folder / name, samples)
    for name in ("records", "both"):
        image_sets.write_array_records(folder / name, samples)
    for path in ("mixed/lone.jpg", "text/README.txt", "a.tar.gz", "a.array_record"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"junk")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("tars", 9),
        ("tars/*.tar", 9),
        ("tars/set-00[01].tar", 6),
        ("**/ta*/set-002.tar", 3),
        ("tars/set-001.tar", 3),
        ("records", 9),
        ("records/*", 9),
        ("records/set.array_record-00001-of-00002", 4),
        ("images", 9),
        ("images/deep", 2),
    ],
)
def test_a_path_opens_what_it_is(forms, path, count):
    (source,) = open_images([forms / path])
    assert (len(source), source.name) == (count, str(forms / path))


@pytest.mark.parametrize(
    ("path", "named"),
    [
        *((path, path) for path in ("nowhere", "empty", "text", "both", "images/00000.png")),
        ("tars/*.zip", r"\*\.zip"),
        ("mixed", r"set-000\.tar .*lone\.jpg"),
        ("a.tar.gz", r"a\.tar\.gz"),
        ("a.array_record", r"a\.array_record"),
        ("tfds/photos/small/1.2.0", "tfds:NAME"),
        (None, r"config\.data\.images"),
    ],
)
def test_paths_that_are_no_source_are_named(forms, path, named):
    with pytest.raises(UserError, match=named):
        open_images([] if path is None else [str(forms / path)])


def test_image_records_are_whole_or_not_there(tmp_path):
    path = tmp_path / "a.array_record"
    image = image_sets.make_samples(1)[0].image
    written = [("k", image, "a cat"), ("l", image, [Caption("x", 2.0, 3.0)])]
    assert write_image_records(path, written) == 2
    before = path.read_bytes()

    def interrupted():
        yield "m", image, ""
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_image_records(path, interrupted())
    for bad in (
        [("k", image, ""), ("k", image, "")],
        [("", image, "")],
        [("\ud83d", image, "")],
        [("k", image, "\ud83d")],
        [("k", image, [Caption("", np.nan)])],
    ):
        with pytest.raises(UserError, match=r"key 'k'|key ''|image 'k'|image '.ud83d'"):
            write_image_records(path, bad)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    (source,) = open_images([path])
    assert [source[i].captions for i in range(2)] == [(Caption("a cat"),), (Caption("x", 2, 3),)]
    for name in ("a.bin", "nowhere/a.array_record"):
        with pytest.raises(UserError, match=name):
            write_image_records(tmp_path / name, [("k", image, "")])


@pytest.mark.parametrize("form", ["array_record", "tfds"])
def test_a_damaged_record_is_named_by_its_place(tmp_path, form):
    samples = image_sets.make_samples(40)
    WRITERS[form](tmp_path / form, samples)
    for path in filter(Path.is_file, tmp_path.rglob("*record*")):
        content = bytearray(path.read_bytes())
        if (at := content.find(samples[7].image)) >= 0:
            content[at + 20] ^= 1
            path.write_bytes(content)
    records, rejects = read_all(open_form(form, tmp_path))
    ((where, reason),) = rejects.items()
    assert len(records) == 39 and reason.startswith("broken record: ")
    assert re.fullmatch(r"set\.array_record-00001-of-00002@3|train_000000\d\d", where)


def test_a_training_names_each_reject_once_and_ends_at_too_many(tmp_path):
    def note(log, count):
        log.count(40)
        for number in range(count):
            for _ in range(3):
                log.add(Rejected(f"picture-{number}", "truncated: it ends early"), "pictures")

    path = tmp_path / "rejected.jsonl"
    with pytest.raises(UserError, match=r"5 of 40 .*config\.data\.max_rejected"):
        note(RejectLog(tmp_path, 0.1), 5)
    path.write_bytes(path.read_bytes()[:-9])  # as a killed process may leave it
    note(RejectLog(tmp_path, 0.5), 5)
    found = Counter(json.loads(line)["key"] for line in path.read_text().splitlines())
    assert found == {f"picture-{number}": 1 for number in range(5)}
