"""From a config's ``data`` section to batches: the digits world, cached latents, images, or noise."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..core.config import Config
from ..core.errors import UserError
from ..digits.dataset import open_digits
from ..digits.encoders import digits_parts
from ..digits.scenes import held_out_prompts
from ..encoders.load import Encoders, encode_captions, latent_size, load_encoders
from ..parallel.sharding import local_rows, make_mesh, same_everywhere
from .buckets import check_factor, choose_sizes
from .cached import latent_batches, read_rows
from .latents.cache import Cache, open_cache, pad_texts
from .loader import encode_online, make_batches
from .online import RejectLog, encode_rows, image_batches, read_usable, survey
from .order import Order, hold_out, make_order
from .sources.open import open_images
from .synthetic import SyntheticLatents, collate

Batch = dict[str, np.ndarray]
REJECTED = "rejected.jsonl"  # in a workdir: images that could not be used
SOURCES = ("digits", "latents", "images", "synthetic")


class Data(NamedTuple):
    """Where batches come from, and what stands between pictures, prompts and the network.

    ``batches(i)`` is this host's rows of global batch ``i``: latents [B, h, w, C], text [B, L, D],
    mask [B, L]. ``shapes`` are those of global batches, one for each bucket, the most frequent first, and
    ``next_of_first(i)`` is the number, i or the next, of a batch of the first. ``null_text`` [L, D] and
    ``null_mask`` [L] are of the empty prompt. ``held_out(count)`` is a batch of records that training does
    not see, whole on this host. ``prompts(count)`` are features of what sample grids show, and ``decode``
    makes pictures of latents; without it there is nothing to look at. ``identity`` is a hash of which
    records there are in which bucket and of what made their latents, where data may change under a run.
    """

    batches: Callable[[int], Batch]
    shapes: list[dict[str, jax.ShapeDtypeStruct]]
    null_text: np.ndarray
    null_mask: np.ndarray
    held_out: Callable[[int], Batch]
    next_of_first: Callable[[int], int] = lambda i: i
    prompts: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None
    decode: Callable[[Any], Any] | None = None
    identity: str = ""


def batch_shapes(c: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch; reads no data.

    Where data would have to be read, ``data.latent_size`` and ``data.text_length`` stand for it.
    """
    if c.data.source == "digits":
        size, text = latent_size(c), digits_parts(c.data.world)[1].encode([""])[0].shape[1:]
    else:
        size, text = tuple(c.data.latent_size), (c.data.text_length, c.model.caption_channels)
    return _shapes(c.data.batch_size, (*size, c.model.in_channels), text)


def _shapes(count: int, latents, text, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "latents": jax.ShapeDtypeStruct((count, *latents), jnp.float32),
        "text": jax.ShapeDtypeStruct((count, *text), dtype),
        "mask": jax.ShapeDtypeStruct((count, text[0]), jnp.int32),
    }


