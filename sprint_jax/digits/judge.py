"""The judge of the digits world: reads pictures back, so that following a prompt is a number.

A picture is explained cell by cell as ``background (1 - a) + colour a`` with two palette colours
and an ink ``a`` per pixel (least squares); a classifier that saw the train handwriting alone names
the digit. What is not a digit on a flat ground, a blend of pictures above all, is unreadable.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC

from sprint_jax.core.errors import UserError
from sprint_jax.digits import scenes as digits
from sprint_jax.digits.captions import COLORS, Prompt, arrange, parse_caption
from sprint_jax.metrics.frechet import frechet

# Thresholds, each with what it must part (ink is in [0, 1], images in [-1, 1]).
#
# RMS residual of a cell. A digit in a colour halfway between two of the palette leaves at least
# 0.17, whatever its handwriting; real scenes leave 0.002 (uint8), and with Gaussian noise of
# standard deviation 0.15 on every pixel 0.08 (0.12 at most).
MAX_RESIDUAL = 0.15
# Mean ink of the 5 darkest pixels. Real digits have 0.82 or more. One place in two or in four left
# to chance gives at most 0.5 in the mean image, one colour left to chance about 0.6.
MIN_PEAK = 0.75
# The same number up to which a cell is empty; noise of standard deviation 0.15 gives 0.1.
MAX_EMPTY = 0.3
# Mean ink of the 16 lightest pixels. Real digits have none there; a ground that is a blend of
# colours shows as ink everywhere, 0.4 when a background is left to chance.
MAX_FLOOR = 0.15


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the judge sees in one image; cells are row-major.

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
    classifier: SVC

    @classmethod
    def fit(cls, world: str) -> "Judge":
        """Trains the classifier on train handwriting, as it is and moved by a pixel to four sides.

        The moves and the width of the kernel were chosen by cross-validation within the train
        handwriting (99.7 % right). Takes about half a second; deterministic.
        """
        digits.get_world(world)
        ink, labels = digits.strokes()
        rows = np.concatenate(digits.handwriting("train"))
        padded = np.pad(ink[rows], ((0, 0), (1, 1), (1, 1)))
        moves = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
        moved = [padded[:, y : y + digits.CELL, x : x + digits.CELL] for y, x in moves]
        classifier = SVC(C=10, gamma=0.2)
        classifier.fit(np.concatenate(moved).reshape(-1, 64), np.tile(labels[rows], len(moves)))
        return cls(world, classifier)

    def read(self, images: np.ndarray) -> list[Reading]:
        """Reads images [N,H,W,3], floats in [-1,1] (clipped, as in a PNG; NaN is unreadable).

        Raises:
          UserError: the shape is not that of the world.
        """
        cells = _cut(images, self.world)
        background = _background(cells)
        colors, ink, residual = _explain(cells, background)

        ordered = np.sort(ink, axis=-1)
        peak, floor = ordered[..., -5:].mean(-1), ordered[..., :16].mean(-1)
        # NaN fails every comparison, so it can only make a cell unreadable.
        empty = peak <= MAX_EMPTY
        marked = (peak >= MIN_PEAK) & (floor <= MAX_FLOOR)
        readable = ((empty | marked) & (residual <= MAX_RESIDUAL)).all(-1)
        values = np.full(ink.shape[:2], -1)
        if marked.any():
            values[marked] = self.classifier.predict(ink[marked])
        colors = np.where(marked, colors, -1)
        ink = ink.reshape(*ink.shape[:2], digits.CELL, digits.CELL)
        parts = zip(readable, background, values, colors, ink, residual.max(-1), strict=True)
        return [Reading(bool(r), int(b), v, c, i, float(e)) for r, b, v, c, i, e in parts]

    def right(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Whether each image shows what its caption asks for, and no more: bool [N].

        Raises:
          UserError: as `read` and `parse_caption`, or other than one caption for each image.
        """
        return is_right(self.read(images), captions, self.world)


