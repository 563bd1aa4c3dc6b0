"""Sketches of the digits world: which pixels of a picture are strokes, and how a drawn picture follows them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.pixels import to_bytes
from .judge import Judge, prompt_accuracy, read_ink
from .scenes import draw_images, to_float
from .worlds import CELL

# The least ink of a pixel in a stroke. With less, scenes of other captions overlap more; with more, a little
# noise counts too much: tests/digits/test_sketches.py has both.
MIN_INK = 0.6


def draw_sketches(images: np.ndarray) -> np.ndarray:
    """Draws the strokes of pictures, uint8 [N,H,W,3], white on black: uint8 [N,H,W], 255 in strokes.

    Raises:
      UserError: the pictures are not made of cells, so they are of no digits world.
    """
    if images.shape[1] % CELL or images.shape[2] % CELL:
        size = f"{images.shape[1]}x{images.shape[2]}"
        raise UserError(f"strokes are those of the digits world: a picture of {size} is not of it")
    return np.where(_strokes(to_float(images)), 255, 0).astype(np.uint8)


def stroke_iou(images: np.ndarray, sketches: np.ndarray) -> np.ndarray:
    """Measures how pictures follow sketches: intersection over union of their strokes, [N] in [0,1].

    Args:
      images: [N,H,W,3], floats in [-1,1] (clipped; NaN is no stroke).
      sketches: uint8 [N,H,W] of `draw_sketches`, in the thickness of the strokes themselves.

    Returns:
      1 for the picture that the sketch was made of; 1 as well where neither has a stroke.
    """
    drawn, wanted = _strokes(images), sketches > 0
    both, either = (drawn & wanted).sum((1, 2)), (drawn | wanted).sum((1, 2))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def summarize_iou(values: np.ndarray) -> dict[str, float]:
    """Returns the mean of `stroke_iou` as ``iou``, and its ``standard_error``."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return {"iou": float(np.mean(values)), "standard_error": float(error)}


def measure_control(
    draw: Callable[[Sequence[str], np.ndarray, float], np.ndarray],
    judge: Judge,
    prompts: Sequence[str],
    *,
    scales: Sequence[float] = (0.0, 0.5, 1.0),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measures how a network with a control branch follows sketches and prompts.

    Each prompt has a sketch of a real scene in held-out handwriting: the right one. 'shuffled' gives it the one
    of the prompt before, 'empty' a black picture.

    Args:
      draw: ``draw(prompts, maps, scale)``, pictures uint8 [N,H,W,3] for maps of that shape.
      scales: of the control branch.

    Returns:
      For each sketch and scale a dict: ``sketch``, ``scale``, ``iou`` with the right sketch and ``followed``,
      that with the sketch that was given (`summarize_iou`), and ``accuracy`` as of `judge.prompt_accuracy`.
    """
    scenes = draw_images(judge.world, prompts, "test", seed)
    right = draw_sketches(to_bytes(scenes))
    given = {"right": right, "shuffled": np.roll(right, 1, axis=0), "empty": np.zeros_like(right)}
    results = []
    for name, sketches in given.items():
        for scale in scales:
            images = to_float(draw(prompts, np.repeat(sketches[..., None], 3, -1), scale))
            results.append(
                {
                    "sketch": name,
                    "scale": scale,
                    "iou": summarize_iou(stroke_iou(images, right)),
                    "followed": summarize_iou(stroke_iou(images, sketches)),
                    "accuracy": prompt_accuracy(judge.read(images), prompts, judge.world),
                }
            )
    return results


def _strokes(images: np.ndarray) -> np.ndarray:
    return read_ink(images) >= MIN_INK  # False for NaN
