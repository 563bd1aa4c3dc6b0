"""From a config's ``data`` section to batches: the digits world, cached latents, images, or noise."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Config
from ..data.cache import Cache, open_cache
from ..data.digits import get_world, held_out_prompts, open_digits
from ..data.latents import latent_batches, read_rows
from ..data.loader import encode_online, make_batches
from ..data.order import hold_out, make_order
from ..data.synthetic import SyntheticLatents, collate
from ..errors import UserError
from ..models.toy import SpaceToDepth, WordEncoder
from .sharding import local_rows

Batch = dict[str, np.ndarray]
SOURCES = ("digits", "latents", "images", "synthetic")


class Data(NamedTuple):
    """Where batches come from, and what stands between pictures, prompts and the network.

    ``batches(i)`` is this host's rows of global batch ``i``: latents [B, h, w, C], text [B, L, D],
    mask [B, L]. ``shapes`` are those of global batches, one for each bucket, the most frequent first, and
    ``next_of_first(i)`` is the number, i or the next, of a batch of the first. ``null_text`` [L, D] and
    ``null_mask`` [L] are of the empty prompt. ``held_out(count)`` is a batch of records that training does
    not see, whole on this host. ``prompts(count)`` are features of what sample grids show, and ``decode``
    makes pictures of latents; without it there is nothing to look at.
    """

    batches: Callable[[int], Batch]
    shapes: list[dict[str, jax.ShapeDtypeStruct]]
    null_text: np.ndarray
    null_mask: np.ndarray
    held_out: Callable[[int], Batch]
    next_of_first: Callable[[int], int] = lambda i: i
    prompts: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None
    decode: Callable[[Any], Any] | None = None


def toy_parts(world: str) -> tuple[SpaceToDepth, WordEncoder, tuple[int, int]]:
    """Autoencoder, text encoder and picture size (height, width) of a digits world."""
    rows, columns = get_world(world).cells
    return SpaceToDepth(), WordEncoder(), (8 * rows, 8 * columns)


def batch_shapes(c: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch; reads no data.

    Where data would have to be read, ``data.latent_size`` and ``data.text_length`` stand for it.
    """
    if c.data.source == "digits":
        autoencoder, text_encoder, (height, width) = toy_parts(c.data.world)
        text = text_encoder.encode([""])[0].shape[1:]
        factor = autoencoder.factor
        size = (height // factor, width // factor)
    else:
        size, text = tuple(c.data.latent_size), (c.data.text_length, c.model.caption_channels)
    return _shapes(c.data.batch_size, (*size, c.model.in_channels), text)


def _shapes(count: int, latents, text, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "latents": jax.ShapeDtypeStruct((count, *latents), jnp.float32),
        "text": jax.ShapeDtypeStruct((count, *text), dtype),
        "mask": jax.ShapeDtypeStruct((count, text[0]), jnp.int32),
    }


def open_data(c: Config, mesh: jax.sharding.Mesh) -> Data:
    """The training data that a config's ``data`` section describes.

    Raises:
      UserError: for an unknown source, or data that is not there, damaged, or not for this network.
    """
    rows = local_rows(mesh, c.data.batch_size)
    if c.data.source == "synthetic":
        return _open_synthetic(c, rows)
    if c.data.source == "digits":
        return _open_digits(c, rows)
    if c.data.source == "latents":
        return _open_latents(c, rows)
    raise UserError(
        f"config.data.source '{c.data.source}' is not one of {', '.join(SOURCES)}", exit_code=2
    )


def _open_synthetic(c: Config, rows: Sequence[int]) -> Data:
    shape = (*c.data.latent_size, c.model.in_channels)
    text_shape = (c.data.text_length, c.model.caption_channels)
    source, other = (SyntheticLatents(seed, shape, text_shape) for seed in (c.seed, c.seed + 1))
    batches = make_batches(source, collate, batch_size=c.data.batch_size, seed=c.seed, rows=rows)
    return Data(
        batches,
        [batch_shapes(c)],
        source.null_text,
        source.null_mask,
        lambda count: collate([other[i] for i in range(count)]),
    )


def _open_digits(c: Config, rows: Sequence[int]) -> Data:
    autoencoder, text_encoder, _ = toy_parts(c.data.world)
    encode = encode_online(autoencoder, text_encoder)
    batches = make_batches(
        open_digits(c.data.dir, c.data.world, "train"),
        encode,
        batch_size=c.data.batch_size,
        seed=c.seed,
        rows=rows,
    )

    def held_out(count: int) -> Batch:
        test = open_digits(c.data.dir, c.data.world, "test")
        return encode([test[i] for i in _below(len(test), count)])

    null_text, null_mask = text_encoder.encode([""])
    return Data(
        batches,
        [batch_shapes(c)],
        null_text[0],
        null_mask[0],
        held_out,
        prompts=lambda count: text_encoder.encode(held_out_prompts(c.data.world, count, 0)),
        decode=autoencoder.decode,
    )


def _below(length: int, count: int) -> range:
    if count > length:
        raise UserError(f"{count} held-out records are asked for, there are {length}")
    return range(count)


def _open_latents(c: Config, rows: Sequence[int]) -> Data:
    caches = [open_cache(folder) for folder in c.data.latents]
    if not caches:
        raise UserError(
            "config.data.latents is empty: name folders that sprint_jax.encode wrote, as in "
            "--config.data.latents=DIR, or set --config.data.source=synthetic for noise",
            exit_code=2,
        )
    _check_caches(c, caches)
    parts = [hold_out(cache.buckets, c.data.holdout) for cache in caches]
    order = make_order(
        [training for training, _ in parts],
        batch_size=c.data.batch_size,
        seed=c.seed,
        weights=c.data.weights,
    )
    temperature, first = c.data.caption_temperature, caches[0]
    batches = latent_batches(
        caches, order, rows=rows, batch_size=c.data.batch_size, seed=c.seed, temperature=temperature
    )
    record = first[0]
    text = (first.text_length, record.texts[0].shape[-1])
    shapes = [
        _shapes(c.data.batch_size, (*size, record.latents.shape[-1]), text, record.texts[0].dtype)
        for size in order.buckets
    ]

    def next_of_first(i: int) -> int:
        while order.bucket(i) != order.buckets[0]:
            i += 1
        return i

    def held_out(count: int) -> Batch:
        kept = parts[0][1].get(order.buckets[0], ())
        if count > len(kept):
            raise UserError(
                f"{count} held-out records of {order.buckets[0]} are asked for, {first.folder} keeps "
                f"{len(kept)}: set --config.data.holdout to more before training",
            )
        return read_rows(caches, np.zeros(count, int), kept[:count], np.zeros(count), temperature)

    def prompts(count: int):
        numbers = np.resize(np.asarray(order.rows(next_of_first(0)).records), count)
        batch = read_rows(caches, np.zeros(count, int), numbers, np.zeros(count), temperature)
        return batch["text"], batch["mask"]

    return Data(
        batches,
        shapes,
        first.null_text,
        first.null_mask,
        held_out,
        next_of_first,
        prompts,
    )


def _check_caches(c: Config, caches: Sequence[Cache]) -> None:
    """Refuses caches of different encoders, and such as the network does not take."""
    for cache in caches[1:]:
        if (cache.identity, cache.text_length) != (caches[0].identity, caches[0].text_length):
            raise UserError(
                f"{cache.folder} and {caches[0].folder} are of different encoders: their latents "
                "cannot be mixed"
            )
    record = caches[0][0]
    found = {"in_channels": record.latents.shape[-1], "caption_channels": record.texts[0].shape[-1]}
    for key, value in found.items():
        if value != c.model[key]:
            raise UserError(
                f"{caches[0].folder} is not for this network: it has {value} channels where "
                f"config.model.{key} is {c.model[key]}"
            )
