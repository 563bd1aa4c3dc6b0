"""Encoders of pictures and captions, which make latents and text features before a training or during it.

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

from ..checkpoints.locate import locate
from ..core.errors import UserError
from ..core.fingerprint import digest, fingerprint
from ..core.pixels import decode_bytes
from ..interop.diffusers import STEM, load_autoencoder, read_autoencoder
from ..interop.gemma2 import load_text_encoder
from ..models.dc_ae import AutoencoderDC
from ..parallel.sharding import batch_sharding, batch_ways, state_shardings
from .autoencoder import Autoencoder
from .conditions import Conditions
from .text import STYLES, PromptTokenizer, TextEncoder, load_tokenizer

Array = jax.Array
BESIDE_TRAINING = 2**20  # pixels that are decoded at once where a run has most of the memory
# The files of a pipeline on the hub, without its transformer.
FILES = [
    f"{part}/*{end}"
    for part in ("vae", "text_encoder", "tokenizer")
    for end in (".json", ".safetensors")
]


# Of an autoencoder, or of the one of a pipeline; in these patterns a star is for folders too.
AUTOENCODER_FILES = [
    f"{part}{name}" for part in ("", "vae/") for name in ("config.json", f"{STEM}*.safetensors*")
]


class Encoders(NamedTuple):
    """An autoencoder and a text encoder with the interfaces of `SprintPipeline`'s.

    ``identity`` is JSON-able and holds everything that their numbers depend on: kinds, configs, hashes of
    weights and of the tokenizer, the instruction, length and scaling. ``sharding`` is that of batches, None
    for one device. ``conditions`` make maps of pictures for a control branch, if there is one; their identity
    is their own.
    """

    autoencoder: Any
    text_encoder: Any
    identity: dict[str, Any]
    sharding: jax.sharding.Sharding | None = None
    conditions: Conditions | None = None


def load_encoders(
    path: str,
    dtype: Any,
    mesh: jax.sharding.Mesh | None = None,
    *,
    text_batch_size: int = 64,
    style: str = "diffusers",
    autoencoder: str | Path | None = None,
    int8: bool = False,
) -> Encoders:
    """Loads the encoders of a pipeline, without its transformer.

    Args:
      path: a pipeline folder of diffusers with ``vae``, ``text_encoder`` and ``tokenizer``, or the id of one
        on the hub, of which only these are downloaded; 'digits' or '' for those of the digits world.
      dtype: of parameters and matmuls.
      mesh: of this host's devices, over which batches, and by its axes parameters, are split.
      text_batch_size: captions at once.
      style: how captions are put, of `text.STYLES`.
      autoencoder: another one for the same latents, see `open_autoencoder`.
      int8: the text encoder's layers in eight bits.

    Raises:
      UserError: no pipeline is there, a part is missing or damaged, or a batch cannot be split.
    """
    sharding = shardings = None
    if mesh is not None:
        if text_batch_size % batch_ways(mesh):
            split = f"split over {batch_ways(mesh)} devices"
            raise UserError(f"{text_batch_size} captions at once cannot be {split}", 2)
        sharding = batch_sharding(mesh)
        shardings = functools.partial(state_shardings, mesh)
    if path in ("", "digits"):
        if autoencoder is not None:
            raise UserError(f"--autoencoder {autoencoder} is of no use for digits: leave it out", 2)
        return _digits_encoders(sharding)
    if style not in STYLES:
        raise UserError(f"data.prompt_style '{style}' is not one of {', '.join(STYLES)}", 2)
    folder = _locate(path, FILES)
    tokenizer = load_tokenizer(folder / "tokenizer")
    autoencoder = open_autoencoder(folder / "vae", dtype, shardings, autoencoder)
    how = dict(batch_size=text_batch_size, sharding=sharding, int8=int8, **STYLES[style])
    text_encoder = open_text_encoder(folder, tokenizer, dtype, shardings, **how)
    identity = identify(autoencoder, text_encoder)
    return Encoders(autoencoder, text_encoder, identity, sharding)


def load_decoder(
    path: str, dtype: Any, made: dict[str, Any], cache: Path
) -> Callable[[Any], np.ndarray]:
    """Loads the decoder of an autoencoder, and no more, for pictures of samples during a training.

    Its weights stay in the host's memory, and are on a device while it decodes. Process 0 finds and reads them
    at once, others when they decode first: hosts that draw no pictures download nothing.

    Args:
      path, dtype: as of `load_encoders`.
      made: the identity of the autoencoder that made the latents in the folder ``cache``.

    Returns:
      ``decode(latents [B, h, w, C]) -> pictures``, uint8 [B, H, W, 3] (`pixels.decode_bytes`).

    Raises:
      UserError: as `load_encoders`; or this is another autoencoder.
    """

    @functools.cache
    def autoencoder():
        folder = None
        if path in ("", "digits"):
            found = _digits_encoders(None).identity["autoencoder"]
        else:
            folder = _locate(path, [name for name in FILES if name.startswith("vae/")]) / "vae"
            found = _identify_autoencoder(read_autoencoder(folder))
        if found | {"params": None} != made | {"params": None}:
            raise UserError(
                f"config.data.encoders={path} has not the autoencoder that made {cache}"
            )
        if folder is None:
            return _digits_encoders(None).autoencoder
        config, params = load_autoencoder(folder, dtype)
        config = dataclasses.replace(config, dtype=jnp.dtype(dtype))
        # A copy: on CPU an array of NumPy would be a view that keeps the device's.
        return Autoencoder(config, {"decoder": jax.tree.map(np.array, params["decoder"])})

    if jax.process_index() == 0:
        autoencoder()
    return lambda latents: decode_bytes(autoencoder(), latents, at_once=BESIDE_TRAINING)


def _locate(path: str, files: Sequence[str]) -> Path:
    try:
        return locate(path, ("pipeline",), files).path
    except UserError as error:
        raise UserError(f"data.encoders {error}") from error


def latent_size(c: Any) -> tuple[int, int]:
    """Returns the default height and width of latents for a training's config ``c``."""
    if c.data.source != "digits":
        return c.model.sample_size, c.model.sample_size
    # Imported here, so that other models load without the digits world.
    from ..digits.encoders import digits_parts

    autoencoder, _, (height, width) = digits_parts(c.data.world)
    return height // autoencoder.factor, width // autoencoder.factor


