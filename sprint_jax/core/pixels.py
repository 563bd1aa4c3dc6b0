"""Pictures between files and networks: bytes, the sizes of 1024-pixel models, resizing, decoding in batches."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from .errors import UserError

Array = jax.Array

# (height, width) of the published 1024-pixel models, about a megapixel each, from wide to tall
# (diffusers' ASPECT_RATIO_1024_BIN).
SIZES_1024 = (
    ((512, 2048), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536))
    + ((704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152))
    + ((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960))
    + ((1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704))
    + ((1472, 704), (1536, 640), (1600, 640), (1728, 576), (2048, 512))
)

# A DC-AE takes about 1.3 GiB for a megapixel in float32, half of that in bfloat16.
AT_ONCE = 2**21  # pixels: two pictures of 1024 x 1024


def to_bytes(pixels: np.ndarray | Array) -> np.ndarray | Array:
    """Returns pixels in [-1, 1] of any shape as uint8 0..255, rounded; on the device where they are."""
    return _round_on_device(pixels) if isinstance(pixels, Array) else _round(pixels, np)


def _round(pixels: Any, xp: Any) -> Any:
    return xp.rint((xp.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)


@jax.jit
def _round_on_device(pixels: Array) -> Array:
    return _round(pixels, jnp)


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]] = SIZES_1024):
    """Returns the (height, width) of ``sizes`` whose aspect ratio, to two decimals, is nearest."""
    return min(sizes, key=lambda size: abs(round(size[0] / size[1], 2) - height / width))


def resize_and_crop(pixels: Array, height: int, width: int) -> Array:
    """Scales [B, H, W, C] bilinearly to cover height x width and cuts out the middle."""
    old = pixels.shape[1:3]
    if old == (height, width):
        return pixels
    ratio = max(height / old[0], width / old[1])
    new = (int(old[0] * ratio), int(old[1] * ratio))
    shape = (pixels.shape[0], *new, pixels.shape[3])
    pixels = jax.image.resize(pixels, shape, "linear", antialias=False)
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def to_pixels(
    images: Image.Image | np.ndarray | Sequence, count: int, height: int, width: int
) -> np.ndarray:
    """Returns images to start from as float32 pixels [count, height, width, 3] in [-1, 1], read-only.

    Args:
      images: one image for all, or one for each of ``count`` pictures; see `to_rows`.

    Raises:
      UserError: another number of images, or as `to_rows`.
    """
    rows = to_rows(images, height, width, count)
    rows = rows.astype(np.float32) / 127.5 - 1
    return np.broadcast_to(rows, (count, *rows.shape[1:]))


def to_rows(
    images: Image.Image | np.ndarray | Sequence,
    height: int,
    width: int,
    count: int | None = None,
) -> np.ndarray:
    """Returns one image or several as uint8 [n, height, width, 3].

    Args:
      images: PIL images of any size and mode are resized (Lanczos); arrays are uint8 [H, W, 3] and treated
        alike.
      count: of pictures, for which there must be one image, or one each; None: any number will do.

    Raises:
      UserError: another number of images, or arrays of another shape or dtype.
    """
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    if len(images) not in (1, count) and (count is not None or not len(images)):
        pictures = "" if count is None else f" for {count} pictures"
        raise UserError(f"{len(images)} images{pictures}: give one, or one for each")
    return np.stack([_read(image, height, width) for image in images])


def _read(image: Image.Image | np.ndarray, height: int, width: int) -> np.ndarray:
    if not isinstance(image, Image.Image):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise UserError(
                f"an image is {image.dtype} {image.shape}: give uint8 [H, W, 3], or a PIL image"
            )
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image)


def batch_rows(count: int, most: int) -> list[np.ndarray]:
    """Cuts rows 0 ... count - 1 into batches of one size, filled up with the last row.

    The size is ``most``, or a smaller power of two that holds all, so that few programs do for any number.
    """
    size = min(most, 1 << (count - 1).bit_length())
    starts = range(0, count, size)
    return [np.minimum(np.arange(start, start + size), count - 1) for start in starts]


def map_pictures(function: Callable, rows: Any, pixels: int, at_once: int = AT_ONCE) -> list:
    """Applies a function to rows [B, ...], as many together as have ``at_once`` pixels, at least one.

    Args:
      pixels: of one row's picture.

    Returns:
      The results; their rows together are those of ``rows``.
    """
    batches = batch_rows(len(rows), max(1, at_once // pixels))
    if len(batches) == 1 and len(batches[0]) == len(rows):
        return [function(rows)]  # neither taken apart nor put together, which are programs, too
    return [function(rows[batch])[: batch[-1] - batch[0] + 1] for batch in batches]


def decode_bytes(
    autoencoder: Any, latents: Any, finish: Callable | None = None, at_once: int = AT_ONCE
) -> np.ndarray:
    """Decodes latents [B, h, w, C] to uint8 pictures [B, H, W, 3] in the host's memory.

    Bytes are made where pixels are. Memory on the device is that of ``at_once`` pixels, whatever B is.

    Args:
      autoencoder: of `SprintPipeline`; one program where it has ``decode_to_bytes(latents)``.
      finish: changes pixels [b, H, W, 3] before they are rounded.
    """
    to_bytes_at_once = getattr(autoencoder, "decode_to_bytes", None)

    def decode(rows):
        if to_bytes_at_once and not finish:
            return np.asarray(to_bytes_at_once(rows))
        pixels = autoencoder.decode(rows)
        return np.asarray(to_bytes(finish(pixels) if finish else pixels))

    area = latents.shape[1] * latents.shape[2] * autoencoder.factor**2
    parts = map_pictures(decode, latents, area, at_once)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
