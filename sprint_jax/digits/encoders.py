"""Stand-ins for the text encoder and the autoencoder in the digits world, with their interfaces.

Neither is trained, and neither has parameters to store: both are functions of a few numbers.
"""

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from sprint_jax.core.errors import UserError
from sprint_jax.digits.captions import COLORS, DIGITS, vocabulary
from sprint_jax.digits.scenes import get_world


class WordEncoder:
    """Frozen random word embeddings, each in the context of the words before it, in place of Gemma-2.

    The state after word k is ``state_k = 0.5 P state_{k-1} + sqrt(0.75) word_k`` with a fixed
    permutation P of the features, and its token ``sqrt(0.84) state_k + 0.4 position_k``. Words and
    positions are drawn from N(0, 1), so a feature has unit variance. As with a causal language model,
    the token of a digit tells the colour said before it, which the transformer could not find out by
    itself: SANA projects each text token alone. Cross-attention, which does not see the order of
    tokens, sees that of words. As there, words of a kind (colours, digits) are alike, with 0.3 of their
    variance in common, and a plural is its noun and a second token.

    What a token is made of decides how soon a network follows captions: where only a sixth of its
    variance told which digit was meant, half of it the position, teachers drew clean pictures of
    arbitrary digits for three times as many updates.

    Attributes:
      length: tokens L of every caption; the longest caption of the digits world takes 11.
      features: size Ct of a token.
    """

    def __init__(self, length: int = 12, features: int = 64, seed: int = 0):
        self.length = length
        self.features = features
        self._rows = {word: row for row, word in enumerate(vocabulary(), 1)}
        # RandomState, whose stream NumPy has frozen: checkpoints rely on these vectors.
        random = np.random.RandomState(seed)
        positions = random.standard_normal((length, features))
        # Row 0 is the begin token.
        table = random.standard_normal((len(self._rows) + 1, features))
        self._permutation = random.permutation(features)
        for kind in (COLORS, DIGITS):
            common = random.standard_normal(features)
            rows = [self._rows[word] for word in kind]
            table[rows] = np.sqrt(0.3) * common + np.sqrt(0.7) * table[rows]
        self._positions = (0.4 * positions).astype(np.float32)
        self._table = (np.sqrt(0.84) * table).astype(np.float32)

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes captions; words are parted by spaces, and '' is the null prompt (a begin token).

        Returns:
          text [B,L,Ct] float32, zero behind the last word, and mask [B,L] int32, 1 for tokens.

        Raises:
          UserError: a word is unknown, or a caption is too long.
        """
        if isinstance(captions, str):
            raise UserError(
                f"captions must be a list of sentences, not the one sentence {captions!r}"
            )
        rows = np.zeros((len(captions), self.length), np.int32)
        mask = np.zeros((len(captions), self.length), np.int32)
        for caption, row, kept in zip(captions, rows, mask, strict=True):
            tokens = [
                self._row(token, caption) for word in caption.split() for token in self._split(word)
            ]
            if len(tokens) >= self.length:
                raise UserError(
                    f"caption {caption!r} has {len(tokens)} tokens: use at most {self.length - 1}"
                )
            row[1 : 1 + len(tokens)] = tokens
            kept[: 1 + len(tokens)] = 1
        text = self._table[rows]
        for k in range(1, self.length):
            text[:, k] = 0.5 * text[:, k - 1, self._permutation] + np.sqrt(0.75) * text[:, k]
        text = (text + self._positions) * mask[..., None].astype(np.float32)
        return text, mask

    def encode_plain(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`encode`: there is no instruction here that a negative prompt would do without."""
        return self.encode(captions)

    def _split(self, word: str) -> list[str]:
        """The tokens of a word: a plural that is not in the vocabulary is its noun and ``s``."""
        plural = (
            word[-1] == "s" and word not in self._rows and {word[:-1], "s"} <= self._rows.keys()
        )
        return [word[:-1], "s"] if plural else [word]

    def _row(self, word: str, caption: str) -> int:
        row = self._rows.get(word)
        if row is None:
            nearest = difflib.get_close_matches(word, self._rows, n=1, cutoff=0)[0]
            raise UserError(
                f"word {word!r} of caption {caption!r} is unknown: the nearest known is {nearest!r}"
            )
        return row


@dataclasses.dataclass(frozen=True)
class SpaceToDepth:
    """An exact autoencoder that moves blocks of pixels into channels, in place of DC-AE.

    Attributes:
      factor: side of a block; latents are ``factor`` times smaller, with ``3 factor^2`` channels.
      scaling_factor: latents are pixels times this. The default gives the scenes of the digits
        world about unit variance: pixels have standard deviation 0.91 (small) to 0.96 (large).
    """

    factor: int = 2
    scaling_factor: float = 1.06

    def encode(self, pixels):
        """Pixels [B,H,W,3] in [-1,1] to latents [B,H/f,W/f,3f^2]; NumPy or JAX, dtype kept.

        Raises:
          UserError: the shape is not [B,H,W,3] with H and W multiples of the factor.
        """
        f = self.factor
        if pixels.ndim != 4 or pixels.shape[1] % f or pixels.shape[2] % f or pixels.shape[3] != 3:
            raise UserError(
                f"pixels have shape {pixels.shape}: give [B,H,W,3] with H and W multiples of {f}"
            )
        b, height, width, c = pixels.shape
        blocks = pixels.reshape(b, height // f, f, width // f, f, c).transpose(0, 1, 3, 2, 4, 5)
        return blocks.reshape(b, height // f, width // f, f * f * c) * self.scaling_factor

    def decode(self, latents):
        """Latents [B,h,w,3f^2] to pixels [B,fh,fw,3], not clamped; the inverse of `encode`.

        Raises:
          UserError: the shape is not [B,h,w,3f^2].
        """
        f = self.factor
        if latents.ndim != 4 or latents.shape[3] != 3 * f * f:
            raise UserError(f"latents have shape {latents.shape}: give [B,h,w,{3 * f * f}]")
        b, height, width, _ = latents.shape
        blocks = latents.reshape(b, height, width, f, f, 3).transpose(0, 1, 3, 2, 4, 5)
        return blocks.reshape(b, height * f, width * f, 3) / self.scaling_factor


def digits_parts(world: str) -> tuple[SpaceToDepth, WordEncoder, tuple[int, int]]:
    """Autoencoder, text encoder and picture size (height, width) of a digits world."""
    rows, columns = get_world(world).cells
    return SpaceToDepth(), WordEncoder(), (8 * rows, 8 * columns)