def open_data(c: Config, mesh: jax.sharding.Mesh, workdir: Path | None = None) -> Data:
    """The training data that a config's ``data`` section describes.

    Args:
      workdir: gets rejected.jsonl of images that cannot be used, if there are any.

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
    if c.data.source == "images":
        return _open_images(c, rows, workdir)
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
    autoencoder, text_encoder, _ = digits_parts(c.data.world)
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
        raise UserError(f"{count} held-out records are wanted, but there are {length}")
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
    order, _, held_out = _order(c, [cache.buckets for cache in caches])
    first, temperature = caches[0], c.data.caption_temperature
    how = dict(batch_size=c.data.batch_size, seed=c.seed, temperature=temperature)
    record = first[0]
    decode = None
    if c.data.encoders:  # for pictures of samples alone
        decode = _decoder(c, first)

    def read(sources, records) -> Batch:
        return read_rows(caches, sources, records, np.zeros(len(records)), temperature)

    return _bucketed(
        c,
        order,
        latent_batches(caches, order, rows=rows, **how),
        read,
        held_out,
        (record.latents.shape[-1], (first.text_length, *record.texts[0].shape[1:])),
        record.texts[0].dtype,
        (first.null_text, first.null_mask),
        decode,
        _identify([cache.buckets for cache in caches], first.identity),
    )


def _open_images(c: Config, rows: Sequence[int], workdir: Path | None) -> Data:
    features = dict(image_feature=c.data.image_feature, caption_feature=c.data.caption_feature)
    sources = open_images(c.data.images, data_dir=c.data.dir, **features)
    encoders = _load_encoders(c)
    factor, threads = encoders.autoencoder.factor, c.encode.threads
    sizes = choose_sizes(c.data.resolution, c.data.sizes)
    check_factor(sizes, factor)
    name = f"rejected-{jax.process_index()}.jsonl" if jax.process_index() else REJECTED
    log = RejectLog(workdir / name if workdir else None, c.data.max_rejected)
    folder = Path(c.data.dir)
    buckets = [
        survey(source, sizes, factor, log, threads=threads, cache_dir=folder) for source in sources
    ]
    order, training, held_out = _order(c, buckets)
    temperature = c.data.caption_temperature
    how = dict(batch_size=c.data.batch_size, seed=c.seed, temperature=temperature)
    batches = image_batches(
        sources,
        training,
        encoders,
        order,
        log,
        sizes=sizes,
        rows=rows,
        threads=threads,
        encode_size=c.encode.batch_size,
        **how,
    )
    null_text, null_mask = encode_captions(encoders.text_encoder, [""])
    channels = encoders.identity["autoencoder"]["channels"]
    _check_channels(c, f"data.encoders '{c.data.encoders}'", channels, null_text.shape[-1])
    null_text, null_mask = pad_texts([null_text[0][null_mask[0] == 1]], null_mask.shape[1])

    def read(numbers, records) -> Batch:
        pairs = list(zip(numbers, records, strict=True))
        found = [
            read_usable(sources, buckets, order.buckets[0], sizes, log, *pair) for pair in pairs
        ]
        draws = np.zeros(len(found))
        return encode_rows(encoders, found, draws, temperature, c.encode.batch_size)

    return _bucketed(
        c,
        order,
        batches,
        read,
        held_out,
        (channels, null_text.shape[1:]),
        jnp.float32,
        (same_everywhere(null_text[0]), null_mask[0]),
        encoders.autoencoder.decode,
        _identify(buckets, json.dumps(encoders.identity, sort_keys=True)),
    )


def _load_encoders(c: Config) -> Encoders:
    """The encoders on as many of this host's devices as share a batch.

    Each has all of them: programs that wait for other devices must not run beside those of the training, which
    another thread starts.
    """
    sizes = c.encode.batch_size, c.encode.text_batch_size
    ways = math.gcd(*sizes, jax.local_device_count())
    mesh = make_mesh(ways, devices=jax.local_devices()[:ways])
    return load_encoders(c.data.encoders, jnp.dtype(c.encode.dtype), mesh, text_batch_size=sizes[1])


def _decoder(c: Config, cache: Cache) -> Callable[[Any], Any]:
    """What makes pictures of the latents of a cache. Raises UserError if it is not of their autoencoder."""
    encoders = _load_encoders(c)
    found, made = (
        {key: value for key, value in identity["autoencoder"].items() if key != "params"}
        for identity in (encoders.identity, cache.manifest["encoders"])
    )
    if found != made:
        raise UserError(
            f"config.data.encoders={c.data.encoders} has not the autoencoder that made {cache.folder}"
        )
    return encoders.autoencoder.decode


def _identify(buckets: Sequence[Mapping], encoders: str) -> str:
    """A hash of the records of each source by bucket, and of the encoders; the same on every host.

    Raises:
      UserError: the hosts do not see the same data.
    """
    digest = hashlib.sha256(encoders.encode())
    for source in buckets:
        for bucket in sorted(source):
            digest.update(f"{bucket} {len(source[bucket])}".encode())
            digest.update(np.ascontiguousarray(source[bucket], np.int64))
    mine = np.frombuffer(digest.digest(), np.uint8)
    if (same_everywhere(mine) != mine).any():
        raise UserError(
            f"process {jax.process_index()} sees other data than process 0: do all hosts have the same "
            "config.data.latents or images, whole?"
        )
    return digest.hexdigest()


def _order(c: Config, buckets: Sequence[Mapping]) -> tuple[Order, list[Mapping], Mapping]:
    """The order of what is trained on; that by source and bucket; and the first source's held-out records."""
    parts = [hold_out(each, 0 if number else c.data.holdout) for number, each in enumerate(buckets)]
    training = [kept for kept, _ in parts]
    order = make_order(training, batch_size=c.data.batch_size, seed=c.seed, weights=c.data.weights)
    return order, training, parts[0][1]


def _bucketed(c, order, batches, read, kept, dims, dtype, null, decode, identity) -> Data:
    """`Data` of an order over buckets; ``read(sources, records)`` gives a batch of records by number."""
    channels, text = dims
    shapes = [_shapes(c.data.batch_size, (*size, channels), text, dtype) for size in order.buckets]

    def next_of_first(i: int) -> int:
        while order.bucket(i) != order.buckets[0]:
            i += 1
        return i

    def held_out(count: int) -> Batch:
        records = kept.get(order.buckets[0], ())
        if count > len(records):
            raise UserError(
                f"{count} held-out records are wanted, and {len(records)} of the most frequent size "
                "are kept: train with a larger --config.data.holdout"
            )
        return read(np.zeros(count, int), records[:count])

    def prompts(count: int):
        rows = order.rows(next_of_first(0))
        batch = read(np.resize(rows.sources, count), np.resize(rows.records, count))
        return same_everywhere(batch["text"]), same_everywhere(batch["mask"])

    return Data(batches, shapes, *null, held_out, next_of_first, prompts, decode, identity)


def _check_caches(c: Config, caches: Sequence[Cache]) -> None:
    """Refuses caches of different encoders, and such as the network does not take."""
    for cache in caches[1:]:
        if (cache.identity, cache.text_length) != (caches[0].identity, caches[0].text_length):
            raise UserError(
                f"{cache.folder} and {caches[0].folder} are of different encoders: their latents "
                "cannot be mixed"
            )
    record = caches[0][0]
    _check_channels(c, str(caches[0].folder), record.latents.shape[-1], record.texts[0].shape[-1])


def _check_channels(c: Config, what: str, latents: int, text: int) -> None:
    for key, value in {"in_channels": latents, "caption_channels": text}.items():
        if value != c.model[key]:
            raise UserError(
                f"{what} is not for this network: it has {value} channels where config.model.{key} is "
                f"{c.model[key]}"
            )
