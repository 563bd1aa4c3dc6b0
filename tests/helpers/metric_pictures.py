"""Pictures and weights for the tests of metrics, the same wherever they are made."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_pictures(count: int, seed: int, low: int = 16, high: int = 190) -> list[np.ndarray]:
    """Makes uint8 pictures [H, W, 3] of odd sizes: blocks of colour, a slope and noise."""
    random = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        height, width = random.integers(low, high, 2)
        blocks = random.uniform(0, 255, (4, 5, 3))
        rows, columns = np.arange(height) * 4 // height, np.arange(width) * 5 // width
        slope = np.linspace(-60, 60, width)[None, :, None]
        noise = random.normal(0, 25, (height, width, 3))
        pictures.append((blocks[rows][:, columns] + slope + noise).clip(0, 255).astype(np.uint8))
    return pictures


def two_sets() -> list[list[np.ndarray]]:
    """Makes 66 pictures and 66 others that are a little darker, all of one size."""
    first, second = (make_pictures(66, seed, 48, 49) for seed in (4, 5))
    return [first, [(0.9 * picture).astype(np.uint8) for picture in second]]


def write_pictures(folder: Path, pictures: list[np.ndarray]) -> Path:
    """Writes 00000.png ... and returns the folder."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:05d}.png", compress_level=1)
    return folder


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Draws a float32 tensor for each name, such that activations neither die nor explode."""
    random, tensors = np.random.default_rng(seed), {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.endswith("running_var"):
            value = random.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            near = 0.8 if name.endswith("bn.weight") else 0.0
            value = near + random.uniform(-0.1, 0.1, shape)
        else:
            value = random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        tensors[name] = value.astype(np.float32)
    return tensors
