"""Pictures to clients: PNG that holds how it was drawn, and what is quick to send to a page."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SMALL = 256 * 256  # pixels up to which PNG is as quick as JPEG


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
