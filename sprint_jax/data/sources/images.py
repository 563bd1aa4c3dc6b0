"""Files of pictures to pixels: any mode, upright, and a reason where that cannot be.

Colour profiles are not applied: the reference does not either.
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
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "TIFF",
    "BMP",
    "AVIF",
)  # of content, whatever the file name
MAX_PIXELS = 1 << 27  # 400 MB decoded. Pillow has a limit of its own, 179 million pixels.
# What turns a picture of each EXIF orientation upright.
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


def decode_image(data: bytes, key: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of a file's content: uint8 [H, W, 3], RGB, upright, transparency over white.

    Of an animation, the first frame. 16-bit grey is divided by 257 and rounded; 16-bit colour keeps its
    high bytes. May be called from any thread.

    Args:
      data: the content of a file in one of FORMATS.
      key: names the picture in errors.
      max_pixels: what has more is refused before it is decoded.

    Raises:
      Rejected: an empty or broken file, not an image, too many pixels, or pixels without a known range.
    """
    file = io.BytesIO(data)
    image, orientation = _open(file, key, max_pixels)
    try:
        image.load()
        pixels = np.asarray(_to_rgb(image, key))
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files
        raise Rejected(key, f"cannot be decoded: {_reason(error)}") from error
    if orientation in UPRIGHT:
        pixels = np.asarray(Image.fromarray(pixels).transpose(UPRIGHT[orientation]))
    return pixels


def measure_image(
    data: bytes | BinaryIO, key: str, *, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """(height, width) that `decode_image` gives, from headers alone: of a file little is read.

    Args:
      data: the content of a file, or a binary file that can seek.

    Raises:
      Rejected: as `decode_image`, but for what only decoding can find.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    image, orientation = _open(file, key, max_pixels)
    width, height = image.size
    return (width, height) if orientation >= 5 else (height, width)


def flatten_pixels(pixels: np.ndarray, key: str) -> np.ndarray:
    """Pixels that came without a file, as `decode_image` would give them.

    Args:
      pixels: uint8 [H, W] or [H, W, C] with C of 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
      Rejected: any other shape or dtype, or no pixels.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
        raise Rejected(key, f"unsupported pixels: {pixels.dtype}{list(pixels.shape)}")
    if pixels.size == 0:
        raise Rejected(key, f"unsupported pixels: none in {list(pixels.shape)}")
    if pixels.shape[-1] == 3:
        return pixels
    grey = pixels.shape[-1] == 1
    return np.asarray(_to_rgb(Image.fromarray(pixels[..., 0] if grey else pixels), key))


def _open(file: BinaryIO, key: str, max_pixels: int) -> tuple[Image.Image, int]:
    """A picture whose headers are read, and its EXIF orientation 1..8."""
    _quieten()
    try:
        image = Image.open(file, formats=FORMATS)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(key, "too many pixels: more than Pillow's own limit") from error
    except UnidentifiedImageError as error:
        # Pillow says the same of what no plugin knows and of a header that one of them gave up.
        file.seek(0)
        if not file.read(1):
            raise Rejected(key, "empty file: 0 bytes") from error
        raise Rejected(key, f"not an image: none of {', '.join(FORMATS)}") from error
    except Exception as error:
        raise Rejected(key, f"cannot be decoded: {_reason(error)}") from error
    if image.width * image.height > max_pixels:
        raise Rejected(
            key,
            f"too many pixels: {image.height}x{image.width}, a decompression bomb or a picture above "
            f"the limit of {max_pixels}",
        )
    return image, _orientation(image, file)


def _quieten() -> None:
    """Keeps Pillow's warnings about single files to itself: what matters is raised anyway.

    ``catch_warnings`` would be undone by another thread.
    """
    if not any(getattr(entry[3], "pattern", None) == _PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW)


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, size and pixels
    try:
        if isinstance(image, PngImageFile) and "exif" not in image.info:
            # Pillow would decode the whole picture to see whether the chunk stands after it.
            position = file.tell()
            image.info["exif"] = _png_chunk(file, b"eXIf")
            file.seek(position)
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:
        return 1  # damaged EXIF is no damage to the picture: viewers show it as it is stored
    return value if value in UPRIGHT else 1


def _png_chunk(file: BinaryIO, name: bytes) -> bytes:
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
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_grey(image: Image.Image, key: str) -> Image.Image:
    """A picture of 16-bit grey in 8 bits; what it has declared transparent becomes white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise Rejected(key, "unsupported pixels: 32-bit integers, whose range is not known")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
