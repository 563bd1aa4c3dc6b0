"""Pictures from clients, whom nobody trusts, and to them: PNG with notes, and what is quick for a page."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..core.pixels import to_rows
from .requests import Refused

FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST = 2**23  # pixels of a client's picture
SCANS = 64  # of a JPEG; each, of a few bytes, may take as long as the whole picture. Encoders make some ten
DECODERS = 2  # pictures that are read at once, of 100 MB or more each

SMALL = 256 * 256  # pixels up to which PNG is as quick as JPEG


def read_picture(data: bytes, height: int, width: int) -> np.ndarray:
    """A client's picture as uint8 [height, width, 3]; what is transparent in it is black.

    Raises:
      Refused: it is of another format, too large, too slow to read, or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # The size stands in the head of a file: nothing is decoded yet.
            if image.width * image.height > LARGEST:
                raise Refused("image", f"a picture of more than {LARGEST} pixels", 413)
            if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > SCANS:
                raise Refused("image", f"a JPEG of more than {SCANS} scans: save it anew", 413)
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer)
            return to_rows(image, height, width)[0]
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused("image", f"a picture of more than {LARGEST} pixels", 413) from error
    except Exception as error:  # what decoders raise for damaged bytes has no common name
        known = ", ".join(FORMATS)
        raise Refused("image", f"no picture that can be read; known are {known}") from error


def to_png(pixels: np.ndarray, notes: Mapping[str, Any] = {}) -> bytes:
    """A PNG of uint8 [H, W, 3], with notes such as prompt and seed as text chunks."""
    info = PngInfo()
    for key, value in notes.items():
        info.add_itxt(key, str(value))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", pnginfo=info, compress_level=1)
    return out.getvalue()


def to_page(pixels: np.ndarray) -> tuple[str, bytes]:
    """Media type and bytes of uint8 [H, W, 3] for a page: exact if small, else of high quality."""
    if pixels.shape[0] * pixels.shape[1] <= SMALL:
        return "image/png", to_png(pixels)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95, subsampling=0)
    return "image/jpeg", out.getvalue()
