"""The judge of the digits world, which reads pictures back and so measures how they follow their prompts.

It fits each cell of a picture by ``background (1 - a) + colour a`` with two palette colours and an ink ``a``
per pixel (least squares); a classifier that was trained on the train handwriting alone names the digit.
Anything but a digit on a flat ground is unreadable, above all a blend of pictures.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange

from ..core.errors import UserError
from ..metrics.frechet import distance_with_error, frechet, moments
from .captions import COLORS, Prompt, arrange, draw_prompt, parse_caption
from .scenes import PALETTE, draw_scene, handwriting, render, strokes, to_float
from .worlds import CELL, get_world

# Thresholds, with the cases that each must separate (ink is in [0, 1], images in [-1, 1]).
#
# RMS residual of a cell. A digit in a colour halfway between two of the palette leaves at least 0.17 in any
# handwriting; real scenes leave 0.002 (uint8), and with Gaussian noise of standard deviation 0.15 on every
# pixel 0.08 (0.12 at most).
MAX_RESIDUAL = 0.15
# Mean ink of the 5 darkest pixels. Real digits have 0.82 or more; the mean image of a caption has at most 0.5
# where a place is random, and about 0.6 where a colour is.
MIN_PEAK = 0.75
# The same number up to which a cell is empty; noise of standard deviation 0.15 gives 0.1.
MAX_EMPTY = 0.3
# Mean ink of the 16 lightest pixels. Real digits have none there; a blended ground looks like ink everywhere,
# 0.4 in the mean image of a random background.
MAX_FLOOR = 0.15


@dataclasses.dataclass(frozen=True)
class Reading:
    """The judge's reading of one image; cells are row-major.

    Attributes:
      readable: whether every cell is clearly empty or clearly a digit, in colours of the palette.
      background: index in COLORS.
      digits: [cells] int, 0..9, or -1 for an empty (or unreadable) cell.
      colors: [cells] int, index in COLORS, or -1 likewise.
      ink: [cells,8,8] float in [0,1].
      residual: RMS of what the palette does not explain, in the worst cell.
    """

    readable: bool
    background: int
    digits: np.ndarray
    colors: np.ndarray
    ink: np.ndarray
    residual: float


@dataclasses.dataclass(frozen=True)
class Judge:
    """Reads images of one world. Make one with `Judge.fit`."""

    world: str
    classifier: Any  # sklearn.svm.SVC

    @classmethod
    def fit(cls, world: str) -> "Judge":
        """Trains the classifier on train handwriting, unmoved and moved by a pixel to four sides.

        The moves and the kernel's width were chosen by cross-validation within the train handwriting
        (99.7 % right). Deterministic; takes about half a second.
        """
        from sklearn.svm import SVC  # here, since trainings that judge nothing import this module

        get_world(world)
        ink, labels = strokes()
        rows = np.concatenate(handwriting("train"))
        padded = np.pad(ink[rows], ((0, 0), (1, 1), (1, 1)))
        moves = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
        moved = [padded[:, y : y + CELL, x : x + CELL] for y, x in moves]
        classifier = SVC(C=10, gamma=0.2)
        classifier.fit(np.concatenate(moved).reshape(-1, 64), np.tile(labels[rows], len(moves)))
        return cls(world, classifier)

    def read(self, images: np.ndarray) -> list[Reading]:
        """Reads images [N,H,W,3], floats in [-1,1] (clipped, as in a PNG; NaN is unreadable).

        Raises:
          UserError: the shape is not that of the world.
        """
        images, expected = np.asarray(images, np.float32), (*get_world(self.world).size, 3)
        if images.shape[1:] != expected:
            raise UserError(
                f"images {images.shape} of world {self.world!r} must be [N, *{expected}]"
            )
        cells = _cells(images)
        background = _background(cells)
        colors, ink, residual = _explain(cells, background)

        ordered = np.sort(ink, axis=-1)
        peak, floor = ordered[..., -5:].mean(-1), ordered[..., :16].mean(-1)
        # NaN fails every comparison, so it makes a cell unreadable and nothing else.
        empty = peak <= MAX_EMPTY
        marked = (peak >= MIN_PEAK) & (floor <= MAX_FLOOR)
        readable = ((empty | marked) & (residual <= MAX_RESIDUAL)).all(-1)
        values = np.full(ink.shape[:2], -1)
        if marked.any():
            values[marked] = self.classifier.predict(ink[marked])
        colors = np.where(marked, colors, -1)
        ink = ink.reshape(*ink.shape[:2], CELL, CELL)
        parts = zip(readable, background, values, colors, ink, residual.max(-1), strict=True)
        return [Reading(bool(r), int(b), v, c, i, float(e)) for r, b, v, c, i, e in parts]

    def right(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Whether each image shows exactly its caption: bool [N].

        Raises:
          UserError: as `read` and `parse_caption`, or other than one caption for each image.
        """
        return is_right(self.read(images), captions, self.world)


