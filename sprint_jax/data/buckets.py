"""Aspect-ratio buckets: the published tables of sizes, and images resized and cut to them."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..core.cli import parse_size
from ..core.config import Config
from ..core.errors import UserError
from ..core.pixels import SIZES_1024, nearest_size
from .members import Buckets
from .sources.records import Record, Rejected, Source

# (height, width) of the published 2K models, from wide to tall (diffusers' ASPECT_RATIO_2048_BIN).
SIZES_2048 = (
    ((1024, 4096), (1024, 3968), (1024, 3840), (1024, 3712), (1152, 3584), (1152, 3456))
    + ((1152, 3328), (1280, 3200), (1280, 3072), (1408, 2944), (1408, 2816), (1408, 2688))
    + ((1536, 2688), (1536, 2560), (1664, 2432), (1664, 2304), (1792, 2304), (1792, 2176))
    + ((1920, 2176), (1920, 2048), (2048, 2048), (2048, 1920), (2176, 1920), (2176, 1792))
    + ((2304, 1792), (2304, 1664), (2432, 1664), (2560, 1536), (2688, 1536), (2816, 1408))
    + ((2944, 1408), (3072, 1280), (3200, 1280), (3328, 1152), (3456, 1152), (3584, 1152))
    + ((3712, 1024), (3840, 1024), (3968, 1024), (4096, 1024))
)

# Published data for 2K and more is resized with Lanczos, below with bicubic; no table comes near this.
_LANCZOS_PIXELS = 1 << 21
# By what factor the ratio of a map's sides may differ from its image's: annotators round sides to 64 pixels.
_STRETCHED = 1.25
_THINNEST = 8  # times as many pixels before the cut as after it; 32:1 against a table's 4:1


def size_table(resolution: int) -> tuple[tuple[int, int], ...]:
    """Returns the (height, width) in pixels of the published models of a resolution, from wide to tall.

    The tables for 256 and 512 are that of 1024 divided, that for 4096 is that of 2048 doubled.

    Raises:
      UserError: exit code 2, for another resolution.
    """
    tables = {256: (SIZES_1024, 1 / 4), 512: (SIZES_1024, 1 / 2), 1024: (SIZES_1024, 1)}
    tables |= {2048: (SIZES_2048, 1), 4096: (SIZES_2048, 2)}
    if resolution not in tables:
        raise UserError(
            f"data.resolution is {resolution}: there are tables for {', '.join(map(str, tables))}; "
            "for other sizes set data.sizes, such as 768x768,512x1024",
            exit_code=2,
        )
    sizes, scale = tables[resolution]
    return tuple((int(height * scale), int(width * scale)) for height, width in sizes)


def choose_sizes(resolution: int, sizes: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Returns the sizes (height, width) in pixels that images are cut to: ``sizes``, or a `size_table`.

    Raises:
      UserError: exit code 2, naming what cannot be used.
    """
    table = tuple(parse_size(text, "data.sizes") for text in sizes) or size_table(resolution)
    if len(set(table)) < len(table):
        raise UserError("data.sizes names a size twice", exit_code=2)
    return table


def count_sizes(c: Config) -> int:
    """Returns for how many sizes of pictures a run of a config compiles its updates, at most; reads no data.

    Latents that are there may be of fewer sizes than ``data.resolution`` and ``data.sizes`` say.
    """
    many = c.data.source in ("latents", "images")
    return len(choose_sizes(c.data.resolution, c.data.sizes)) if many else 1


def check_factor(sizes: Sequence[tuple[int, int]], factor: int) -> None:
    """Raises UserError (exit code 2) if a side is no multiple of an autoencoder's pixels per latent."""
    for height, width in sizes:
        if height % factor or width % factor:
            raise UserError(
                f"images of {height}x{width} cannot be encoded: sides must be multiples of {factor}, the "
                "autoencoder's factor; set data.sizes or another data.resolution",
                exit_code=2,
            )


