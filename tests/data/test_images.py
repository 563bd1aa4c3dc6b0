"""Files of pictures to pixels: every mode, every way to be broken."""

import concurrent.futures
import errno
import io

import numpy as np
import pytest
from helpers.image_sets import bomb, encode
from PIL import Image

from sprint_jax.data.sources.images import decode_image, measure_image
from sprint_jax.data.sources.records import Rejected

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (11, 17, 3), np.uint8)
ALPHA = RANDOM.integers(0, 256, (11, 17), np.uint8)
RGBA = np.concatenate([RGB, ALPHA[..., None]], -1)
GREY = RGB[..., 0]
GREY16 = RANDOM.integers(0, 65536, (11, 17)).astype(np.uint16)


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return color * share + 255 * (1 - share)


def triple(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def palette_file() -> tuple[bytes, np.ndarray]:
    """A PNG with a palette of 16 colours of rising opacity, and what it looks like."""
    image = Image.fromarray(RGB).quantize(16)
    opacity = np.arange(0, 256, 17)[np.asarray(image)]
    looks = over_white(np.asarray(image.convert("RGB")), opacity)
    return encode(image, "PNG", transparency=bytes(range(0, 256, 17))), looks


def animation() -> bytes:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    return encode(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "looks", "tolerance"),
    [
        (encode(Image.fromarray(RGB), "PNG"), RGB, 0),
        (encode(Image.fromarray(RGB), "BMP"), RGB, 0),
        (encode(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"), RGB, 0),
        (encode(Image.fromarray(GREY), "PNG"), triple(GREY), 0),
        (encode(Image.fromarray(GREY > 99), "PNG"), triple((GREY > 99) * 255), 0),
        (encode(Image.fromarray(RGBA), "PNG"), over_white(RGB, ALPHA), 1),
        (
            encode(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True),
            over_white(RGB, ALPHA),
            1,
        ),
        (
            encode(Image.fromarray(RGBA[..., [0, 3]], "LA"), "PNG"),
            over_white(triple(GREY), ALPHA),
            1,
        ),
        (*palette_file(), 1),
        (encode(Image.fromarray(GREY16), "PNG"), triple(GREY16 / 257), 0.51),
        (encode(Image.fromarray(GREY16), "TIFF"), triple(GREY16 / 257), 0.51),
        (encode(Image.new("CMYK", (17, 11), (255, 0, 0, 0)), "JPEG"), [0, 255, 255], 3),
        (encode(Image.new("CMYK", (17, 11), (0, 0, 0, 255)), "JPEG"), [0, 0, 0], 3),
        (animation(), RGB, 0),
    ],
)
def test_every_mode_becomes_rgb_over_white(data, looks, tolerance):
    pixels = decode_image(data, "it")
    assert pixels.shape == (11, 17, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels - np.asarray(looks, np.float64)).max() <= tolerance
    assert measure_image(data, "it") == (11, 17)


def test_a_grey_declared_transparent_is_white():
    data = encode(Image.fromarray(GREY16), "PNG", transparency=int(GREY16[3, 4]))
    assert (decode_image(data, "it")[3, 4] == 255).all()
    data = encode(Image.fromarray(RGB), "PNG", transparency=tuple(map(int, RGB[3, 4])))
    assert (decode_image(data, "it")[3, 4] == 255).all()
    assert (decode_image(data, "it")[0, 0] == RGB[0, 0]).all()


# What a file with each orientation holds for its picture to be RGB.
STORED = {
    1: RGB,
    2: RGB[:, ::-1],
    3: RGB[::-1, ::-1],
    4: RGB[::-1],
    5: RGB.swapaxes(0, 1),
    6: RGB.swapaxes(0, 1)[::-1],
    7: RGB[::-1, ::-1].swapaxes(0, 1),
    8: RGB.swapaxes(0, 1)[:, ::-1],
    9: RGB,  # means nothing
}


@pytest.mark.parametrize("orientation", list(STORED))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_are_turned_upright(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    data = encode(image, format, exif=exif, **options.get(format, {}))
    assert measure_image(data, "it") == (11, 17)
    pixels = decode_image(data, "it")
    assert pixels.shape == RGB.shape
    assert np.abs(pixels.astype(int) - RGB).max() <= (20 if format == "JPEG" else 0)


def test_exif_after_the_pixels_counts_and_damaged_exif_does_not():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(RGB)
    data = encode(image, "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    late = data[:start] + data[stop:end] + data[start:stop] + data[end:]
    assert measure_image(late, "it") == (17, 11)
    np.testing.assert_array_equal(decode_image(late, "it"), RGB.swapaxes(0, 1)[:, ::-1])
    broken = encode(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert measure_image(broken, "it") == decode_image(broken, "it").shape[:2] == (11, 17)


def test_measuring_reads_little_of_a_file():
    class Counted(io.BytesIO):
        total = 0

        def read(self, size=-1):
            data = super().read(size)
            self.total += len(data)
            return data

    large = Image.fromarray(RANDOM.integers(0, 256, (700, 500, 3), np.uint8))
    for format in ("PNG", "JPEG", "TIFF", "BMP"):
        file = Counted(encode(large, format))
        assert measure_image(file, "it") == (700, 500)
        assert file.total < 20_000 < len(file.getvalue()) / 5, format


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image"),
        (b"\0" * 5000, "not an image"),
        (encode(Image.fromarray(RGB), "PNG")[:300], "cannot be decoded"),
        (encode(Image.fromarray(RGB), "JPEG")[:-100], "cannot be decoded"),
        (encode(Image.fromarray(RGB), "BMP")[:300], "cannot be decoded"),
        (encode(Image.fromarray(RGB), "TIFF")[:300], "cannot be decoded"),
        (bomb(), "too many pixels"),
        (bomb(50_000, 50_000), "too many pixels"),
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unsupported pixels"),
        (encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "unsupported pixels"),
    ],
)
def test_what_cannot_be_used_is_named_with_the_reason(data, reason):
    with pytest.raises(Rejected) as caught:
        decode_image(data, "some/key")
    assert caught.value.key == "some/key" and caught.value.reason.startswith(f"{reason}: ")


def test_a_picture_that_pillow_warns_of_is_read():
    assert measure_image(bomb(10_000, 9_999), "it") == (10_000, 9_999)


def test_an_error_of_the_disk_is_not_the_record_s_fault():
    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        measure_image(Failing(encode(Image.fromarray(RGB), "PNG")), "it")


def test_out_of_memory_is_not_the_record_s_fault(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        decode_image(encode(Image.fromarray(RGB), "BMP"), "it")


def test_no_damage_escapes_as_another_exception_or_a_warning():
    random = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        encode(Image.fromarray(RGB), "PNG", exif=exif),
        encode(Image.fromarray(RGB), "JPEG", exif=exif),
        encode(Image.fromarray(RGB).quantize(8), "GIF"),
        encode(Image.fromarray(RGB), "WEBP"),
        palette_file()[0],
        encode(Image.fromarray(GREY16), "PNG", transparency=5),
    ]
    damaged = []
    for data in files * 40:
        data = bytearray(data[: random.integers(1, 2 * len(data))])
        for _ in range(random.integers(1, 5)):
            data[random.integers(min(len(data), 200))] = random.integers(256)
        damaged.append(bytes(data))

    def read(data: bytes) -> int:
        rejected = 0
        for way in (measure_image, decode_image):
            try:
                way(data, "it")
            except Rejected:
                rejected += 1
        return rejected

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert 0 < sum(pool.map(read, damaged)) < 2 * len(damaged)


def test_pixels_without_a_file_become_rgb():
    np.testing.assert_array_equal(decode_image(RGB, "it"), RGB)
    for grey in (GREY, GREY[..., None]):
        np.testing.assert_array_equal(decode_image(grey, "it"), triple(GREY))
    assert np.abs(decode_image(RGBA, "it") - over_white(RGB, ALPHA)).max() <= 1
    assert measure_image(RGBA, "it") == (11, 17)
    for bad in (RGB.astype(np.float32), RGB[None], RGB[..., :2], RGB[:0]):
        with pytest.raises(Rejected, match="unsupported pixels"):
            decode_image(bad, "it")
