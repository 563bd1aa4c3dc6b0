"""TFDS data sets by name, without TensorFlow and without the code that made them."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import image_sets

from sprint_jax.core.errors import UserError
from sprint_jax.data.sources.open import open_images
from sprint_jax.data.sources.records import Caption, Rejected
from sprint_jax.data.sources.tfds_source import open_tfds
from sprint_jax.digits.dataset import open_digits


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A data_dir with photos/small/1.2.0, and its samples."""
    samples = image_sets.make_samples(30)
    return image_sets.write_tfds(tmp_path_factory.mktemp("tfds"), samples), samples


def read_photos(name, data_dir, **options):
    options = {"image_feature": "picture", "caption_feature": "captions"} | options
    return open_tfds(name, data_dir=data_dir, **options)


BY_NAME = """
import importlib.machinery, sys

class Refuse:  # libraries may ask whether there is a TensorFlow; none may import it
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise SystemExit(f"{spec.name} was imported")
    def exec_module(self, module):
        raise SystemExit(f"{module} was executed")

sys.meta_path.insert(0, Refuse())
from sprint_jax.data.sources import open_images
paths = ["tfds:photos/small", "tfds:photos:train[:50%]"]
options = dict(data_dir=sys.argv[1], image_feature="picture", caption_feature="captions")
for source in open_images(paths, **options):
    print("=", len(source), sum(int(source[i].image.sum()) for i in range(len(source))))
(digits,) = open_images(["tfds:digits/small:test"], data_dir=sys.argv[2])
print("=", len(digits), digits[7].key, digits[7].captions[0].text)
assert not {"tensorflow", "torch", "image_sets"} & {name.split(".")[0] for name in sys.modules}
"""


def test_sets_work_by_name_alone_and_tensorflow_is_never_imported(photos, tmp_path):
    data_dir, _ = photos
    command = [sys.executable, "-c", BY_NAME, str(data_dir), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    source = read_photos("photos", data_dir)
    total = sum(int(source[i].image.sum()) for i in range(30))
    whole, part, digits = (line[2:] for line in run.stdout.splitlines() if line.startswith("= "))
    assert whole == f"30 {total}" and part.startswith("15 ")
    caption = open_digits(tmp_path, "small", "test")[7]["caption"]
    assert digits == f"2000 test_00000007 {caption}"


def test_digits_by_name_are_those_of_open_digits(tmp_path):
    (source,) = open_images(["tfds:digits/small:test"], data_dir=tmp_path)
    theirs = open_digits(tmp_path, "small", "test")
    assert len(source) == len(theirs)
    for index in (0, 1234):
        np.testing.assert_array_equal(source[index].image, theirs[index]["image"])
        assert source[index].captions == (Caption(theirs[index]["caption"]),)
        assert source.measure(index) == (f"test_{index:08d}", (8, 8))
    with pytest.raises(UserError, match="world 'huge' is unknown"):
        open_images(["tfds:digits/huge"], data_dir=tmp_path)


def test_captions_are_a_text_a_sequence_or_none(photos):
    data_dir, samples = photos
    captions = {sample.key: sample.captions for sample in samples}
    for feature in ("captions", "first", ""):
        source = read_photos("photos", data_dir, caption_feature=feature)
        for index in range(30):
            record = source[index]
            expected = {"captions": captions[record.key], "first": captions[record.key][:1]}
            assert record.captions == expected.get(feature, (Caption(""),))


def test_the_newest_version_counts_and_a_config_must_be_said_where_there_are_two(photos, tmp_path):
    data_dir, _ = photos
    root = tmp_path / "photos"
    for version in ("small/1.2.0", "small/1.10.0", "large/1.2.0"):
        (root / version).parent.mkdir(parents=True, exist_ok=True)
        (root / version).symlink_to(data_dir / "photos" / "small" / "1.2.0")
    identities = {
        name: read_photos(name, tmp_path).identity
        for name in ("photos/small", "photos/small/1.10.0", "photos/small/1.2.0", "photos/large")
    }
    newest = identities.pop("photos/small")
    assert newest == identities.pop("photos/small/1.10.0")
    assert len({newest, *identities.values()}) == 3
    with pytest.raises(
        UserError, match="photos has several configs, name one of them: large, small"
    ):
        read_photos("photos", tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "flowers",
            {},
            r"there is no TFDS data set .*flowers: prepare it with file_format='array_r",
        ),
        ("photos/big", {}, "there is no TFDS data set .*photos/big"),
        (
            "photos:validation",
            {},
            "cannot open tfds:photos:validation .*Unknown split 'validation'",
        ),
        ("photos:train[:x]", {}, r"cannot open tfds:photos:train\[:x\]"),
        ("photos:train[:0]", {}, r"tfds:photos:train\[:0\] has no example|cannot open"),
        (
            "photos",
            {"image_feature": "image"},
            "no feature 'image': set config.data.image_feature to one of captions, first, key",
        ),
        (
            "photos",
            {"caption_feature": "caption"},
            "no feature 'caption': set config.data.caption_feature to one of captions, first",
        ),
        ("photos", {"image_feature": "key"}, "feature 'key' .* is no Image and no Tensor of uint8"),
        ("photos", {"caption_feature": "label"}, "'label' .* is no Text and no sequence of it"),
    ],
)
def test_errors_of_names_and_features(photos, name, options, message):
    with pytest.raises(UserError, match=message):
        read_photos(name, photos[0], **options)


class Plain(tfds.core.GeneratorBasedBuilder):
    """Pixels and whole-number ids, in a format of the config's choice."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        grey = tfds.features.Tensor(shape=(None, 3, 1), dtype=np.uint8)
        features = {"id": np.int64, "image": grey, "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(5):
            image = np.full((number, 3, 1), number, np.uint8)
            yield number, {"id": number * 10, "image": image, "caption": f"caption {number}"}


def test_tensors_are_taken_as_they_are_and_ids_are_keys(tmp_path):
    Plain(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = pickle.loads(pickle.dumps(open_tfds("plain", data_dir=tmp_path)))
    found = {}
    for index in range(5):
        try:
            record = source[index]
            assert record.captions == (Caption(f"caption {int(record.key) // 10}"),)
            found[record.key] = record.image.shape, int(record.image.min())
        except Rejected as rejected:
            found[rejected.key] = rejected.reason
    expected = {str(number * 10): ((number, 3, 3), number) for number in range(1, 5)}
    assert found == expected | {"0": "unsupported pixels: none in [0, 3, 1]"}


def test_a_format_without_random_access_is_refused(tmp_path):
    Plain(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    info = tmp_path / "plain" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError, match="has no random access: prepare it with file_format='array_record"
    ):
        open_tfds("plain", data_dir=tmp_path)


def test_a_damaged_example_is_named(photos, tmp_path):
    data_dir, samples = photos
    folder = tmp_path / "photos" / "small" / "1.2.0"
    folder.mkdir(parents=True)
    for file in (data_dir / "photos" / "small" / "1.2.0").iterdir():
        content = bytearray(file.read_bytes())
        if (at := content.find(samples[7].image)) >= 0:
            content[at + 20] ^= 1
        (folder / file.name).write_bytes(content)
    source, named = read_photos("photos", tmp_path), []
    for index in range(30):
        try:
            assert os.fspath(source[index].key)
        except Rejected as rejected:
            named.append((index, rejected.key, rejected.reason.partition(":")[0]))
    assert [(f"train_{index:08d}", "broken record") for index, _, _ in named] == [
        (key, reason) for _, key, reason in named
    ]
    assert len(named) == 1