def read_ink(images: np.ndarray) -> np.ndarray:
    """Reads the ink of images [N,H,W,3] in [-1,1] of any world: [N,H,W] in [0,1], NaN where they are."""
    cells = _cells(np.asarray(images, np.float32))
    _, ink, _ = _explain(cells, _background(cells))
    how = "n (r c) (y x) -> n (r y) (c x)"
    return rearrange(ink, how, r=images.shape[1] // CELL, y=CELL)


def _cells(images: np.ndarray) -> np.ndarray:
    """Cuts images [N,H,W,3] into cells [N,cells,64,3] of colours in [-1,1]."""
    how = "n (r y) (c x) rgb -> n (r c) (y x) rgb"
    return rearrange(images.clip(-1, 1), how, y=CELL, x=CELL)


def _background(cells: np.ndarray) -> np.ndarray:
    """Returns the palette colour nearest to the mean of the outer columns, where ink is rare: [N]."""
    grid = cells.reshape(*cells.shape[:2], CELL, CELL, 3)
    ground = grid[..., (0, -1), :].mean((1, 2, 3))
    return np.square(ground[:, None] - PALETTE).sum(-1).argmin(-1)


def _explain(cells: np.ndarray, background: np.ndarray):
    """Fits a colour [N,cells], its ink [N,cells,64] and RMS residual [N,cells] by least squares."""
    ground = PALETTE[background][:, None, None]
    colors = np.zeros(cells.shape[:2], int)
    ink = np.zeros(cells.shape[:3], np.float32)
    residual = np.full(cells.shape[:2], np.inf, np.float32)
    for color, value in enumerate(PALETTE):
        way = value - ground
        length = np.maximum(np.square(way).sum(-1), 1)  # 0 only for the background's own colour
        share = (((cells - ground) * way).sum(-1) / length).clip(0, 1)
        rest = np.sqrt(np.square(cells - ground - share[..., None] * way).mean((2, 3)))
        # The background's own colour fits an empty cell equally well, but is no ink.
        better = (rest < residual) & (background != color)[:, None] | np.isnan(rest)
        colors = np.where(better, color, colors)
        ink = np.where(better[..., None], share, ink)
        residual = np.where(better, rest, residual)
    return colors, ink, residual


def arrangement(prompt: Prompt, reading: Reading, world: str) -> tuple[int, ...] | None:
    """Returns the cell of each thing of a prompt, or None where the image does not show the prompt."""
    if not reading.readable:
        return None
    columns = get_world(world).cells[1]
    return arrange(prompt, reading.background, reading.digits, reading.colors, columns)


def is_right(readings: Sequence[Reading], captions: Sequence[str], world: str) -> np.ndarray:
    """Whether each reading is exactly its caption: bool [N]."""
    if len(readings) != len(captions):
        raise UserError(f"{len(readings)} images with {len(captions)} captions: give one for each")
    pairs = zip(readings, captions, strict=True)
    return np.array([arrangement(parse_caption(c), r, world) is not None for r, c in pairs], bool)


def prompt_accuracy(
    readings: Sequence[Reading], captions: Sequence[str], world: str
) -> dict[str, dict[str, float]]:
    """Computes the share of images that show their caption.

    Returns:
      For 'overall' and each category that occurs: ``accuracy`` in [0,1], its binomial
      ``standard_error``, and ``count``.
    """
    right = is_right(readings, captions, world)
    groups = {"overall": right}
    categories = np.array([parse_caption(caption).category for caption in captions])
    for category in get_world(world).categories:
        if (categories == category).any():
            groups[category] = right[categories == category]
    return {
        name: binomial("accuracy", group) | {"count": len(group)}
        for name, group in groups.items()
        if len(group)
    }


def binomial(name: str, flags: np.ndarray) -> dict[str, float]:
    """Returns the share of true flags under ``name``, and ``standard_error`` sqrt(p (1-p) / n)."""
    share = np.mean(flags)
    error = np.sqrt(share * (1 - share) / len(flags))
    return {name: float(share), "standard_error": float(error)}


@dataclasses.dataclass(frozen=True)
class PixelFeatures:
    """The features of `frechet_distance`: leading principal components of real train scenes.

    Attributes:
      mean: [H*W*3].
      components: [64,H*W*3], orthonormal rows.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, world: str) -> "PixelFeatures":
        """Fits 64 components to the same 4,000 train scenes each time; takes about a second."""
        cells = get_world(world).cells
        generator = np.random.default_rng([3, 0])
        images = []
        for _ in range(4000):
            prompt = draw_prompt(generator, cells)
            images.append(render(draw_scene(generator, prompt, cells, "train")))
        pixels = to_float(np.stack(images)).reshape(len(images), -1).astype(np.float64)
        mean = pixels.mean(0)
        _, vectors = np.linalg.eigh(np.cov(pixels, rowvar=False))
        return cls(mean, vectors[:, ::-1][:, :64].T)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images [N,H,W,3] in [-1,1] (clipped) to features [N,64] float64."""
        pixels = np.asarray(images, np.float64).clip(-1, 1).reshape(len(images), -1)
        return (pixels - self.mean) @ self.components.T


def frechet_distance(
    images: np.ndarray, real_images: np.ndarray, features: PixelFeatures
) -> dict[str, float]:
    """Computes the Frechet distance of images [N,H,W,3] to real ones [M,H,W,3], both in [-1,1].

    The distance of finite sets is biased upwards, depending on their sizes. The real images are therefore
    split into a control of N images (at most M/2) and the reference, to which both the control and the
    images are compared. With M >= 2 N, ``real`` is the distance of a perfect model.

    Returns:
      ``distance``; ``standard_error``, that of drawing other images and another reference, by the delta method
      (`metrics.frechet.distance_with_error`), which near a distance of zero is somewhat large; ``real``, the
      distance of the control.

    Raises:
      UserError: fewer than 128 images or 256 real ones, which 64 features need, or non-finite pixels.
    """
    if len(images) < 128 or len(real_images) < 256:
        raise UserError(
            f"a Frechet distance of {len(images)} images to {len(real_images)} real ones is too noisy: give "
            "at least 128 and 256"
        )
    if not np.isfinite(images).all():
        raise UserError("images have non-finite pixels, and so no Frechet distance")
    order = np.random.default_rng(0).permutation(len(real_images))
    cut = min(len(images), len(real_images) // 2)
    fake, real = features(images), features(real_images)[order]
    control, reference = real[:cut], real[cut:]
    _, error = distance_with_error(fake, moments(reference), reference)
    return {
        "distance": frechet(fake, reference),
        "standard_error": error,
        "real": frechet(control, reference),
    }


def diversity(
    readings: Sequence[Reading], captions: Sequence[str], world: str
) -> dict[str, float | int]:
    """Measures the diversity of images where captions leave colours or handwriting open; real scenes have 1.

    Images with the same caption are a group. Only right images count, since noise is no variety. Each
    group is compared with as many real scenes of its caption as it has right images: an entropy of few
    samples is too low, and equally so for both.

    Returns:
      ``color``: entropy of the open colours, over that of real scenes;
      ``handwriting``: mean pairwise Euclidean distance of the ink of each digit, likewise;
      ``combined``: the geometric mean of these, 0 where either has collapsed;
      ``groups``: number of captions with two right images or more, which are used; with 0 the other
      numbers are NaN.

    Raises:
      UserError: other than one caption for each reading, or a caption outside the grammar.
    """
    right = is_right(readings, captions, world)
    groups = collections.defaultdict(list)
    for reading, caption, good in zip(readings, captions, right, strict=True):
        if good:
            groups[caption].append(reading)
    generator = np.random.default_rng([4, 0])
    grid, (ink, _) = get_world(world).cells, strokes()
    measured, expected = [], []
    for caption, group in groups.items():
        if len(group) < 2:
            continue
        prompt = parse_caption(caption)
        places = [list(arrangement(prompt, reading, world)) for reading in group]
        pairs = list(zip(group, places, strict=True))
        backgrounds = np.array([reading.background for reading in group])
        colors = np.array([reading.colors[cells] for reading, cells in pairs])
        written = np.array([reading.ink[cells] for reading, cells in pairs])
        measured.append(_variety(prompt, backgrounds, colors, written))
        for _ in range(8):  # enough that the reference adds little noise
            scenes = [draw_scene(generator, prompt, grid, "train") for _ in group]
            colors = np.array([[mark.color for mark in scene.marks] for scene in scenes])
            written = np.array([ink[[mark.handwriting for mark in s.marks]] for s in scenes])
            backgrounds = np.array([scene.background for scene in scenes])
            expected.append(_variety(prompt, backgrounds, colors, written))
    if not measured:
        return {"color": np.nan, "handwriting": np.nan, "combined": np.nan, "groups": 0}
    # Captions that leave no colour open have NaN there and do not count.
    color, spread = (
        float(np.nanmean([m[k] for m in measured]) / np.nanmean([e[k] for e in expected]))
        if not np.isnan([e[k] for e in expected]).all()
        else np.nan
        for k in range(2)
    )
    combined = float(np.exp(np.mean([np.log(max(v, 1e-12)) for v in (color, spread) if v == v])))
    return {"color": color, "handwriting": spread, "combined": combined, "groups": len(measured)}


def _variety(prompt: Prompt, backgrounds, colors, ink) -> tuple[float, float]:
    """Returns entropy (nats, mean over open colours, or NaN) and spread of one caption's images.

    Args:
      backgrounds: [N]. colors: [N,things]. ink: [N,things,8,8].
    """
    from sklearn.metrics import pairwise_distances

    opened = [colors[:, k] for k, thing in enumerate(prompt.things) if thing.color is None]
    if prompt.background is None:
        opened.append(backgrounds)
    entropies = []
    for column in opened:
        share = np.bincount(column, minlength=len(COLORS)) / len(column)
        entropies.append(-(share[share > 0] * np.log(share[share > 0])).sum())
    flat = ink.reshape(*ink.shape[:2], -1).astype(np.float64)
    pairs = [pairwise_distances(flat[:, k]).sum() for k in range(flat.shape[1])]
    spread = np.mean(pairs) / (len(flat) * (len(flat) - 1))
    return (float(np.mean(entropies)) if entropies else np.nan), float(spread)
