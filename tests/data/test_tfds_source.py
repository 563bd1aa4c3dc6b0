"""TFDS data sets by name, without TensorFlow and without the code that made them."""

import shutil
import subprocess
import sys

import pytest
from helpers import image_sets

from sprint_jax.core.errors import UserError
from sprint_jax.data.sources.records import Caption
from sprint_jax.data.sources.tfds_source import open_tfds


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
from sprint_jax.data.sources.open import open_images
paths = ["tfds:photos/small", "tfds:photos:train[:50%]"]
options = dict(data_dir=sys.argv[1], image_feature="picture", caption_feature="captions")
for source in open_images(paths, **options):
    print("=", len(source), sum(int(source[i].image.sum()) for i in range(len(source))))
assert not {"tensorflow", "torch", "image_sets"} & set(sys.modules)
"""


def test_sets_work_by_name_alone_and_tensorflow_is_never_imported(photos):
    command = [sys.executable, "-c", BY_NAME, str(photos[0])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    source = read_photos("photos", photos[0])
    total = sum(int(source[i].image.sum()) for i in range(30))
    whole, part = (line[2:] for line in run.stdout.splitlines() if line.startswith("= "))
    assert whole == f"30 {total}" and part.startswith("15 ")


@pytest.mark.parametrize("feature", ["captions", "first", ""])
def test_captions_are_a_text_a_sequence_or_none(photos, feature):
    data_dir, samples = photos
    captions = {sample.key: sample.captions for sample in samples}
    source = read_photos("photos", data_dir, caption_feature=feature)
    for record in map(source.__getitem__, range(30)):
        expected = {"captions": captions[record.key], "first": captions[record.key][:1]}
        assert record.captions == expected.get(feature, (Caption(""),))


def test_the_newest_version_counts_and_a_config_must_be_named_where_there_are_two(photos, tmp_path):
    for version in ("small/1.2.0", "small/1.10.0", "large/1.2.0"):
        (tmp_path / "photos" / version).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / version).symlink_to(photos[0] / "photos" / "small" / "1.2.0")
    names = ("photos/small", "photos/small/1.10.0", "photos/small/1.2.0", "photos/large")
    identities = [read_photos(name, tmp_path).identity for name in names]
    assert identities[0] == identities[1] and len(set(identities)) == 3
    with pytest.raises(UserError, match=r"photos .*large, small"):
        read_photos("photos", tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("flowers", {}, "flowers.*array_record.*config.data.dir"),
        ("photos/big", {}, "photos/big"),
        ("photos:validation", {}, "photos:validation"),
        ("photos:train[:x]", {}, r"photos:train\[:x\]"),
        ("photos:train[:0]", {}, r"photos:train\[:0\]"),
        ("photos", {"image_feature": "image"}, r"'image'.*config\.data\.image_feature.*captions"),
        ("photos", {"caption_feature": "caption"}, r"'caption'.*config\.data\.caption_feature"),
        ("photos", {"image_feature": "key"}, "'key' of tfds:photos"),
        ("photos", {"caption_feature": "label"}, "'label' of tfds:photos"),
    ],
)
def test_names_and_features_that_cannot_be_used_are_named(photos, name, options, named):
    with pytest.raises(UserError, match=named):
        read_photos(name, photos[0], **options)


def test_a_set_without_random_access_is_refused(photos, tmp_path):
    shutil.copytree(photos[0], tmp_path / "copy")
    (info,) = (tmp_path / "copy").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"small.*array_record"):
        read_photos("photos", tmp_path / "copy")
