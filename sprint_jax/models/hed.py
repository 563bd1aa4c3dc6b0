"""HED: holistically nested edge detection (arXiv 1504.06375), from pictures to soft edges; channels-last.

A VGG-16 without its head, and a logit map of each of its five blocks, from fine to coarse. Names are those of
``ControlNetHED.pth`` (`interop.hed`), which the published control branches of SANA were trained with.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .convolution import Conv3x3
from .layers import Linear, wide

Array = jax.Array

SMALLEST = 16  # pixels along a side: four halvings leave one


class Block(nn.Module):
    """Convolutions with ReLU, and a 1x1 projection of the last one to a logit map [B, h, w, 1]."""

    features: int
    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        for i in range(self.depth):
            x = nn.relu(Conv3x3(self.features, self.dtype, name=f"convs_{i}")(x))
        return x, Linear(1, dtype=self.dtype, name="projection")(x)


class HED(nn.Module):
    """Pictures [B, H, W, 3], RGB in 0..255, to logits of edges [B, H, W] float32.

    The parameter ``norm`` is subtracted from the pictures. Logit maps are scaled to H x W bilinearly, and
    their mean is taken.

    Attributes:
      features, depths: of the blocks; by default the published ones.
      fused: True for weights of BSDS500: a 1x1 convolution in the mean's place, and sides that are odd are
        rounded up where a block halves them, not down.
      dtype: of the convolutions.
    """

    features: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    fused: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pictures: Array) -> Array:
        norm = self.param("norm", nn.initializers.zeros, (3,))
        x = (pictures.astype(jnp.float32) - norm[None, None, None]).astype(self.dtype)
        shape, maps = (*pictures.shape[:3], 1), []
        for number, (features, depth) in enumerate(zip(self.features, self.depths, strict=True), 1):
            if number > 1:
                x = nn.max_pool(x, (2, 2), (2, 2), "SAME" if self.fused else "VALID")
            x, logits = Block(features, depth, self.dtype, name=f"block{number}")(x)
            # Between the centres of pixels, and the nearest one beyond the last: as OpenCV, torch and TF.
            maps.append(jax.image.resize(wide(logits), shape, "linear", antialias=False))
        maps = jnp.concatenate(maps, -1)
        if self.fused:
            return Linear(1, name="fuse")(maps)[..., 0]
        return maps.mean(-1)


def to_edges(logits: Array) -> Array:
    """Logits of edges to uint8 0..255, rounded down as the published annotator does."""
    return (255 * nn.sigmoid(wide(logits))).astype(jnp.uint8)
