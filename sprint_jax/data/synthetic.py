"""Latents and text features of noise, in any shape: to measure a training step, or to plan one."""

import dataclasses

import numpy as np

LENGTH = 1 << 20  # records in the source; each is a function of (seed, number)


@dataclasses.dataclass(frozen=True)
class SyntheticLatents:
    """A random-access source of training records that look like encoded pictures and captions.

    Fields:
      seed: 0 <= seed < 2**32.
      shape: of one latent (h, w, C), N(0, 1).
      text_shape: (L, D) of one caption's features; a record keeps between 1 and L tokens.
    """

    seed: int
    shape: tuple[int, int, int]
    text_shape: tuple[int, int]

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Latents [h, w, C] and text [L, D] float32, mask [L] int32."""
        random = np.random.default_rng((self.seed, index))
        length = self.text_shape[0]
        return {
            "latents": random.standard_normal(self.shape, np.float32),
            "text": random.standard_normal(self.text_shape, np.float32),
            "mask": (np.arange(length) < random.integers(1, length + 1)).astype(np.int32),
        }

    @property
    def null_text(self) -> np.ndarray:
        return np.zeros(self.text_shape, np.float32)

    @property
    def null_mask(self) -> np.ndarray:
        return (np.arange(self.text_shape[0]) < 1).astype(np.int32)


def collate(records: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Records of one kind as a batch: every array with a leading axis."""
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
