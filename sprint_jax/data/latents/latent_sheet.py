"""A sheet of images beside what their stored latents decode to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...core.pixels import to_bytes
from ...core.sheet import Cell, draw_sheet, save_picture
from ...core.storage import AnyPath
from ..buckets import read_fitted
from .cache import Cache
from .units import Job

BUCKETS = 6  # on a sheet, those with the most records: each compiles a decoder of its size
SIDE = 256  # of the largest image on it
LETTERS = 90  # of a caption


def draw_latents(path: AnyPath, cache: Cache, job: Job, entries: Sequence[dict[str, Any]]) -> None:
    """Writes a sheet with one row for each bucket: originals as they were cut, decoded, and their maps if any.

    Args:
      path: of the PNG.
      cache: written by the job; entries: of all its units, in order, see `units.read_unit`.
    """
    examples: dict[tuple[int, int], list[tuple[int, int]]] = {}
    runs = [run for shard in cache.manifest["shards"] for run in shard["buckets"]]
    ends = np.cumsum([count for *_, count in runs])
    first = 0
    for entry in entries:
        for number, index in entry["examples"]:
            height, width, _ = runs[np.searchsorted(ends, first + number, side="right")]
            examples.setdefault((height, width), []).append((first + number, index))
        first += sum(shard["records"] for shard in entry["shards"])
    common = sorted(examples, key=lambda size: -len(cache.buckets[size]))[:BUCKETS]
    rows = [_draw_row(cache, job, examples[size][:2]) for size in common]
    side = min(SIDE, max(max(cell.picture.shape) for row in rows for cell in row))
    framed = [[cell._replace(picture=_frame(cell.picture, side)) for cell in row] for row in rows]
    titles = ["original", "decoded", *(["control"] if cache.control else [])]
    titles *= max(map(len, rows)) // len(titles)
    save_picture(path, draw_sheet(framed, titles=titles))


def _draw_row(cache: Cache, job: Job, examples: Sequence[tuple[int, int]]) -> list[Cell]:
    records = cache.__getitems__([number for number, _ in examples])
    latents = np.stack([record.latents for record in records]).astype(np.float32)
    decoded = to_bytes(np.asarray(job.encoders.autoencoder.decode(latents)))
    maps = [None] * len(records)
    if cache.control:
        controls = np.stack([record.controls[0] for record in records]).astype(np.float32)
        maps = to_bytes(np.asarray(job.encoders.autoencoder.decode(controls)))
    cells = []
    for (_, index), record, picture, control in zip(examples, records, decoded, maps, strict=True):
        original = read_fitted(job.source, index, job.sizes)
        text = original.captions[0].text
        caption = text if len(text) <= LETTERS else f"{text[:LETTERS]}..."
        cells += [Cell(original.image, caption), Cell(picture, record.key)]
        cells += [] if control is None else [Cell(control, cache.control["kind"])]
    return cells


def _frame(picture: np.ndarray, side: int) -> np.ndarray:
    """An image in a white square, made smaller if it does not fit."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side))
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square)
