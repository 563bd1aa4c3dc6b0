"""Image files as pixels: any mode, upright, RGB; or a reason where that cannot be.

Colour profiles are not applied: the reference does not apply them either.
"""

import io
import warnings
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from .records import Rejected

EXTENSIONS = frozenset(
    ("avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "png", "tif", "tiff", "webp")
)
# Of the content, whatever the file's name says.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
MAX_PIXELS = 1 << 27  # 400 MB decoded; Pillow's own limit is 179 million pixels
# How an image of each EXIF orientation is turned upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PILLOW = r"PIL\."


def decode_image(data: bytes | np.ndarray, key: str) -> np.ndarray:
    """Decodes an image: uint8 [H, W, 3], RGB, upright, transparency over white.

    Of an animation, the first frame counts. 16-bit grey is divided by 257 and rounded; 16-bit colour keeps its
    high bytes. It may be called from any thread.

    Args:
      data: the content of a file in one of FORMATS; or pixels, uint8 [H, W] or [H, W, 1, 3 or 4].
      key: names the image in errors.

    Raises `Rejected` for a broken file, no image, too many pixels, or pixels without a known range.
    """
    if isinstance(data, np.ndarray):
        return _flatten(data, key)
    image, orientation = _open(io.BytesIO(data), key)
    try:
        image.load()
        pixels = np.asarray(_to_rgb(image, key))
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files
        raise _undecodable(key, error) from error
    if orientation in UPRIGHT:
        pixels = np.asarray(Image.fromarray(pixels).transpose(UPRIGHT[orientation]))
    return pixels


def measure_image(data: bytes | BinaryIO | np.ndarray, key: str) -> tuple[int, int]:
    """Measures (height, width) of `decode_image`'s pixels from headers; ``data`` may be an open file.

    Raises `Rejected`, except for damage that only decoding can find; OSError where the disk fails.
    """
    if isinstance(data, np.ndarray):
        return _flatten(data, key).shape[:2]
    image, orientation = _open(io.BytesIO(data) if isinstance(data, bytes) else data, key)
    width, height = image.size
    return (width, height) if orientation >= 5 else (height, width)


def _flatten(pixels: np.ndarray, key: str) -> np.ndarray:
    """Grey, RGB or RGBA pixels as uint8 [H, W, 3]."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = pixels.shape[-1] if pixels.ndim == 3 else 0
    if pixels.dtype != np.uint8 or channels not in (1, 3, 4) or pixels.size == 0:
        raise Rejected(key, f"unsupported pixels: {pixels.dtype}{list(pixels.shape)}")
    if channels == 3:
        return pixels
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    return np.asarray(_to_rgb(image, key))


def _open(file: BinaryIO, key: str) -> tuple[Image.Image, int]:
    """An image whose headers are read, and its EXIF orientation 1..8."""
    # Pillow warns of single files; what matters is raised anyway. (`catch_warnings` is for one thread.)
    if not any(getattr(entry[3], "pattern", None) == _PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW)
    try:
        image = Image.open(file, formats=FORMATS)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(key, "too many pixels: more than Pillow's own limit") from error
    except UnidentifiedImageError as error:
        # Pillow raises the same for an unknown format and for a header that a plugin gave up.
        file.seek(0)
        if not file.read(1):
            raise Rejected(key, "empty file: 0 bytes") from error
        raise Rejected(key, f"not an image: none of {', '.join(FORMATS)}") from error
    except Exception as error:
        raise _undecodable(key, error) from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.height}x{image.width}"
        raise Rejected(key, f"too many pixels: {size}, above the limit of {MAX_PIXELS}")
    return image, _find_orientation(image, file)


def _undecodable(key: str, error: Exception) -> Exception:
    """What to raise for an error of Pillow: `Rejected`, but an error of the disk as it is."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return Rejected(key, f"cannot be decoded: {error or type(error).__name__}")


def _find_orientation(image: Image.Image, file: BinaryIO) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, size and pixels
    try:
        if isinstance(image, PngImageFile) and "exif" not in image.info:
            # Pillow would decode the whole image to see whether the chunk stands after it.
            position = file.tell()
            image.info["exif"] = _read_png_chunk(file, b"eXIf")
            file.seek(position)
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:
        return 1  # damaged EXIF is no damage to the image: viewers show it as it is stored
    return value if value in UPRIGHT else 1


def _read_png_chunk(file: BinaryIO, name: bytes) -> bytes:
    """The content of the first chunk of that name in a PNG file; b'' without one."""
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length = int.from_bytes(header[:4], "big")
        if header[4:] == name:
            return file.read(length)
        file.seek(length + 4, io.SEEK_CUR)  # 4 bytes of checksum
    return b""


def _to_rgb(image: Image.Image, key: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_grey(image, key)
    if image.mode == "F":
        raise Rejected(key, "unsupported pixels: floating point, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_grey(image: Image.Image, key: str) -> Image.Image:
    """An image of 16-bit grey in 8 bits; the grey that it declares transparent becomes white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise Rejected(key, "unsupported pixels: 32-bit integers, whose range is not known")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