def _cut(images: np.ndarray, world: str) -> np.ndarray:
    """Images [N,H,W,3] as cells [N,cells,64,3], clipped to [-1,1]."""
    rows, columns = digits.get_world(world).cells
    side = digits.CELL
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[1:] != (rows * side, columns * side, 3):
        raise UserError(
            f"images have shape {images.shape}: the world {world!r} has "
            f"[N,{rows * side},{columns * side},3]"
        )
    blocks = (
        images.clip(-1, 1).reshape(-1, rows, side, columns, side, 3).transpose(0, 1, 3, 2, 4, 5)
    )
    return blocks.reshape(-1, rows * columns, side * side, 3)


def _background(cells: np.ndarray) -> np.ndarray:
    """The palette colour nearest to the mean of the outer columns, where ink is rare: [N]."""
    grid = cells.reshape(*cells.shape[:2], digits.CELL, digits.CELL, 3)
    ground = grid[..., (0, -1), :].mean((1, 2, 3))
    return np.square(ground[:, None] - digits.PALETTE).sum(-1).argmin(-1)


def _explain(cells: np.ndarray, background: np.ndarray):
    """Best colour [N,cells], its ink [N,cells,64] and RMS residual [N,cells], by least squares."""
    ground = digits.PALETTE[background][:, None, None]
    colors = np.zeros(cells.shape[:2], int)
    ink = np.zeros(cells.shape[:3], np.float32)
    residual = np.full(cells.shape[:2], np.inf, np.float32)
    for color, value in enumerate(digits.PALETTE):
        way = value - ground
        length = np.maximum(np.square(way).sum(-1), 1)  # 0 only for the background's own colour
        share = (((cells - ground) * way).sum(-1) / length).clip(0, 1)
        rest = np.sqrt(np.square(cells - ground - share[..., None] * way).mean((2, 3)))
        # The background's own colour explains an empty cell, and can tie there; it is no ink.
        better = (rest < residual) & (background != color)[:, None] | np.isnan(rest)
        colors = np.where(better, color, colors)
        ink = np.where(better[..., None], share, ink)
        residual = np.where(better, rest, residual)
    return colors, ink, residual


def arrangement(prompt: Prompt, reading: Reading, world: str) -> tuple[int, ...] | None:
    """The cell of each thing of a prompt, or None where the image does not show the prompt."""
    if not reading.readable:
        return None
    columns = digits.get_world(world).cells[1]
    return arrange(prompt, reading.background, reading.digits, reading.colors, columns)


def is_right(readings: Sequence[Reading], captions: Sequence[str], world: str) -> np.ndarray:
    """Whether each reading is what its caption asks for: bool [N]."""
    if len(readings) != len(captions):
        raise UserError(f"{len(readings)} images with {len(captions)} captions: give one for each")
    pairs = zip(readings, captions, strict=True)
    return np.array([arrangement(parse_caption(c), r, world) is not None for r, c in pairs], bool)


def prompt_accuracy(
    readings: Sequence[Reading], captions: Sequence[str], world: str
) -> dict[str, dict[str, float]]:
    """The share of images that show what their caption asks for.

    Returns:
      For 'overall' and each category that occurs: ``accuracy`` in [0,1], its binomial
      ``standard_error`` sqrt(p (1-p) / n), and ``count`` n.
    """
    right = is_right(readings, captions, world)
    groups = {"overall": right}
    categories = np.array([parse_caption(caption).category for caption in captions])
    for category in digits.get_world(world).categories:
        if (categories == category).any():
            groups[category] = right[categories == category]
    return {
        name: {
            "accuracy": float(group.mean()),
            "standard_error": float(np.sqrt(group.mean() * (1 - group.mean()) / len(group))),
            "count": len(group),
        }
        for name, group in groups.items()
        if len(group)
    }


@dataclasses.dataclass(frozen=True)
class PixelFeatures:
    """The feature of `frechet_distance`: leading principal components of real train scenes.

    Attributes:
      mean: [H*W*3].
      components: [64,H*W*3], orthonormal rows.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, world: str) -> "PixelFeatures":
        """Fits 64 components to 4,000 train scenes, always the same; about a second."""
        cells = digits.get_world(world).cells
        generator = np.random.default_rng([3, 0])
        images = []
        for _ in range(4000):
            prompt = digits.draw_prompt(generator, cells)
            images.append(digits.render(digits.draw_scene(generator, prompt, cells, "train")))
        pixels = digits.to_float(np.stack(images)).reshape(len(images), -1).astype(np.float64)
        mean = pixels.mean(0)
        _, vectors = np.linalg.eigh(np.cov(pixels, rowvar=False))
        return cls(mean, vectors[:, ::-1][:, :64].T)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images [N,H,W,3] in [-1,1] (clipped) to features [N,64] float64."""
        pixels = np.asarray(images, np.float64).clip(-1, 1).reshape(len(images), -1)
        return (pixels - self.mean) @ self.components.T


