"""The training data of a config: batches of the digits world, of cached latents, of images, or of noise."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.config import Config
from ..core.errors import UserError
from ..core.pixels import decode_bytes, to_bytes
from ..core.storage import AnyPath, as_path
from ..digits.dataset import Digits, open_digits
from ..digits.encoders import digits_parts
from ..digits.report import readable
from ..digits.scenes import draw_images, held_out_prompts, to_float
from ..encoders.conditions import MAPS, open_conditions
from ..encoders.load import (
    BESIDE_TRAINING,
    Encoders,
    encode_captions,
    latent_size,
    load_decoder,
    load_encoders,
    style_of,
)
from ..parallel.sharding import local_rows, make_mesh, same_everywhere
from . import synthetic
from .batches import Batch, ImageReader, Reader, make_batches, read_latents
from .buckets import check_factor, choose_sizes, describe_repeats, describe_resolution
from .latents.cache import Cache, check_mixture, open_cache
from .members import Buckets
from .order import VERSION, Order, Rows, hold_out, make_order, make_single_order
from .rejects import RejectLog
from .sources.maps import with_maps
from .sources.open import TFDS, open_images
from .sources.records import Source
from .survey import join_sizes, survey

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The batches of a run, and how its data is seen: prompts, pictures, held-out records.

    Attributes:
      batches: makes this host's rows of global batch ``i``: latents [B, h, w, C], text [B, L, D], mask [B, L],
        and control [B, h, w, C], latents of conditions, where ``data.control`` asks for them.
      shapes: of global batches, one for each bucket, the most frequent first.
      next_of_first: gives the number, i or the next, of a batch of the first bucket.
      null_text, null_mask: [L, D] and [L], of the empty prompt.
      held_out: makes a batch of so many records that training does not see, whole on this host.
      prompts: makes text and mask of so many prompts for sample grids.
      control: makes latents [N, h, w, C] of conditions for the same prompts; None where there are none.
      decode: makes pictures, uint8 [B, H, W, 3], of latents; None where there is no autoencoder.
      readable: whether a judge can read each of some uint8 pictures, bool [N]; None where there is no judge.
      identity: of the order, the records in each bucket and the encoders, where they may change under a run.
    """

    batches: Callable[[int], Batch]
    shapes: list[Shapes]
    next_of_first: Callable[[int], int]
    null_text: np.ndarray
    null_mask: np.ndarray
    held_out: Callable[[int], Batch]
    prompts: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None
    control: Callable[[int], np.ndarray] | None = None
    decode: Callable[[Any], np.ndarray] | None = None
    readable: Callable[[np.ndarray], np.ndarray] | None = None
    identity: str = ""


def open_data(c: Config, mesh: jax.sharding.Mesh, workdir: AnyPath | None = None) -> Data:
    """Opens the training data of a config; ``workdir`` gets rejected.jsonl of images that cannot be used.

    Raises:
      UserError: for an unknown source, or data that is not there, damaged, or not for this network.
    """
    openers = {
        "digits": _open_digits,
        "latents": _open_latents,
        "images": functools.partial(_open_images, workdir=workdir),
        "synthetic": _open_synthetic,
    }
    if c.data.source not in openers:
        raise UserError(
            f"config.data.source '{c.data.source}' is not one of {', '.join(openers)}", exit_code=2
        )
    return openers[c.data.source](c, local_rows(mesh, c.data.batch_size))


def batch_shapes(c: Config) -> Shapes:
    """Returns shapes and dtypes of a global batch; reads no data.

    Where data would have to be read, ``data.latent_size`` and ``data.text_length`` stand for it.
    """
    if c.data.source == "digits":
        size, text = latent_size(c), digits_parts(c.data.world)[1].encode([""])[0].shape[1:]
    else:
        size, text = tuple(c.data.latent_size), (c.data.text_length, c.model.caption_channels)
    return _shapes(c, (*size, c.model.in_channels), text)


