"""A sheet of pictures beside what their stored latents decode to."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...core.files import write_atomic
from ...core.pixels import nearest_size, to_bytes
from ...core.sheet import Cell, draw_sheet
from ...encoders.load import Encoders
from ..buckets import fit_image
from ..sources.records import Source
from .cache import Cache

BUCKETS = 6  # on a sheet, those with the most records: each compiles a decoder of its size
SIDE = 256  # of the largest picture on it
LETTERS = 90  # of a caption


def draw_latents(
    path: Path,
    cache: Cache,
    source: Source,
    encoders: Encoders,
    sizes: Sequence[tuple[int, int]],
    entries: Sequence[dict[str, Any]],
) -> None:
    """Writes a sheet with one row for each bucket: originals as they were cut, and decoded beside them.

    Args:
      path: of the PNG.
      cache: what was written; entries: of all its units, in order, see `units.read_unit`.
      source: of the originals, cut to ``sizes`` (height, width).
    """
    examples: dict[tuple[int, int], list[tuple[int, int]]] = {}
    bucket_of = {number: size for size, numbers in cache.buckets.items() for number in numbers}
    first = 0
    for entry in entries:
        for number, index in entry["examples"]:
            examples.setdefault(bucket_of[first + number], []).append((first + number, index))
        first += sum(shard["records"] for shard in entry["shards"])
    common = sorted(examples, key=lambda size: -len(cache.buckets[size]))[:BUCKETS]
    rows = [_row(cache, source, encoders, sizes, examples[size][:2]) for size in common]
    largest = max(max(cell.picture.shape) for row in rows for cell in row)
    side = min(largest, SIDE)
    framed = [[cell._replace(picture=_frame(cell.picture, side)) for cell in row] for row in rows]
    columns = max(map(len, rows))
    png = io.BytesIO()
    draw_sheet(framed, titles=["original", "decoded"] * (columns // 2)).save(png, "png")
    write_atomic(path, png.getvalue())


def _row(cache, source, encoders, sizes, examples) -> list[Cell]:
    records = cache.__getitems__([number for number, _ in examples])
    latents = np.stack([record.latents for record in records]).astype(np.float32)
    decoded = to_bytes(np.asarray(encoders.autoencoder.decode(latents)))
    cells = []
    for (_, index), record, picture in zip(examples, records, decoded, strict=True):
        image = source[index].image
        image = fit_image(image, nearest_size(*image.shape[:2], sizes))
        caption = record.captions[0].text
        caption = caption if len(caption) <= LETTERS else f"{caption[:LETTERS]}..."
        cells += [Cell(image, caption), Cell(picture, record.key)]
    return cells


def _frame(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture in a white square, made smaller if it does not fit."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side))
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square)