def frechet_distance(
    images: np.ndarray, real_images: np.ndarray, features: PixelFeatures, resamples: int = 20
) -> dict[str, float]:
    """The Frechet distance of images [N,H,W,3] to real ones [M,H,W,3], both in [-1,1].

    The distance of finite sets is biased upwards by an amount that depends on their sizes. The real
    images are therefore parted in two: a control of N images (M/2 if that is fewer), and the
    reference, to which both the control and the images are compared. Give M >= 2 N; then ``real``
    is what a perfect model would get.

    Returns:
      ``distance``; ``standard_error``, from bootstrap resamples of the images and the reference;
      ``real``, the distance of the control.

    Raises:
      UserError: fewer than 128 images of either kind, which 64 features need, or non-finite ones.
    """
    if len(images) < 128 or len(real_images) < 256:
        raise UserError(
            f"a Frechet distance of {len(images)} images to {len(real_images)} real ones means "
            "nothing: give at least 128 and 256"
        )
    if not np.isfinite(images).all():
        raise UserError("images have non-finite pixels: no Frechet distance can be given")
    generator = np.random.default_rng(0)
    order = generator.permutation(len(real_images))
    cut = min(len(images), len(real_images) // 2)
    fake, real = features(images), features(real_images)[order]
    control, reference = real[:cut], real[cut:]
    resampled = [
        frechet(*(x[generator.integers(len(x), size=len(x))] for x in (fake, reference)))
        for _ in range(resamples)
    ]
    return {
        "distance": frechet(fake, reference),
        "standard_error": float(np.std(resampled, ddof=1)),
        "real": frechet(control, reference),
    }


def diversity(
    readings: Sequence[Reading], captions: Sequence[str], world: str
) -> dict[str, float | int]:
    """How much of what captions leave to chance the images vary, against real scenes (1 is real).

    Images with the same caption are a group. Only right images count, so that noise is not taken
    for variety, and each group is compared with real scenes drawn for its caption, as many as it
    has right images: an entropy of few samples is too low for both alike.

    Returns:
      ``color``: entropy of the colours that captions leave open, over that of real scenes;
      ``handwriting``: mean pairwise Euclidean distance of the ink of each digit, likewise;
      ``combined``: the geometric mean of these, 0 where either has collapsed;
      ``groups``: number of captions with two right images or more, the ones used. Without any the
      other numbers are NaN.

    Raises:
      UserError: other than one caption for each reading, or a caption outside the grammar.
    """
    right = is_right(readings, captions, world)
    groups = collections.defaultdict(list)
    for reading, caption, good in zip(readings, captions, right, strict=True):
        if good:
            groups[caption].append(reading)
    generator = np.random.default_rng([4, 0])
    cells = digits.get_world(world).cells
    ink, _ = digits.strokes()
    measured, expected = [], []
    for caption, group in groups.items():
        if len(group) < 2:
            continue
        prompt = parse_caption(caption)
        places = [list(arrangement(prompt, reading, world)) for reading in group]
        measured.append(
            _variety(
                prompt,
                np.array([r.background for r in group]),
                np.array([r.colors[p] for r, p in zip(group, places, strict=True)]),
                np.array([r.ink[p] for r, p in zip(group, places, strict=True)]),
            )
        )
        for _ in range(8):  # enough that the reference adds little noise
            scenes = [digits.draw_scene(generator, prompt, cells, "train") for _ in group]
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
    """Entropy (nats, mean over open colours, or NaN) and spread of one caption's images.

    Args:
      backgrounds: [N]. colors: [N,things]. ink: [N,things,8,8].
    """
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