def _shapes(c: Config, latents, text, dtype: Any = jnp.float32) -> Shapes:
    count = c.data.batch_size
    shapes = {
        "latents": jax.ShapeDtypeStruct((count, *latents), jnp.float32),
        "text": jax.ShapeDtypeStruct((count, *text), dtype),
        "mask": jax.ShapeDtypeStruct((count, text[0]), jnp.int32),
    }
    return shapes | ({"control": shapes["latents"]} if c.data.control else {})


def open_sources(c: Config) -> tuple[Source, ...]:
    """Opens the sources in ``data.images``; a digits world that is named there is written first if missing."""
    for path in c.data.images:
        name, *config = path.removeprefix(TFDS).partition(":")[0].split("/")
        folder = as_path(c.data.dir).expanduser().joinpath(name, *config)
        if path.startswith(TFDS) and name == Digits.name and not folder.is_dir():
            open_digits(c.data.dir, (*config, "full")[0], "train")
    features = dict(image_feature=c.data.image_feature, caption_feature=c.data.caption_feature)
    sources = open_images(c.data.images, data_dir=c.data.dir, **features)
    return with_maps(sources, c.data.control_maps) if c.data.control == MAPS else sources


def _make_data(c: Config, rows: Sequence[int], order: Order, read: Reader, **fields) -> Data:
    """`Data` whose batches are read in an order; ``fields`` are its other fields."""

    def next_of_first(i: int) -> int:
        while order.rows(i).bucket != order.buckets[0]:
            i += 1
        return i

    batches = make_batches(order, read, rows, batch_size=c.data.batch_size, seed=c.seed)
    return Data(batches=batches, next_of_first=next_of_first, **fields)


def _open_synthetic(c: Config, rows: Sequence[int]) -> Data:
    shapes = batch_shapes(c)
    shape, text_shape = shapes["latents"].shape[1:], shapes["text"].shape[1:]
    how = dict(shape=shape, text_shape=text_shape, control=bool(c.data.control))
    draw = functools.partial(synthetic.draw_batch, **how)
    count, how = synthetic.LENGTH, dict(batch_size=c.data.batch_size, seed=c.seed)
    return _make_data(
        c,
        rows,
        make_single_order(count, shape[:2], **how),
        lambda chosen, draws: draw(c.seed, chosen.records),
        shapes=[shapes],
        null_text=np.zeros(text_shape, np.float32),
        null_mask=(np.arange(text_shape[0]) < 1).astype(np.int32),
        held_out=lambda count: draw(c.seed + 1, range(count)),
    )


