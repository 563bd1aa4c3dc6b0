"""An autoencoder with its parameters, for the pipeline; `digits.encoders.SpaceToDepth` is another."""

import functools
from typing import Any

import jax

from ..models.dc_ae import AutoencoderDC
from ..models.tiling import Tiling

Array = jax.Array

# The most pixels of a picture that is not cut: a larger one would take tens of GiB.
WHOLE = 2**22
TILE = Tiling(1024, 896)


class Autoencoder:
    """A DC-AE and its parameters; compiled once for each shape.

    Args:
      config: the autoencoder; its ``dtype`` is that of the matmuls.
      params: of it, on any devices or in the host's memory, from where each call sends them; a half that is
        not used may be missing.
      tile: cuts pictures of more than ``whole`` pixels into tiles.
      whole: the most pixels of a picture that is not cut.

    Attributes:
      factor: pixels per latent, along each side.
      channels: of latents.
    """

    def __init__(
        self,
        config: AutoencoderDC,
        params: Any,
        tile: Tiling = TILE,
        whole: int = WHOLE,
    ):
        self.config, self.params, self.tile, self.whole = config, params, tile, whole
        self.factor, self.channels = config.factor, config.latent_channels
        self._encode, self._decode = jax.jit(config.encode), jax.jit(config.decode)

    def encode(self, pixels: Array) -> Array:
        """Pixels [B, H, W, 3] in [-1, 1] to latents [B, H/f, W/f, C], float32."""
        encode = functools.partial(self._encode, self.params)
        if pixels.shape[1] * pixels.shape[2] <= self.whole:
            return encode(pixels)
        return self.tile.encode(encode, pixels, self.factor)

    def decode(self, latents: Array) -> Array:
        """Latents [B, h, w, C] to pixels [B, f h, f w, 3], float32, not clamped."""
        decode = functools.partial(self._decode, self.params)
        if latents.shape[1] * latents.shape[2] * self.factor**2 <= self.whole:
            return decode(latents)
        return self.tile.decode(decode, latents, self.factor)
