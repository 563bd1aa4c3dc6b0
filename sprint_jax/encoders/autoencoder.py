"""An autoencoder with its parameters, for the pipeline; `digits.encoders.SpaceToDepth` is another."""

from typing import Any

import jax

from ..models.dc_ae import AutoencoderDC
from ..models.tiling import Tiling

Array = jax.Array


class Autoencoder:
    """A DC-AE and its parameters; compiled once for each shape.

    Args:
      config: the autoencoder; its ``dtype`` is that of the matmuls.
      params: of it, on any devices.
      tile: cuts larger pictures into tiles; None never cuts.

    Attributes:
      factor: pixels per latent, along each side.
      channels: of latents.
    """

    def __init__(self, config: AutoencoderDC, params: Any, tile: Tiling | None = None):
        self.config, self.params, self.tile = config, params, tile
        self.factor, self.channels = config.factor, config.latent_channels
        self._encode = jax.jit(config.encode, static_argnames="tile")
        self._decode = jax.jit(config.decode, static_argnames="tile")

    def encode(self, pixels: Array) -> Array:
        """Pixels [B, H, W, 3] in [-1, 1] to latents [B, H/f, W/f, C], float32."""
        return self._encode(self.params, pixels, tile=self.tile)

    def decode(self, latents: Array) -> Array:
        """Latents [B, h, w, C] to pixels [B, f h, f w, 3], float32, not clamped."""
        return self._decode(self.params, latents, tile=self.tile)