def _open_digits(c: Config, rows: Sequence[int]) -> Data:
    autoencoder, text_encoder, _ = digits_parts(c.data.world)
    conditions = open_conditions(c.data, jnp.float32)
    if conditions and conditions.kind == MAPS:
        raise UserError("config.data.control=maps is for data.source=images: these lie nowhere", 2)
    train = open_digits(c.data.dir, c.data.world, "train")

    def encode_sketches(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        (maps,) = conditions.draw(images, [conditions.numbers(draws)])
        return autoencoder.encode(to_float(np.asarray(maps)))

    def encode(records: list[dict], draws: np.ndarray) -> Batch:
        images = np.stack([record["image"] for record in records])
        text, mask = text_encoder.encode([record["caption"] for record in records])
        batch = {"latents": autoencoder.encode(to_float(images)), "text": text, "mask": mask}
        return batch | ({"control": encode_sketches(images, draws)} if conditions else {})

    def control(count: int) -> np.ndarray:
        prompts = held_out_prompts(c.data.world, count, 0)
        images = to_bytes(draw_images(c.data.world, prompts, "test", 0))
        return encode_sketches(images, np.zeros(count))

    def held_out(count: int) -> Batch:
        test = open_digits(c.data.dir, c.data.world, "test")
        if count > len(test):
            raise UserError(f"{count} held-out records are wanted, but there are {len(test)}")
        return encode([test[i] for i in range(count)], np.zeros(count))

    null_text, null_mask = text_encoder.encode([""])
    how = dict(batch_size=c.data.batch_size, seed=c.seed)
    return _make_data(
        c,
        rows,
        make_single_order(len(train), latent_size(c), **how),
        lambda chosen, draws: encode([train[i] for i in chosen.records.tolist()], draws[1]),
        shapes=[batch_shapes(c)],
        null_text=null_text[0],
        null_mask=null_mask[0],
        held_out=held_out,
        prompts=lambda count: text_encoder.encode(held_out_prompts(c.data.world, count, 0)),
        control=control if conditions else None,
        decode=functools.partial(decode_bytes, autoencoder),
        readable=lambda pictures: readable(c.data.world, pictures),
    )


def _open_latents(c: Config, rows: Sequence[int]) -> Data:
    caches = [open_cache(folder) for folder in c.data.latents]
    if not caches:
        raise UserError(
            "config.data.latents is empty: name folders that sprint_jax.encode wrote, as in "
            "--config.data.latents=DIR, or set --config.data.source=synthetic for noise",
            exit_code=2,
        )
    first = caches[0]
    control = check_mixture(caches, c.data.control)
    read = functools.partial(read_latents, control=bool(c.data.control))
    if (style := style_of(first.manifest["encoders"])) not in (None, c.data.prompt_style):
        raise UserError(
            f"captions in {first.folder} are put as '{style}' does: set --config.data.prompt_style={style}"
        )
    if c.data.null_mask == "caption" and not first.manifest.get("null_padding"):
        raise UserError(
            f"{first.folder} was written before the empty prompt's padding was kept, which "
            "config.data.null_mask=caption shows: encode it anew, or set --config.data.null_mask=own"
        )
    record, size = first[0], first.manifest["buckets"][0]
    return _make_bucketed(
        c,
        rows,
        name=str(first.folder),
        factor=size["pixels"][0] // size["latents"][0],
        buckets=[cache.buckets for cache in caches],
        make_reader=lambda _: functools.partial(read, caches, c.data.caption_temperature),
        channels=record.latents.shape[-1],
        dtype=record.texts[0].dtype,
        null=(first.null_text, first.null_mask),
        # For pictures of samples alone.
        decode=_load_decoder(c, first) if c.data.encoders else None,
        encoders=first.identity,
        control=control,
    )


def _open_images(c: Config, rows: Sequence[int], workdir: AnyPath | None) -> Data:
    sources, encoders = open_sources(c), _load_encoders(c)
    factor, threads = encoders.autoencoder.factor, c.encode.threads
    sizes = choose_sizes(c.data.resolution, c.data.sizes, c.data.most_sizes)
    check_factor(sizes, factor)
    log = RejectLog(workdir, c.data.max_rejected, jax.process_index())
    how = dict(threads=threads, cache_dir=as_path(c.data.dir))
    surveys = [survey(source, sizes, log, **how) for source in sources]
    buckets, joined = join_sizes(surveys, sizes, factor, c.data.batch_size)
    _say(joined)
    reader = ImageReader(
        sources=sources,
        buckets=buckets,
        factor=factor,
        encoders=encoders,
        log=log,
        pool=ThreadPoolExecutor(threads, thread_name_prefix="images"),
        encode_size=c.encode.batch_size,
        temperature=c.data.caption_temperature,
    )
    text, mask = encode_captions(encoders.text_encoder, [""])
    return _make_bucketed(
        c,
        rows,
        name=f"data.encoders '{c.data.encoders}'",
        factor=factor,
        buckets=buckets,
        make_reader=lambda buckets: dataclasses.replace(reader, buckets=buckets),
        channels=encoders.identity["autoencoder"]["channels"],
        dtype=jnp.float32,
        null=(same_everywhere(text[0]), mask[0]),
        decode=functools.partial(decode_bytes, encoders.autoencoder, at_once=BESIDE_TRAINING),
        encoders=json.dumps(encoders.identity, sort_keys=True),
        control=encoders.conditions and encoders.conditions.identity,
    )


def _say(line: str) -> None:
    """Prints a line, if any, on stderr of process 0."""
    if line and jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def _make_bucketed(
    c: Config,
    rows: Sequence[int],
    *,
    name: str,
    factor: int,
    buckets: Sequence[Buckets],
    make_reader: Callable[[Sequence[Buckets]], Reader],
    channels: int,
    dtype: Any,
    null: tuple[np.ndarray, np.ndarray],
    decode: Callable[[Any], np.ndarray] | None,
    encoders: str,
    control: dict[str, Any] | None,
) -> Data:
    """`Data` of sources in buckets; a part of the first source may be held out.

    Args:
      factor: pixels per latent along a side.
      buckets: of each source, its records by bucket; make_reader: makes a reader of such records.
      channels: of latents; dtype: of text; null: text [L, D] and mask [L] of the empty prompt.
      encoders: their identity; control: that of the conditions, if any.
    """
    for key, value in {"in_channels": channels, "caption_channels": null[0].shape[-1]}.items():
        if value != c.model[key]:
            raise UserError(
                f"{name} is not for this network: it has {value} channels where config.model.{key} is "
                f"{c.model[key]}"
            )
    identity = _identify(
        buckets, encoders + (json.dumps(control, sort_keys=True) if control else "")
    )
    first_part, kept = hold_out(buckets[0], c.data.holdout)
    training = [first_part, *buckets[1:]]
    _say(describe_repeats(training, factor, c.data.batch_size))
    _say(describe_resolution(training, c.model.sample_size))
    how = dict(batch_size=c.data.batch_size, seed=c.seed, weights=c.data.weights)
    order, read = make_order(training, **how), make_reader(training)
    common = order.buckets[0]

    def held_out(count: int) -> Batch:
        records = kept.get(common, ())
        if count > len(records):
            raise UserError(
                f"{count} held-out records are wanted, and {len(records)} of the most frequent size "
                "are kept: train with a larger --config.data.holdout"
            )
        chosen = Rows(common, np.zeros(count, np.int64), records[:count])
        return make_reader([kept])(chosen, np.zeros((2, count)))

    def first_rows(count: int, *names: str) -> tuple[np.ndarray, ...]:
        chosen = order.rows(data.next_of_first(0)).take(np.arange(count) % c.data.batch_size)
        batch = read(chosen, np.zeros((2, count)))
        return tuple(same_everywhere(batch[name]) for name in names)

    text = null[0].shape
    data = _make_data(
        c,
        rows,
        order,
        read,
        shapes=[_shapes(c, (*size, channels), text, dtype) for size in order.buckets],
        null_text=null[0],
        null_mask=null[1],
        held_out=held_out,
        prompts=lambda count: first_rows(count, "text", "mask"),
        control=(lambda count: first_rows(count, "control")[0]) if control else None,
        decode=decode,
        identity=identity,
    )
    return data


def _load_encoders(c: Config) -> Encoders:
    """The encoders on as many of this host's devices as share a batch, whole on each of them."""
    # Programs that wait for other devices must not run beside those of the training, in another thread.
    sizes = c.encode.batch_size, c.encode.text_batch_size
    ways = math.gcd(*sizes, jax.local_device_count())
    mesh, dtype = make_mesh(ways, devices=jax.local_devices()[:ways]), jnp.dtype(c.encode.dtype)
    how = dict(text_batch_size=sizes[1], style=c.data.prompt_style)
    encoders = load_encoders(c.data.encoders, dtype, mesh, **how)
    return encoders._replace(conditions=open_conditions(c.data, dtype, mesh))


def _load_decoder(c: Config, cache: Cache) -> Callable[[Any], np.ndarray]:
    made = cache.manifest["encoders"]["autoencoder"]
    return load_decoder(c.data.encoders, jnp.dtype(c.encode.dtype), made, cache.folder)


def _identify(buckets: Sequence[Buckets], encoders: str) -> str:
    """The version of the order, and a hash of the records of each source by bucket, and of the encoders.

    Raises UserError if the hosts do not see the same data.
    """
    digest = hashlib.sha256(encoders.encode())
    for source in buckets:
        for bucket in sorted(source):
            digest.update(f"{bucket} {len(source[bucket])}".encode() + source[bucket].hash())
    mine = np.frombuffer(digest.digest(), np.uint8)
    if (same_everywhere(mine) != mine).any():
        raise UserError(
            f"process {jax.process_index()} sees other data than process 0: do all hosts have the same "
            "config.data.latents or images, whole?"
        )
    return f"order {VERSION}, {digest.hexdigest()}"