def open_autoencoder(
    folder: Path,
    dtype: Any,
    shardings: Callable | None = None,
    other: str | Path | None = None,
) -> Autoencoder:
    """Loads an autoencoder of diffusers, or another one for the same latents, such as DC-AE-Lite.

    Args:
      dtype: of its parameters and matmuls.
      other: in place of ``folder``, a folder of diffusers' AutoencoderDC or of a pipeline, or a hub id of one.

    Raises:
      UserError: there is none, it is damaged, or the latents of ``other`` are not those of ``folder``.
    """
    folder = folder if other is None else _find_other(other, read_autoencoder(folder))
    config, params = load_autoencoder(folder, dtype, shardings=shardings)
    config = dataclasses.replace(config, dtype=jnp.dtype(dtype))
    arranged = jax.default_backend() == "gpu" and shardings is None
    return Autoencoder(config, params, arranged=arranged)


def _find_other(path: str | Path, own: AutoencoderDC) -> Path:
    """The folder of another autoencoder for the latents of ``own``."""
    kind, folder = locate(path, ("pipeline", "transformer"), AUTOENCODER_FILES)
    folder = folder / "vae" if kind == "pipeline" else folder
    found = read_autoencoder(folder)
    for name in ("factor", "latent_channels", "scaling_factor"):
        values = getattr(found, name), getattr(own, name)
        if values[0] != values[1]:
            raise UserError(
                f"{folder}/config.json: {name} is {values[0]}, but {values[1]} for the latents of the network"
            )
    return folder


def open_text_encoder(
    folder: Path,
    tokenizer: PromptTokenizer,
    dtype: Any,
    shardings: Callable | None,
    *,
    on_host: bool = False,
    int8: bool = False,
    **how,
) -> TextEncoder:
    """Loads the text encoder in ``text_encoder`` of a folder; ``how`` are arguments of `TextEncoder`.

    ``on_host`` leaves its parameters in the host's memory, from the files on.
    """
    arranged = int8 or (jax.default_backend() == "gpu" and shardings is None)
    # From the host's memory layers go to the device one by one, and are there once, as in `artifacts.loading`.
    where = dict(shardings=shardings, on_host=on_host or arranged)
    gemma, params = load_text_encoder(folder / "text_encoder", dtype, **where)
    how |= dict(arranged=arranged, on_host=on_host, int8=int8)
    return TextEncoder(gemma, params, tokenizer, **how)


