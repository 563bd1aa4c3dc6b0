"""Latents and text features of noise, in any shape: to measure a training step, or to plan one."""

from collections.abc import Iterable

import numpy as np

LENGTH = 1 << 20  # records; each is a function of (seed, number)


def draw_batch(
    seed: int,
    numbers: Iterable[int],
    shape: tuple[int, int, int],
    text_shape: tuple[int, int],
    control: bool = False,
) -> dict[str, np.ndarray]:
    """Draws records that look like encoded images and captions.

    Args:
      seed: 0 <= seed < 2**32; numbers: of B records.
      shape: of the latents (h, w, C); text_shape: (L, D) of a caption's features.
      control: whether there are latents of conditions.

    Returns:
      latents and control [B, h, w, C] and text [B, L, D], float32, N(0, 1); mask [B, L] int32, which keeps 1
      to L tokens.
    """
    latents, text, mask, conditions = [], [], [], []
    for number in numbers:
        random = np.random.default_rng((seed, int(number)))
        latents.append(random.standard_normal(shape, np.float32))
        text.append(random.standard_normal(text_shape, np.float32))
        mask.append(np.arange(text_shape[0]) < random.integers(1, text_shape[0] + 1))
        if control:
            conditions.append(random.standard_normal(shape, np.float32))
    batch = {"latents": np.stack(latents), "text": np.stack(text), "mask": np.array(mask, np.int32)}
    return batch | ({"control": np.stack(conditions)} if control else {})
