"""Image files as pixels: every mode, every way to be broken."""

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
ALPHA = RANDOM.integers(0, 256, (11, 17, 1), np.uint8)
RGBA, GREY = np.concatenate([RGB, ALPHA], -1), RGB[..., 0]
GREY16 = RANDOM.integers(0, 65536, (11, 17)).astype(np.uint16)
IMAGE = Image.fromarray(RGB)
PALETTE = IMAGE.quantize(16)
OPACITY = bytes(range(0, 256, 17))  # of the colours of the palette


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def pack(array, format, mode=None, **options):
    return encode(Image.fromarray(array, mode), format, **options)


def over_white(color, alpha):
    share = alpha / 255.0
    return color * share + 255 * (1 - share)


def triple(grey):
    return np.repeat(grey[..., None], 3, -1)


def see_palette():
    opacity = np.frombuffer(OPACITY, np.uint8)[np.asarray(PALETTE)][..., None]
    return over_white(np.asarray(PALETTE.convert("RGB")), opacity)


@pytest.mark.parametrize(
    ("data", "looks", "tolerance"),
    [
        (pack(RGB, "PNG"), RGB, 0),
        (pack(RGB, "BMP"), RGB, 0),
        (pack(RGB, "TIFF", compression="tiff_lzw"), RGB, 0),
        (pack(GREY, "PNG"), triple(GREY), 0),
        (pack(GREY > 99, "PNG"), triple((GREY > 99) * 255), 0),
        (pack(RGBA, "PNG"), over_white(RGB, ALPHA), 1),
        (pack(RGBA, "WEBP", lossless=True, exact=True), over_white(RGB, ALPHA), 1),
        (pack(RGBA[..., [0, 3]], "PNG", "LA"), over_white(triple(GREY), ALPHA), 1),
        (encode(PALETTE, "PNG", transparency=OPACITY), see_palette(), 1),
        (pack(GREY16, "PNG"), triple(GREY16 / 257), 0.51),
        (pack(GREY16, "TIFF"), triple(GREY16 / 257), 0.51),
        (encode(Image.new("CMYK", (17, 11), (255, 0, 0, 0)), "JPEG"), [0, 255, 255], 3),
        (encode(Image.new("CMYK", (17, 11), (0, 0, 0, 255)), "JPEG"), [0, 0, 0], 3),
        (pack(RGB, "WEBP", lossless=True, save_all=True, append_images=[PALETTE]), RGB, 0),
        (RGB, RGB, 0),  # pixels without a file
        (GREY, triple(GREY), 0),
        (GREY[..., None], triple(GREY), 0),
        (RGBA, over_white(RGB, ALPHA), 1),
    ],
)
def test_every_mode_becomes_rgb_over_white(data, looks, tolerance):
    pixels = decode_image(data, "it")
    assert pixels.shape == (11, 17, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels - np.asarray(looks, np.float64)).max() <= tolerance
    assert measure_image(data, "it") == (11, 17)


def test_a_colour_declared_transparent_is_white():
    for array in (GREY16, RGB):
        transparent = array[3, 4].tolist()
        data = pack(array, "PNG", transparency=tuple(transparent) if array is RGB else transparent)
        assert (decode_image(data, "it")[3, 4] == 255).all()
    assert (decode_image(data, "it")[0, 0] == RGB[0, 0]).all()


# What a file with each orientation holds for its picture to be RGB; 9 means nothing.
TURNED = RGB.swapaxes(0, 1)
STORED = [RGB, RGB[:, ::-1], RGB[::-1, ::-1], RGB[::-1]]
STORED += [TURNED, TURNED[::-1], TURNED[::-1, ::-1], TURNED[:, ::-1], RGB]


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_are_turned_upright(orientation, format):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    stored = np.ascontiguousarray(STORED[orientation - 1])
    data = pack(stored, format, exif=exif(orientation), **options.get(format, {}))
    assert measure_image(data, "it") == (11, 17)
    pixels = decode_image(data, "it")
    assert pixels.shape == RGB.shape
    assert np.abs(pixels.astype(int) - RGB).max() <= (20 if format == "JPEG" else 0)


def test_exif_after_the_pixels_counts_and_damaged_exif_does_not():
    data = encode(IMAGE, "PNG", exif=exif(6))
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    late = data[:start] + data[stop:end] + data[start:stop] + data[end:]
    assert measure_image(late, "it") == (17, 11)
    np.testing.assert_array_equal(decode_image(late, "it"), RGB.swapaxes(0, 1)[:, ::-1])
    broken = encode(IMAGE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert measure_image(broken, "it") == decode_image(broken, "it").shape[:2] == (11, 17)


class Counted(io.BytesIO):
    """A file that counts the bytes that are read; a disk that fails after ``limit``."""

    total, limit = 0, np.inf

    def read(self, size=-1):
        data = super().read(size)
        self.total += len(data)
        if self.total > self.limit:
            raise OSError(errno.EIO, "Input/output error")
        return data


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP"])
def test_measuring_reads_little_and_an_error_of_the_disk_is_not_the_record_s_fault(format):
    file = Counted(pack(RANDOM.integers(0, 256, (700, 500, 3), np.uint8), format))
    assert measure_image(file, "it") == (700, 500)
    assert file.total < 20_000 < len(file.getvalue()) / 5
    failing = Counted(file.getvalue())
    failing.limit = 0
    with pytest.raises(OSError, match="Input/output"):
        measure_image(failing, "it")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image"),
        (b"\0" * 5000, "not an image"),
        *((pack(RGB, format)[:300], "cannot be decoded") for format in ("PNG", "BMP", "TIFF")),
        (pack(RGB, "JPEG")[:-100], "cannot be decoded"),
        (bomb(), "too many pixels"),
        (bomb(50_000, 50_000), "too many pixels"),
        (pack(np.ones((4, 4), np.float32), "TIFF"), "unsupported pixels"),
        (pack(np.full((4, 4), 70_000, np.int32), "TIFF"), "unsupported pixels"),
        *((bad, "unsupported pixels") for bad in (RGB / 255.0, RGB[None], RGB[..., :2], RGB[:0])),
    ],
)
def test_what_cannot_be_used_is_named_with_the_reason(data, reason):
    with pytest.raises(Rejected) as caught:
        decode_image(data, "some/key")
    assert caught.value.key == "some/key" and caught.value.reason.startswith(f"{reason}: ")


def test_a_picture_that_pillow_warns_of_is_read():
    assert measure_image(bomb(10_000, 9_999), "it") == (10_000, 9_999)


def test_out_of_memory_is_not_the_record_s_fault(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        decode_image(pack(RGB, "BMP"), "it")


def test_no_damage_escapes_as_another_exception_or_a_warning():
    random = np.random.default_rng(1)
    files = [pack(RGB, format, exif=exif(6)) for format in ("PNG", "JPEG", "WEBP")]
    files += [encode(PALETTE, "GIF"), encode(PALETTE, "PNG", transparency=OPACITY)]
    files += [pack(GREY16, "PNG", transparency=5)]
    damaged = []
    for data in files * 40:
        data = bytearray(data[: random.integers(1, 2 * len(data))])
        for _ in range(random.integers(1, 5)):
            data[random.integers(min(len(data), 200))] = random.integers(256)
        damaged.append(bytes(data))

    def reject(data: bytes) -> int:
        rejected = 0
        for way in (measure_image, decode_image):
            try:
                way(data, "it")
            except Rejected:
                rejected += 1
        return rejected

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert 0 < sum(pool.map(reject, damaged)) < 2 * len(damaged)