def merge_sizes(
    sizes: Sequence[tuple[int, int]], counts: Sequence[int], at_least: int
) -> list[int]:
    """Finds larger groups for images whose size too few others have, so that each group fills a batch.

    The size of the fewest images joins the one nearest in aspect ratio, until no size has fewer than
    ``at_least`` of the ``counts`` images, or one size is left.

    Returns:
      Of each size the number of the size that its images are cut to, [sizes].
    """
    ratios = [math.log(height / width) for height, width in sizes]
    left = {k: int(count) for k, count in enumerate(counts) if count}
    target = list(range(len(sizes)))
    while len(left) > 1:
        least = min(left, key=lambda k: (left[k], sizes[k]))
        if left[least] >= at_least:
            break
        count = left.pop(least)
        nearest = min(left, key=lambda k: (abs(ratios[k] - ratios[least]), sizes[k]))
        left[nearest] += count
        target = [nearest if k == least else k for k in target]
    return target


def describe_repeats(sources: Sequence[Buckets], factor: int, batch_size: int) -> str:
    """Says of which sizes a batch repeats records, and how that is avoided; empty where none does.

    Args:
      sources: records of each by (h, w) of latents; factor: pixels per latent along a side.
    """
    counts: Counter = Counter()
    for source in sources:
        counts.update({size: len(members) for size, members in source.items()})
    sizes = sorted(counts)
    few = [size for size in sizes if 0 < counts[size] < batch_size]
    if not few:
        return ""
    kept = sorted(set(merge_sizes(sizes, [counts[size] for size in sizes], batch_size)))
    name = lambda size: f"{size[0] * factor}x{size[1] * factor}"  # noqa: E731
    least = sorted(few, key=lambda size: (counts[size], size))[:3]
    line = (
        f"{len(few)} of {len(sizes)} sizes have fewer records than a batch of {batch_size}, such as "
        f"{', '.join(f'{name(size)} ({counts[size]})' for size in least)}. Their batches repeat records, and "
        "come as rarely as these are few. "
    )
    if len(kept) < len(sizes):
        joined = ",".join(name(sizes[k]) for k in kept)
        return line + f"Encode with --config.data.sizes={joined}, or train with smaller batches"
    return line + "Train with smaller batches"


def fit_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image, uint8 [H, W, 3], to cover a size (height, width), and cuts out its middle.

    The side whose scale is larger fits exactly, the other is rounded down. That is NVlabs'
    ``SanaWebDatasetMS``: torchvision's Resize of PIL images (bicubic with antialias; Lanczos from 2K on)
    and CenterCrop, whose margins are rounded half to even; but its float division may come out one pixel
    short, and a black row fill the gap.

    Raises:
      ValueError: the image is so long and thin that almost nothing of it would be left.
    """
    height, width = size
    old_height, old_width = image.shape[:2]
    if height * old_width > width * old_height:
        new = (height, old_width * height // old_height)
    else:
        new = (old_height * width // old_width, width)
    if new[0] * new[1] > _THINNEST * height * width:
        raise ValueError(
            f"{old_height}x{old_width} pixels are too long and thin for {height}x{width}"
        )
    if new != (old_height, old_width):
        lanczos = height * width > _LANCZOS_PIXELS
        how = Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC
        image = np.asarray(Image.fromarray(image).resize(new[::-1], how))
    top, left = round((new[0] - height) / 2), round((new[1] - width) / 2)
    return image[top : top + height, left : left + width]


def read_fitted(source: Source, index: int, sizes: Sequence[tuple[int, int]]) -> Record:
    """A record with its image, and its map if there is one, cut alike to the nearest of ``sizes``.

    Raises:
      Rejected: as the source; a map is of another shape than its image.
    """
    record = source[index]
    height, width = record.image.shape[:2]
    size = nearest_size(height, width, sizes)
    try:
        fitted = record._replace(image=fit_image(record.image, size))
        if record.control is None:
            return fitted
        rows, columns = record.control.shape[:2]
        if not 1 / _STRETCHED < rows * width / (columns * height) < _STRETCHED:
            shapes = f"{rows}x{columns} pixels beside an image of {height}x{width}"
            raise ValueError(f"the map is of another shape: {shapes}")
        map_ = record.control
        if (rows, columns) != (height, width):
            # To the image's own size first, so that both are cut alike.
            how = Image.Resampling.BICUBIC
            map_ = np.asarray(Image.fromarray(map_).resize((width, height), how))
        return fitted._replace(control=fit_image(map_, size))
    except ValueError as error:
        raise Rejected(record.key, str(error)) from error