def identify(autoencoder: Any, text_encoder: Any) -> dict[str, Any]:
    """Returns the identity of `Encoders` of an autoencoder and a text encoder, as a pipeline has them."""
    if not isinstance(text_encoder, TextEncoder):
        return _digits_encoders(None).identity
    words = text_encoder.tokenizer.tokenizer.to_str().encode()
    instruction = text_encoder.instruction or ""
    return {
        "autoencoder": {
            **_identify_autoencoder(autoencoder.config),
            "params": fingerprint(autoencoder.params),
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


def style_of(identity: dict[str, Any]) -> str | None:
    """The name in `text.STYLES` of how captions were put for an identity; None if it is none of them."""
    made = identity["text_encoder"]
    put = {key: made.get(key) for key in ("instruction", "lower")}
    return next((name for name, style in STYLES.items() if style == put), None)


def _identify_autoencoder(config: AutoencoderDC) -> dict[str, Any]:
    return {
        "kind": type(config).__name__,
        "config": _config_digest(config),
        "factor": config.factor,
        "channels": config.latent_channels,
        "scaling_factor": config.scaling_factor,
    }


def _config_digest(module: Any) -> str:
    fields = dataclasses.asdict(module)
    return digest({name: str(fields[name]) for name in sorted(fields) if name != "dtype"})


def _digits_encoders(sharding: jax.sharding.Sharding | None) -> Encoders:
    from ..digits.captions import vocabulary
    from ..digits.encoders import SpaceToDepth, WordEncoder

    autoencoder, text_encoder = SpaceToDepth(), WordEncoder()
    factor, scaling = autoencoder.factor, autoencoder.scaling_factor
    blocks = {"factor": factor, "channels": 3 * factor**2, "scaling_factor": scaling}
    words = {
        "params": fingerprint(text_encoder.encode(vocabulary())),
        "length": text_encoder.length,
    }
    identity = {
        "autoencoder": {"kind": "SpaceToDepth"} | blocks,
        "text_encoder": {"kind": "WordEncoder"} | words,
    }
    return Encoders(autoencoder, text_encoder, identity, sharding)


def encode_images(
    autoencoder: Any, images: np.ndarray, sharding: jax.sharding.Sharding | None = None
) -> Array:
    """Encodes pictures of one size.

    Args:
      autoencoder: of `Encoders`.
      images: uint8 [B, H, W, 3]; H and W are multiples of the autoencoder's factor.
      sharding: of the batch over devices.

    Returns:
      latents [B, h, w, C] float32, times the scaling factor; on the devices, which may still compute them.
    """
    return autoencoder.encode(_to_pixels(jax.device_put(images, sharding)))


def encode_conditions(
    encoders: Encoders,
    images: np.ndarray,
    variants: Sequence[np.ndarray],
    maps: np.ndarray | None = None,
) -> list[Array]:
    """Encodes the maps of pictures of one size, one batch for each of ``variants``; see `Conditions.draw`.

    Returns:
      Latents of `encode_images`, in a list.
    """
    drawn = encoders.conditions.draw(images, variants, maps)
    return [encode_images(encoders.autoencoder, each, encoders.sharding) for each in drawn]


@jax.jit
def _to_pixels(images: Array) -> Array:
    """Converts uint8 0..255 to float32 [-1, 1] on the devices, since bytes are sent there faster."""
    return images.astype(jnp.float32) / 127.5 - 1


def encode_captions(text_encoder: Any, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes captions to text [B, L, D] float32 and mask [B, L] int32; masked features have no use.

    A caption without words is the null prompt of guidance and caption dropout, without the instruction.
    """
    empty = np.array([not caption.strip() for caption in captions])
    if empty.all():
        return text_encoder.encode_plain(["" for _ in captions])
    # Any other caption in the place of the empty ones keeps the batches the same for any number of them.
    words = next(caption for caption in captions if caption.strip())
    filled = [caption if caption.strip() else words for caption in captions]
    text, mask = text_encoder.encode(filled)
    if empty.any():
        text, mask = np.array(text), np.array(mask)
        null_text, null_mask = text_encoder.encode_plain([""])
        text[empty], mask[empty] = null_text[0], null_mask[0]
    return text, mask
