"""A set of small images of every kind, whole or damaged, in every form that a source can have."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from sprint_jax.data.sources.image_records import write_image_records
from sprint_jax.data.sources.records import Caption, Rejected

DAMAGE_EVERY = 33  # 3 % of a damaged set
LONG = "a very long caption of a small picture, " * 500


class Sample(NamedTuple):
    """One image: the content of its file and of those beside it (None: no such file), the captions that
    they say, and the kind of reason for which it is refused (None: it is good)."""

    key: str
    extension: str
    image: bytes
    text: bytes | None
    json: bytes | None
    captions: tuple[Caption, ...]
    reason: str | None = None


def make_samples(count: int, damaged: bool = False) -> list[Sample]:
    """The same samples each time, in the order of their keys; 3 % of a damaged set are of no use."""
    random = np.random.default_rng(0)
    samples = []
    for index in range(count):
        folder = ("", "deep/er/", "Grün/", "猫/")[index % 4]
        files = (*draw_image(random, index), *draw_captions(index))
        sample = Sample(f"{folder}{index:05d}", *files)
        if damaged and index % DAMAGE_EVERY == DAMAGE_EVERY - 1:
            sample = sample._replace(**damage(index // DAMAGE_EVERY))
        samples.append(sample)
    return sorted(samples)


def draw_image(random: np.random.Generator, index: int) -> tuple[str, bytes]:
    """Extension and content of a file; kinds take turns."""
    height, width = random.integers(9, 40, 2)
    pixels = random.integers(0, 256, (height, width, 4), np.uint8)
    rgb, rgba = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 1 + index // 6 % 8
    extension, image, options = [
        ("png", rgb, {"exif": exif}),
        ("jpg", rgb.convert("CMYK"), {}),
        ("jpeg", rgb.convert("L"), {"exif": exif}),
        ("webp", rgba, {"lossless": True}),
        ("gif", rgb.quantize(8), {"save_all": True, "append_images": [rgb.rotate(180)]}),
        ("tiff", rgb.convert("LA"), {}),
    ][index % 6]
    return extension, encode(image, extension.replace("jpg", "jpeg"), **options)


def encode(image: Image.Image, format: str, **options) -> bytes:
    """The content of a file of an image."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def draw_captions(index: int) -> tuple[bytes | None, bytes | None, tuple[Caption, ...]]:
    """Content of .txt and of .json, and their captions; kinds take turns."""
    texts = [f"ein Bild {index}", "two\nlines", "猫"]
    letters = f"ein Käfer, 一只猫, 🐈 {index}"
    return [
        (None, None, (Caption(""),)),
        (b" \n", None, (Caption(""),)),
        (f"\ufeff{letters}\n".encode(), None, (Caption(letters),)),
        (LONG.encode(), None, (Caption(LONG.strip()),)),
        (None, json.dumps({"captions": texts, "width": 7}).encode(), tuple(map(Caption, texts))),
        (b"not this", json.dumps({"prompt": f"a {index}"}).encode(), (Caption(f"a {index}"),)),
        (f"a picture of {index}".encode(), None, (Caption(f"a picture of {index}"),)),
    ][index % 7]


def damage(turn: int) -> dict[str, Any]:
    """Fields of a sample that must be refused, and the reason; kinds take turns. JSON and members of tars
    are not broken in every form: see the writers."""
    noise = np.random.default_rng(turn).integers(0, 256, (30, 30), np.uint8)
    png = encode(Image.fromarray(noise), "PNG")
    return [
        {"extension": "png", "image": png[:400], "reason": "cannot be decoded"},
        {"image": b"", "reason": "empty file"},
        {"extension": "jpg", "image": b"<html>404</html>", "reason": "not an image"},
        {"extension": "png", "image": bomb(), "reason": "too many pixels"},
        {"text": None, "json": b'{"caption": "a', "reason": "bad JSON"},
        {"reason": "broken tar member"},
    ][turn % 6]


def bomb(height: int = 12_000, width: int = 12_000) -> bytes:
    """The start of a PNG that says to be large: below Pillow's own limit, above ours."""
    file = bytearray(encode(Image.new("RGB", (9, 9)), "PNG"))
    file[16:24] = struct.pack(">II", width, height)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    return bytes(file)


def read_captions(source) -> dict[str, Any]:
    """key -> texts of the captions, or the kind of reason of a reject."""
    found = {}
    for index in range(len(source)):
        try:
            record = source[index]
            assert source.measure(index) == (record.key, record.image.shape[:2])
            found[record.key] = [caption.text for caption in record.captions]
        except Rejected as rejected:
            found[rejected.key] = rejected.reason.partition(":")[0]
    return found


def write_folder(folder: Path, samples: list[Sample]) -> Path:
    """A folder of images with .txt and .json beside them."""
    for sample in samples:
        files = {sample.extension: sample.image, "txt": sample.text, "json": sample.json}
        for extension, content in files.items():
            path = folder / f"{sample.key}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content)
    return folder


def write_tars(folder: Path, samples: list[Sample], shards: int = 3) -> Path:
    """Tar shards; the header of an image is damaged where the member shall be broken."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"set-{shard:03d}.tar"
        spoil = []
        # GNU's format has names in UTF-8 in the header itself, not in one before it.
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for sample in samples[shard::shards]:
                members = {sample.extension: sample.image, "txt": sample.text, "json": sample.json}
                for extension, content in members.items():
                    if content is not None:
                        info = tarfile.TarInfo(f"{sample.key}.{extension}")
                        info.size = len(content)
                        if sample.reason == "broken tar member" and extension == sample.extension:
                            spoil.append(tar.offset)
                        tar.addfile(info, io.BytesIO(content))
        with path.open("r+b") as file:
            for offset in spoil:
                file.seek(offset + 148)  # the checksum
                file.write(b"damaged!")
    return folder


def write_array_records(folder: Path, samples: list[Sample], files: int = 2) -> Path:
    """ArrayRecord files, whose captions are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        path = folder / f"set.array_record-{number:05d}-of-{files:05d}"
        write_image_records(path, ((s.key, s.image, s.captions) for s in samples[number::files]))
    return folder


class Photos(tfds.core.GeneratorBasedBuilder):
    """Samples as a TFDS data set, whose captions are whole."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="small")]
    samples: ClassVar[list[Sample]] = []
    url_infos = None  # as of the digits world

    def _info(self) -> tfds.core.DatasetInfo:
        text, image = tfds.features.Text(), tfds.features.Image()
        features = {"key": text, "picture": image, "captions": tfds.features.Sequence(text)}
        features |= {"first": text, "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, sample in enumerate(self.samples):
            texts = [caption.text for caption in sample.captions]
            # Bytes of a file: TFDS would encode pixels with TensorFlow.
            example = {"key": sample.key, "picture": sample.image, "captions": texts}
            yield number, example | {"first": texts[0], "label": number % 3}


def write_tfds(folder: Path, samples: list[Sample]) -> Path:
    """A data_dir with the data set ``photos``; its features are key, picture, captions, first, label."""
    builder = Photos(data_dir=folder, file_format="array_record")
    builder.samples = samples
    builder.download_and_prepare()
    return folder
