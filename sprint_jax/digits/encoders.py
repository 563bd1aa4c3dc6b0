"""Stand-ins for the text encoder and the autoencoder in the digits world, with their interfaces.

Neither is trained or has parameters to store: both are functions of a few numbers.
"""

import dataclasses
import difflib
from collections.abc import Sequence

import chex
import numpy as np
from einops import rearrange

from ..core.errors import UserError
from .captions import COLORS, DIGITS, vocabulary
from .worlds import get_world


class WordEncoder:
    """Frozen random word embeddings, each in the context of the words before it, in place of Gemma-2.

    The state after word k is ``state_k = 0.5 P state_{k-1} + sqrt(0.75) word_k`` with a fixed
    permutation P of the features, and its token ``sqrt(0.84) state_k + 0.4 position_k``. Words and
    positions are drawn from N(0, 1), so a feature has unit variance. As with a causal language model, the
    token of a digit holds the colour before it: SANA projects each text token alone, and cross-attention
    does not see the order of tokens. Words of a kind (colours, digits) share 0.3 of their variance, and a
    plural is its noun and a second token.

    The shares of a token's variance decide how soon a network follows captions: with a sixth for the digit
    and half for the position, teachers drew clean pictures of arbitrary digits for three times as many
    updates.

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
            raise UserError(f"captions must be a list of sentences, not the sentence {captions!r}")
        rows, mask = np.zeros((2, len(captions), self.length), np.int32)
        for caption, row, kept in zip(captions, rows, mask, strict=True):
            tokens = [row for word in caption.split() for row in self._tokens(word, caption)]
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
        """The same as `encode`: no instruction stands before captions here."""
        return self.encode(captions)

    def _tokens(self, word: str, caption: str) -> list[int]:
        """Rows of a word: one, or two of a plural that is not in the vocabulary (its noun and ``s``)."""
        if word in self._rows:
            return [self._rows[word]]
        if word[-1] == "s" and word[:-1] in self._rows:
            return [self._rows[word[:-1]], self._rows["s"]]
        nearest = difflib.get_close_matches(word, self._rows, n=1, cutoff=0)[0]
        raise UserError(
            f"word {word[:40]!r} of caption {caption[:80]!r} is unknown: the nearest known is {nearest!r}"
        )


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
        """Pixels [B,H,W,3] in [-1,1] to latents [B,H/f,W/f,3f^2]; NumPy or JAX, dtype kept."""
        chex.assert_shape(pixels, (None, None, None, 3))
        sides = dict(y=self.factor, x=self.factor)
        return rearrange(pixels, "b (h y) (w x) c -> b h w (y x c)", **sides) * self.scaling_factor

    def decode(self, latents):
        """Latents [B,h,w,3f^2] to pixels [B,fh,fw,3], not clamped; the inverse of `encode`."""
        chex.assert_shape(latents, (None, None, None, 3 * self.factor**2))
        sides = dict(y=self.factor, x=self.factor)
        return rearrange(latents, "b h w (y x c) -> b (h y) (w x) c", **sides) / self.scaling_factor


def digits_parts(world: str) -> tuple[SpaceToDepth, WordEncoder, tuple[int, int]]:
    """Returns autoencoder, text encoder and picture size (height, width) of a digits world."""
    return SpaceToDepth(), WordEncoder(), get_world(world).size
