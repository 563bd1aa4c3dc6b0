"""What turns pictures and captions into latents and text features: for `encode`, and as training goes.

Both call `encode_images` and `encode_captions`, so that cached and online numbers are the same.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..core.fingerprint import digest, fingerprint
from ..interop import hub
from ..interop.diffusers import load_autoencoder
from ..interop.gemma2 import load_text_encoder
from ..parallel.sharding import batch_sharding, batch_ways, state_shardings
from .autoencoder import Autoencoder
from .text import PromptTokenizer, TextEncoder, load_tokenizer

Array = jax.Array
# Of a pipeline on the hub.
FILES = [
    f"{part}/{name}"
    for part in ("vae", "text_encoder", "tokenizer")
    for name in ("*.json", "*.safetensors", "tokenizer*")
]


class Encoders(NamedTuple):
    """An autoencoder and a text encoder with the interfaces that `SprintPipeline` asks for.

    ``identity`` is JSON-able and tells what their numbers depend on: kinds, configs, hashes of weights and
    of the tokenizer, the instruction, length and scaling. ``sharding`` is that of batches, None for one
    device.
    """

    autoencoder: Any
    text_encoder: Any
    identity: dict[str, Any]
    sharding: jax.sharding.Sharding | None = None


def load_encoders(
    path: str, dtype: Any, mesh: jax.sharding.Mesh | None = None, *, text_batch_size: int = 64
) -> Encoders:
    """The encoders of a pipeline, without its transformer.

    Args:
      path: a pipeline folder of diffusers with ``vae``, ``text_encoder`` and ``tokenizer``, or the id of
        one on the hub, of which only these are downloaded; 'digits' or nothing: those of the digits world.
      dtype: of parameters and matmuls.
      mesh: of this host's devices, over which batches, and by its axes parameters, are split.
      text_batch_size: captions at once.

    Raises:
      UserError: the path is neither, something in it is missing or damaged, or a batch cannot be split.
    """
    ways = batch_ways(mesh) if mesh is not None else 1
    if text_batch_size % ways:
        raise UserError(
            f"{text_batch_size} captions at once cannot be split over {ways} devices", 2
        )
    sharding = batch_sharding(mesh) if mesh is not None else None
    if path in ("", "digits"):
        return _toy_encoders(sharding)
    folder = Path(path)
    if hub.is_hub_id(path):
        folder = hub.download(path, FILES)
    elif not folder.is_dir():
        raise UserError(f"data.encoders {path} does not exist: give a pipeline folder or a hub id")
    shardings = functools.partial(state_shardings, mesh) if mesh is not None else None
    tokenizer = load_tokenizer(folder / "tokenizer")
    autoencoder = open_autoencoder(folder, dtype, shardings)
    how = dict(batch_size=text_batch_size, sharding=sharding)
    text_encoder = open_text_encoder(folder, tokenizer, dtype, shardings, **how)
    identity = _identify(autoencoder, text_encoder)
    return Encoders(autoencoder, text_encoder, identity, sharding)


def latent_size(c: Any) -> tuple[int, int]:
    """Height and width of the latents that a run's network draws where no size is asked for.

    Args:
      c: a training's config.
    """
    if c.data.source != "digits":
        return c.model.sample_size, c.model.sample_size
    # Imported here, so that other models load without the digits world.
    from ..digits.encoders import digits_parts

    autoencoder, _, (height, width) = digits_parts(c.data.world)
    return height // autoencoder.factor, width // autoencoder.factor


def open_autoencoder(folder: Path, dtype: Any, shardings: Callable | None) -> Autoencoder:
    """The autoencoder in ``vae`` of a pipeline folder; its matmuls are in ``dtype`` as its parameters."""
    config, params = load_autoencoder(folder / "vae", dtype, shardings=shardings)
    return Autoencoder(dataclasses.replace(config, dtype=jnp.dtype(dtype)), params)


def open_text_encoder(
    folder: Path, tokenizer: PromptTokenizer, dtype: Any, shardings: Callable | None, **how
) -> TextEncoder:
    """The text encoder in ``text_encoder`` of a pipeline folder; ``how`` are arguments of TextEncoder."""
    gemma, params = load_text_encoder(folder / "text_encoder", dtype, shardings=shardings)
    return TextEncoder(gemma, params, tokenizer, **how)


def _identify(autoencoder: Autoencoder, text_encoder: TextEncoder) -> dict[str, Any]:
    words = text_encoder.tokenizer.tokenizer.to_str().encode()
    instruction = text_encoder.instruction or ""
    return {
        "autoencoder": {
            "kind": type(autoencoder.config).__name__,
            "config": _config_digest(autoencoder.config),
            "params": fingerprint(autoencoder.params),
            "factor": autoencoder.factor,
            "channels": autoencoder.channels,
            "scaling_factor": autoencoder.config.scaling_factor,
        },
        "text_encoder": {
            "kind": type(text_encoder.gemma).__name__,
            "config": _config_digest(text_encoder.gemma),
            "params": fingerprint(text_encoder.params),
            "tokenizer": hashlib.sha256(words).hexdigest(),
            "instruction_sha256": hashlib.sha256(instruction.encode()).hexdigest(),
            "instruction": instruction,
            "length": text_encoder.length,
            "lower": text_encoder.lower,
        },
    }


def _config_digest(module: Any) -> str:
    fields = dataclasses.asdict(module)
    return digest({name: str(fields[name]) for name in sorted(fields) if name != "dtype"})


def _toy_encoders(sharding: jax.sharding.Sharding | None) -> Encoders:
    from ..digits.captions import vocabulary
    from ..digits.encoders import SpaceToDepth, WordEncoder

    autoencoder, text_encoder = SpaceToDepth(), WordEncoder()
    words = text_encoder.encode(vocabulary())
    factor = autoencoder.factor
    identity = {
        "autoencoder": {
            "kind": "SpaceToDepth",
            "factor": factor,
            "channels": 3 * factor**2,
            "scaling_factor": autoencoder.scaling_factor,
        },
        "text_encoder": {
            "kind": "WordEncoder",
            "params": fingerprint(words),
            "length": text_encoder.length,
        },
    }
    return Encoders(autoencoder, text_encoder, identity, sharding)


def encode_images(
    autoencoder: Any, images: np.ndarray, sharding: jax.sharding.Sharding | None = None
) -> Array:
    """Pictures of one size to latents.

    Args:
      autoencoder: of `Encoders`.
      images: uint8 [B, H, W, 3]; H and W are multiples of the autoencoder's factor.
      sharding: of the batch over devices.

    Returns:
      latents [B, h, w, C] float32, times the scaling factor; still on the devices, perhaps in the making.
    """
    return autoencoder.encode(_to_pixels(jax.device_put(images, sharding)))


@jax.jit
def _to_pixels(images: Array) -> Array:
    """uint8 0..255 to float32 [-1, 1]: on the devices, as bytes are quicker to send there."""
    return images.astype(jnp.float32) / 127.5 - 1


def encode_captions(text_encoder: Any, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Captions to text [B, L, D] float32 and mask [B, L] int32; what is masked means nothing.

    A caption without words is the null prompt, as guidance and caption dropout have it: it goes without the
    instruction.
    """
    empty = np.array([not caption.strip() for caption in captions])
    if empty.all():
        return text_encoder.encode_plain(["" for _ in captions])
    # Words stand in for the empty ones, so that their number does not change the batches.
    words = next(caption for caption in captions if caption.strip())
    text, mask = text_encoder.encode(
        [caption if caption.strip() else words for caption in captions]
    )
    if empty.any():
        text, mask = np.array(text), np.array(mask)
        null_text, null_mask = text_encoder.encode_plain([""])
        text[empty], mask[empty] = null_text[0], null_mask[0]
    return text, mask
