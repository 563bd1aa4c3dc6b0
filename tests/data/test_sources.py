"""The same set of images in every form of source; paths, mixtures of sources, rejects."""

import concurrent.futures
import hashlib
import json
import pickle
import re
from collections import Counter

import grain
import numpy as np
import pytest
from helpers import image_sets

from sprint_jax.core.errors import UserError
from sprint_jax.data.rejects import check_rejects, read_rejects, reject, write_rejects
from sprint_jax.data.sources.image_records import write_image_records
from sprint_jax.data.sources.open import Concatenation, open_images
from sprint_jax.data.sources.records import Caption, Rejected

COUNT = 2000
WRITERS = {
    "folder": image_sets.write_folder,
    "metadata": image_sets.write_metadata_folder,
    "tar": image_sets.write_tars,
    "array_record": image_sets.write_array_records,
    "tfds": image_sets.write_tfds,
}


def open_form(form, folder):
    path = "tfds:photos" if form == "tfds" else folder / form
    sources = open_images(
        [path], data_dir=folder / "tfds", image_feature="picture", caption_feature="captions"
    )
    return sources[0]


def read_all(source):
    """Good records as key -> (digest of the pixels, shape, captions), and the rejects."""
    records, rejects = {}, []
    for index in range(len(source)):
        try:
            record = source[index]
        except Rejected as rejected:
            rejects.append(reject(rejected, source.name))
            continue
        assert record.key not in records
        assert record.image.dtype == np.uint8 and record.image.shape[2:] == (3,)
        digest = hashlib.sha256(record.image).hexdigest()
        records[record.key] = digest, record.image.shape[:2], record.captions
    return records, rejects


def write_all(folder, samples):
    for form, write in WRITERS.items():
        write(folder / form, samples)
    return samples, folder


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("whole"), image_sets.make_samples(COUNT))


@pytest.fixture(scope="module")
def damaged_set(tmp_path_factory):
    return write_all(
        tmp_path_factory.mktemp("damaged"), image_sets.make_samples(COUNT, damaged=True)
    )


def test_the_same_keys_captions_and_pixels_come_out_of_every_form(whole_set):
    samples, folder = whole_set
    expected = {sample.key: sample.captions for sample in samples}
    forms = {}
    for form in WRITERS:
        source = open_form(form, folder)
        forms[form], rejects = read_all(source)
        assert not rejects and len(source) == COUNT
        assert {key: captions for key, (_, _, captions) in forms[form].items()} == expected
        assert forms[form] == forms["folder"], form
        sizes = dict(source.measure(index) for index in range(COUNT))
        assert sizes == {key: size for key, (_, size, _) in forms["folder"].items()}
    kinds = Counter(sample.extension for sample in samples)
    assert len(kinds) == 7 and min(kinds.values()) > 70
    assert len({digest for digest, _, _ in forms["folder"].values()}) > 0.99 * COUNT


def test_what_is_damaged_is_named_and_the_rest_goes_through(damaged_set, tmp_path):
    samples, folder = damaged_set
    # Where neither JSON nor members can be broken, such a sample is whole.
    possible = {"cannot be decoded", "empty file", "not an image", "too many pixels"}
    ways = {form: possible for form in WRITERS}
    ways["folder"] = ways["metadata"] = possible | {"bad JSON"}
    ways["tar"] = possible | {"bad JSON", "broken tar member"}
    for form in WRITERS:
        source = open_form(form, folder)
        records, rejects = read_all(source)
        bad = {sample.key: sample.reason for sample in samples if sample.reason in ways[form]}
        found = {reject.key: reject.reason.partition(":")[0] for reject in rejects}
        if form == "metadata":  # a line that cannot be read does not say whose it is
            lines = {key for key in found if key.startswith("metadata.jsonl:")}
            assert len(lines) == 10 and {found.pop(key) for key in lines} == {"bad JSON"}
            bad = {key: "no caption" if why == "bad JSON" else why for key, why in bad.items()}
        assert found == bad, form
        assert Counter(bad.values()).keys() >= possible and set(Counter(bad.values()).values()) == {
            10
        }
        assert records.keys() == {sample.key for sample in samples} - bad.keys()
        assert {reject.source for reject in rejects} == {source.name}

        path = tmp_path / f"{form}.jsonl"
        write_rejects(path, rejects)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert {line["key"]: line["reason"] for line in lines}.items() >= {
            reject.key: reject.reason for reject in rejects
        }.items()
        assert read_rejects(path) == rejects
        check_rejects(rejects, len(source), 0.05, path, total=len(source))
        message = (
            rf"{len(rejects)} of {len(source)} records cannot be used, .*max_rejected = 0.01: 10 "
        )
        with pytest.raises(
            UserError, match=message + rf".*; .*; .*All are in {path}: mend the data"
        ):
            check_rejects(rejects, len(source), 0.01, path)


