"""An autoencoder with its parameters, for the pipeline; `digits.encoders.SpaceToDepth` is another."""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.pixels import map_pictures, to_bytes
from ..models.dc_ae import AutoencoderDC
from ..models.inference.decoder import decode, prepare
from ..models.inference.operations import arrange
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
      arranged: decode by the form that is made for GPUs (`models.inference.decoder`), whose weights are
        arranged here, once; the decoder's plain ones then lie in the host's memory.

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
        arranged: bool = False,
    ):
        self.config, self.params, self.tile, self.whole = config, params, tile, whole
        self.factor, self.channels = config.factor, config.latent_channels
        self._encode, self._decoder, form = jax.jit(config.encode), params, config.decode
        if arranged:
            arranger = functools.partial(prepare, config)
            self._decoder, kept = arrange(arranger, params["decoder"])
            self.params = params | {"decoder": kept}
            form = functools.partial(decode, config)
        self._decode = jax.jit(form)
        self._decode_to_bytes = jax.jit(lambda params, latents: to_bytes(form(params, latents)))

    def encode(self, pixels: Array) -> Array:
        """Pixels [B, H, W, 3] in [-1, 1] to latents [B, H/f, W/f, C], float32."""
        encode = functools.partial(self._encode, self.params)
        if pixels.shape[1] * pixels.shape[2] <= self.whole:
            return encode(pixels)
        return self.tile.encode(encode, pixels, self.factor)

    def decode(self, latents: Array) -> Array:
        """Latents [B, h, w, C] to pixels [B, f h, f w, 3], float32, not clamped."""
        decode = functools.partial(self._decode, self._decoder)
        if latents.shape[1] * latents.shape[2] * self.factor**2 <= self.whole:
            return decode(latents)
        return self.tile.decode(decode, latents, self.factor)

    def decode_to_bytes(self, latents: Array) -> Array:
        """`decode`, then `pixels.to_bytes`, as one program for pictures that are not cut."""
        if latents.shape[1] * latents.shape[2] * self.factor**2 <= self.whole:
            return self._decode_to_bytes(self._decoder, latents)
        return to_bytes(self.decode(latents))


class Remembered:
    """Latents of pictures, made once and remembered by content: conditions outlive prompts, seeds and steps.

    Args:
      autoencoder: has ``encode(pixels) -> latents``, an `Autoencoder` for instance.
      most: pictures whose latents are kept, those that were used last.
    """

    def __init__(self, autoencoder: Any, most: int = 64):
        self.autoencoder, self.most = autoencoder, most
        self._latents: dict[bytes, Array] = {}

    def encode(self, pictures: np.ndarray) -> Array:
        """Pictures uint8 [n, H, W, 3] to latents [n, h, w, C]; those that are new are encoded together."""
        size = str(pictures.shape[1:]).encode()
        keys = [hashlib.sha256(size + picture.tobytes()).digest() for picture in pictures]
        new = {key: i for i, key in enumerate(keys) if key not in self._latents}
        if new:
            pixels = pictures[list(new.values())].astype(np.float32) / 127.5 - 1
            area = pictures.shape[1] * pictures.shape[2]
            parts = map_pictures(self.autoencoder.encode, pixels, area)
            self._latents |= zip(new, jnp.concatenate(parts), strict=True)
        found = [self._latents[key] for key in keys]
        for key in keys:
            self._latents[key] = self._latents.pop(key)  # what was used last is the last to go
        for key in list(self._latents)[: -self.most]:
            del self._latents[key]
        return jnp.stack(found)
