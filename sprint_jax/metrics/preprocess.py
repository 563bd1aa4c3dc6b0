"""Pictures as the networks of metrics see them: each library's way to resize, and the scale of its numbers.

Most of what published numbers disagree in is here. The steps are values, which a protocol prints and stores.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import clip, dinov2

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Resize(NamedTuple):
    """A change of size.

    Attributes:
      size: of the square that comes out, in pixels.
      filter: 'bilinear' or 'bicubic'.
      way: 'pillow', antialiased on bytes, as torchvision does with PIL pictures; 'pillow float',
      antialiased on
        floats, each channel alone, cut to 0..255 and not rounded (clean-fid); 'torch', the centres of pixels
        aligned, not antialiased (F.interpolate); 'tensorflow 1', corners aligned, not antialiased
        (torch-fidelity).
      shape: 'stretch' to the square; 'short side', to which the shorter side is brought, and the middle cut
      out;
        'short side, floor', the same with an odd rest halved downwards, as transformers does; 'middle', the
        middle square, cut out first, halved downwards too.
    """

    size: int
    filter: str
    way: str
    shape: str = "stretch"


class View(NamedTuple):
    """How a network sees a picture: resizes in order, then (x - mean) / std of bytes, by channel or for all."""

    resizes: tuple[Resize, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def side(self) -> int:
        """Pixels of a side of what comes out."""
        return self.resizes[-1].size


def apply(view: View, picture: Image.Image | np.ndarray) -> np.ndarray:
    """Turns an RGB picture, or uint8 [H, W, 3], into float32 [side, side, 3]."""
    x = np.asarray(picture)
    for step in view.resizes:
        x = resize(step, x)
    mean, std = (np.asarray(each, np.float32) for each in (view.mean, view.std))
    return (x.astype(np.float32) - mean[None, None]) / std[None, None]


def resize(step: Resize, x: np.ndarray) -> np.ndarray:
    """Applies one resize to [H, W, 3]; bytes stay bytes with 'pillow', and become float32 otherwise."""
    height, width = x.shape[:2]
    if step.shape == "middle":
        side = min(height, width)
        x = _middle(x, side, floor=True)
        height = width = side
    goal = (step.size, step.size)
    if step.shape.startswith("short side"):
        short, long = min(height, width), int(step.size * max(height, width) / min(height, width))
        goal = (step.size, long) if short == height else (long, step.size)
    if step.way == "pillow":
        if goal != (height, width):
            x = np.asarray(Image.fromarray(x).resize(goal[::-1], FILTERS[step.filter]))
    elif step.way == "pillow float":
        x = np.stack([_channel(x[..., c], goal, step.filter) for c in range(x.shape[-1])], -1)
    else:
        x = _two_taps(x.astype(np.float32), goal, half=step.way == "torch")
    if step.shape.startswith("short side"):
        x = _middle(x, step.size, floor=step.shape == "short side, floor")
    return x


def _middle(x: np.ndarray, side: int, floor: bool) -> np.ndarray:
    """Cuts out the middle square; half of an odd rest is rounded as torchvision's CenterCrop does, or down."""
    half = math.floor if floor else round  # to even
    top, left = (half((length - side) / 2.0) for length in x.shape[:2])
    return x[top : top + side, left : left + side]


def _channel(x: np.ndarray, goal: tuple[int, int], filter: str) -> np.ndarray:
    picture = Image.fromarray(x.astype(np.float32)).resize(goal[::-1], FILTERS[filter])
    return np.asarray(picture).clip(0, 255)


def _two_taps(x: np.ndarray, goal: tuple[int, int], half: bool) -> np.ndarray:
    """Interpolates linearly between the two nearest pixels along each axis, rows first."""
    for axis, (old, new) in enumerate(zip(x.shape[:2], goal, strict=True)):
        scale = np.float32(old / new)
        place = np.arange(new, dtype=np.float32)
        place = (
            np.maximum((place + np.float32(0.5)) * scale - np.float32(0.5), 0)
            if half
            else place * scale
        )
        low = np.minimum(place.astype(np.int64), old - 1)
        share = (place - low).reshape((-1, 1) if axis == 1 else (-1, 1, 1))
        share = share[None] if axis == 1 else share
        first, second = x.take(low, axis), x.take(np.minimum(low + 1, old - 1), axis)
        x = first + (second - first) * share
    return x


def _bytes(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(255 * value for value in values)


_TO_ONE = dict(mean=(127.5,), std=(127.5,))  # 2 x / 255 - 1
_TENSORFLOW = dict(mean=(128.0,), std=(128.0,))
_CLIP = dict(mean=_bytes(clip.MEAN), std=_bytes(clip.STD))

INCEPTION_PYTORCH = View((Resize(299, "bilinear", "torch"),), **_TO_ONE)
INCEPTION_SANA = View(
    (Resize(512, "bilinear", "pillow", "short side"), Resize(299, "bilinear", "torch")), **_TO_ONE
)
INCEPTION_CLEAN = View((Resize(299, "bicubic", "pillow float"),), **_TENSORFLOW)
INCEPTION_FIDELITY = View((Resize(299, "bilinear", "tensorflow 1"),), **_TENSORFLOW)
DINOV2 = View((Resize(224, "bicubic", "pillow"),), mean=_bytes(dinov2.MEAN), std=_bytes(dinov2.STD))
CMMD = View((Resize(336, "bicubic", "pillow", "middle"),), **_CLIP)


def clip_view(side: int = 224, shape: str = "short side") -> View:
    """The view of OpenAI's package; with the shape 'short side, floor' that of transformers."""
    return View((Resize(side, "bicubic", "pillow", shape),), **_CLIP)