def test_sources_are_read_from_threads_and_survive_pickling(whole_set):
    _, folder = whole_set
    for form in WRITERS:
        source = open_form(form, folder)
        order = np.random.default_rng(0).permutation(COUNT)[:200].tolist()
        one_by_one = [source[index].key for index in order]
        source = pickle.loads(pickle.dumps(source))
        assert grain.MapDataset.source(source)[order[0]].key == one_by_one[0]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert [record.key for record in pool.map(source.__getitem__, order)] == one_by_one
        with pytest.raises(IndexError):
            source[COUNT]
    rejected = pickle.loads(pickle.dumps(Rejected("k", "empty file")))
    assert (rejected.key, rejected.reason, str(rejected)) == ("k", "empty file", "k: empty file")


def test_identity_is_of_files_sizes_and_options(tmp_path):
    samples = image_sets.make_samples(20)
    changed = [*samples[:-1], samples[-1]._replace(image=samples[0].image + b"0")]
    for form, write in WRITERS.items():
        for name, content in (("a", samples), ("b", samples), ("c", changed)):
            write(tmp_path / name / form, content)
        same, again, other = (open_form(form, tmp_path / name).identity for name in "abc")
        assert same == again != other, form
        assert re.fullmatch("[0-9a-f]{64}", same)
    limited = open_images([tmp_path / "a/folder"], max_pixels=100)[0].identity
    assert limited != open_form("folder", tmp_path / "a").identity


def test_several_sources_are_one_whose_keys_differ(tmp_path):
    samples = image_sets.make_samples(12)
    image_sets.write_folder(tmp_path / "a", samples)
    image_sets.write_array_records(tmp_path / "b", samples[:5])
    (tmp_path / "a" / "龥.png").write_bytes(b"")
    sources = open_images([tmp_path / "a", tmp_path / "b"])
    both = Concatenation(sources)
    assert len(both) == 13 + 5
    records, rejects = read_all(both)
    keys = [sample.key for sample in samples]
    in_files = keys[:5:2] + keys[1:5:2]
    assert list(records) == [f"0/{key}" for key in keys] + [f"1/{key}" for key in in_files]
    assert [reject.key for reject in rejects] == ["0/龥"]
    assert both.measure(13)[0] == f"1/{keys[0]}" and both.locate(13) == (1, 0)
    with pytest.raises(Rejected, match="0/龥: empty file"):
        both.measure(12)
    alone = Concatenation(sources[:1])
    assert alone[0].key == keys[0] and alone.identity != both.identity
    for index in (-1, 18):
        with pytest.raises(IndexError):
            both.locate(index)


def test_a_path_opens_what_it_is(tmp_path):
    samples = image_sets.make_samples(9)
    image_sets.write_tars(tmp_path / "tars", samples)
    image_sets.write_array_records(tmp_path / "records", samples)
    image_sets.write_folder(tmp_path / "images", samples)
    tars, records = tmp_path / "tars", tmp_path / "records"
    for path, count in [
        (tars, 9),
        (tars / "*.tar", 9),
        (tars / "set-00[01].tar", 6),
        (tmp_path / "**" / "set-002.tar", 3),
        (tars / "set-001.tar", 3),
        (records, 9),
        (records / "*", 9),
        (records / "set.array_record-00001-of-00002", 4),
        (tmp_path / "images", 9),
        (tmp_path / "images" / "deep", 2),
    ]:
        (source,) = open_images([path])
        assert (len(source), source.name) == (count, str(path))


