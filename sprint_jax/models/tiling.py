"""Encoding and decoding by overlapping tiles, for pictures whose activations exceed the memory."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Overlapping tiles, blended as diffusers does.

    Attention sees only one tile, so the result differs from that of the whole picture.

    Attributes:
      size: side of a tile in pixels; smaller pictures are not cut.
      stride: distance of tiles in pixels; overlaps are blended linearly.
    """

    size: int = 512
    stride: int = 448

    def encode(self, encode: Callable, pixels: Array, factor: int) -> Array:
        """``encode`` [B,H,W,3] -> [B,H/f,W/f,C] by tiles; sides are multiples of the factor."""
        return self._map(encode, pixels, (self.size, self.stride), factor, 1)

    def decode(self, decode: Callable, latents: Array, factor: int) -> Array:
        """``decode`` [B,h,w,C] -> [B,f h,f w,3] by tiles."""
        return self._map(decode, latents, (self.size // factor, self.stride // factor), 1, factor)

    def _map(self, apply, x, cut, shrink, grow):
        size, stride = cut
        height, width = x.shape[1:3]
        if height <= size and width <= size:
            return apply(x)
        out_stride = stride * grow // shrink
        overlap = (size - stride) * grow // shrink
        rows = []
        for top in range(0, height, stride):
            row = []
            for left in range(0, width, stride):
                tile = apply(x[:, top : top + size, left : left + size])
                # Neighbours are blended already; the order is part of the result.
                if rows:
                    tile = blend(rows[-1][len(row)], tile, overlap, axis=1)
                if row:
                    tile = blend(row[-1], tile, overlap, axis=2)
                row.append(tile)
            rows.append(row)
        rows = [
            jnp.concatenate([tile[:, :out_stride, :out_stride] for tile in row], axis=2)
            for row in rows
        ]
        return jnp.concatenate(rows, axis=1)


def blend(before: Array, tile: Array, extent: int, axis: int) -> Array:
    """``tile`` with its first ``extent`` rows (axis 1) or columns (2) faded in from the end of ``before``."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    shape = [1] * tile.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent) / extent).reshape(shape)
    start, rest = jnp.split(tile, [extent], axis=axis)
    tail = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    return jnp.concatenate([tail * (1 - weight) + start * weight, rest], axis=axis)
