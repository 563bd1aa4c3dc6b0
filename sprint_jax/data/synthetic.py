"""Latents and text features of noise, in any shape: to measure a training step, or to plan one."""

import numpy as np

LENGTH = 1 << 20  # records; each is a function of (seed, number)


def draw_record(
    seed: int, number: int, shape: tuple[int, int, int], text_shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Draws a record that looks like an encoded image and its caption.

    Args:
      seed: 0 <= seed < 2**32.
      shape: of the latents (h, w, C), N(0, 1); text_shape: (L, D) of the caption's features.

    Returns:
      latents [h, w, C] and text [L, D] float32; mask [L] int32, which keeps 1 to L tokens.
    """
    random = np.random.default_rng((seed, number))
    length = text_shape[0]
    return {
        "latents": random.standard_normal(shape, np.float32),
        "text": random.standard_normal(text_shape, np.float32),
        "mask": (np.arange(length) < random.integers(1, length + 1)).astype(np.int32),
    }


def draw_batch(
    seed: int, numbers, shape: tuple[int, int, int], text_shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Draws the records of these numbers as a batch; see `draw_record`."""
    records = [draw_record(seed, int(number), shape, text_shape) for number in numbers]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