def test_errors_of_paths(tmp_path):
    samples = image_sets.make_samples(4)
    image_sets.write_tars(tmp_path / "tars", samples, shards=1)
    image_sets.write_folder(tmp_path / "images", samples)
    image_sets.write_tfds(tmp_path / "tfds", samples)
    image_sets.write_tars(tmp_path / "both", samples, shards=1)
    image_sets.write_array_records(tmp_path / "both", samples)
    image_sets.write_tars(tmp_path / "mixed", samples, shards=1)
    (tmp_path / "mixed" / "lone.jpg").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "README.txt").write_text("")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "a.array_record").write_bytes(b"junk")
    for path, message in [
        ("nowhere", "nowhere': there is no file or folder"),
        ("tars/*.zip", r"zip': no file matches"),
        ("empty", "empty has no image: expected files such as .jpg"),
        ("text", "text has no image"),
        ("both", "must be a folder of images, or .* of one kind"),
        ("mixed", "mixed has both set-000.tar and lone.jpg: keep them apart"),
        ("a.tar.gz", "must be a folder of images, or .*it has .*a.tar.gz"),
        ("a.array_record", "a.array_record is not a whole ArrayRecord file"),
        ("images/00000.png", "must be a folder of images"),
        ("tfds/photos/small/1.2.0", "is a prepared TFDS data set: name it tfds:NAME"),
    ]:
        with pytest.raises(UserError, match=message):
            open_images([str(tmp_path / path)])
    with pytest.raises(UserError, match=r"no image source: set config\.data\.images"):
        open_images([])


def test_image_records_are_whole_or_not_there(tmp_path):
    path = tmp_path / "a.array_record"
    image = image_sets.make_samples(1)[0].image
    assert (
        write_image_records(path, [("k", image, "a cat"), ("l", image, [Caption("x", 2.0, 3.0)])])
        == 2
    )
    before = path.read_bytes()

    def interrupted():
        yield "m", image, ""
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_image_records(path, interrupted())
    with pytest.raises(UserError, match="key 'k' is empty or comes twice"):
        write_image_records(path, [("k", image, ""), ("k", image, "")])
    for bad in (("\ud83d", image, ""), ("k", image, "\ud83d"), ("k", image, [Caption("", np.nan)])):
        with pytest.raises(UserError, match=r"image .* cannot be written: "):
            write_image_records(path, [bad])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    (source,) = open_images([path])
    assert [source[i].captions for i in range(2)] == [
        (Caption("a cat"),),
        (Caption("x", 2.0, 3.0),),
    ]
    with pytest.raises(UserError, match="must end with"):
        write_image_records(tmp_path / "a.bin", [])
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        write_image_records(tmp_path / "nowhere" / "a.array_record", [("k", image, "")])


def test_a_damaged_record_is_named_by_file_and_number(tmp_path):
    samples = image_sets.make_samples(40)
    path = (
        image_sets.write_array_records(tmp_path, samples, files=1)
        / "set.array_record-00000-of-00001"
    )
    content = bytearray(path.read_bytes())
    content[content.index(samples[7].image) + 20] ^= 1
    path.write_bytes(content)
    records, rejects = read_all(open_images([path])[0])
    assert len(records) == 39
    assert [(r.key, r.reason.partition(":")[0]) for r in rejects] == [
        (f"{path.name}@7", "broken record")
    ]


def test_few_rejects_at_the_start_stop_nothing(tmp_path):
    rejects = [reject(Rejected(f"k{i}", "empty file: 0 bytes"), "s") for i in range(50)]
    check_rejects(rejects[:5], 10, 0.05, "rejected.jsonl")
    with pytest.raises(UserError, match="50 of 99 records"):
        check_rejects(rejects, 99, 0.05, "rejected.jsonl", total=99)
    with pytest.raises(
        UserError, match=r"50 of 100 .*: 50 empty file\. For example: k0 \(empty file"
    ):
        check_rejects(rejects, 100, 0.05, "rejected.jsonl")
    check_rejects(rejects, 100, 0.5, "rejected.jsonl")
    check_rejects([], 0, 0.0, "rejected.jsonl")
    (tmp_path / "rejected.jsonl").write_text('{"key": "a", "source": "b", "reason": "c"}\n{"key"\n')
    with pytest.raises(UserError, match=r"rejected.jsonl:2 is damaged: delete the file"):
        read_rejects(tmp_path / "rejected.jsonl")
    assert read_rejects(tmp_path / "none") == []
