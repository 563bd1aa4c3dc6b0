"""Encoded records on disk: latents and text features, in ArrayRecord shards behind one manifest.

A folder of them, as `sprint_jax.encode` writes it and `open_cache` reads it:

    manifest.json            written last; without it the folder is not complete
    null_text.safetensors    features of the null prompt: text [L, D] float32, mask [L] int32
    shards/00012-0.array_record    records of unit 12, those of one bucket next to each other
    units/00012.json         what unit 12 wrote; the manifest is made of them
    rejected.jsonl, preview.png    for people

A record is a safetensors file of its own, without pickles: ``latents`` [h, w, C] and, for caption k,
``text.k`` [n_k, D], which are those tokens alone that the mask keeps.
"""

import hashlib
import json
import resource
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tqdm import tqdm

from ...core.errors import UserError
from ..sources.records import Caption

FORMAT = 1  # of the folder; a reader refuses others
MANIFEST, NULL_TEXT, SHARDS = "manifest.json", "null_text.safetensors", "shards"
TAIL = 1 << 16  # bytes at a shard's end, where its index lies; a copy cut short lacks them
DTYPES = {"BF16": jnp.dtype("bfloat16"), "F32": jnp.dtype("float32")}
OTHER_FILES = 256  # that a training has open beside its shards
_THREADS = 32  # that look at shards; disks and networks answer many at once
_HASHERS = 4  # threads that read whole shards


class CachedRecord(NamedTuple):
    """An encoded image: ``latents`` [h, w, C], which are the autoencoder's times its scaling factor (not
    times sigma_d), its captions, and for each of them the features ``texts[k]`` [n_k, D] of kept tokens.
    All arrays are bfloat16, or all are float32."""

    key: str
    latents: np.ndarray
    captions: tuple[Caption, ...]
    texts: tuple[np.ndarray, ...]


def pack(record: CachedRecord) -> bytes:
    """A record as bytes, the same for the same record.

    Raises:
      ValueError: not as many texts as captions, or arrays of a dtype that is not stored.
    """
    tensors = {"latents": record.latents}
    tensors |= {f"text.{k}": text for k, text in enumerate(record.texts)}
    if len(record.texts) != len(record.captions) or not record.captions:
        raise ValueError(f"{len(record.texts)} texts for {len(record.captions)} captions")
    dtypes = {array.dtype for array in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise ValueError(f"arrays of {sorted(map(str, dtypes))}: give all bfloat16 or all float32")
    words = json.dumps([record.key, record.captions])  # one entry: their order is not kept
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return safetensors.numpy.save(tensors, metadata={"record": words})


def unpack(data: bytes) -> CachedRecord:
    """The record of `pack`, some 20 us whatever its size: arrays are read-only views of ``data``.

    Nothing is converted, so a reader that needs one caption of several pays for that one alone.

    Raises:
      ValueError: ``data`` is not a record.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:start]))
        key, captions = json.loads(header["__metadata__"]["record"])
        captions = tuple(Caption(*caption) for caption in captions)
        texts = (_view(data, start, header[f"text.{k}"]) for k in range(len(captions)))
        return CachedRecord(key, _view(data, start, header["latents"]), captions, tuple(texts))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not a cached record: {error!r}") from error


def _view(data: bytes, start: int, entry: dict[str, Any]) -> np.ndarray:
    shape, (first, _) = entry["shape"], entry["data_offsets"]
    count = int(np.prod(shape))
    return np.frombuffer(data, DTYPES[entry["dtype"]], count, start + first).reshape(shape)


def pad_texts(texts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept tokens [n, D] of some captions as a batch.

    Returns:
      text [B, length, D], zero behind the last token, in the dtype of ``texts``: bfloat16 is half the
      memory to fill, and exact as float32 on the devices; and mask [B, length] int32, 1 for tokens.

    Raises:
      ValueError: a text is longer.
    """
    text = np.empty((len(texts), length, texts[0].shape[-1]), texts[0].dtype)
    mask = np.zeros((len(texts), length), np.int32)
    for row, tokens in enumerate(texts):
        if len(tokens) > length:
            raise ValueError(f"text {row} has {len(tokens)} tokens, more than {length}")
        text[row, : len(tokens)] = tokens
        text[row, len(tokens) :] = 0
        mask[row, : len(tokens)] = 1
    return text, mask


class _Part(NamedTuple):
    """A whole shard, as ArrayRecordDataSource wants to be told of it: it need not open the file to count."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Cache:
    """Random access to the records of a folder, from any thread and, when pickled, any process.

    Open one with `open_cache`.

    Attributes:
      folder: where it lies.
      manifest: of the folder, a dict.
      buckets: (h, w) of latents -> numbers of its records, increasing, int64.
      null_text: features [L, D] float32 of the null prompt, and null_mask [L] int32.
      text_length: L, the most tokens that a caption has.
      identity: hash of the encoders; caches with the same one may be mixed.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], null: dict[str, np.ndarray]):
        self.folder, self.manifest = folder, manifest
        self.null_text, self.null_mask = null["text"], null["mask"]
        self.text_length = len(self.null_mask)
        self.identity: str = manifest["identity"]
        parts, runs, first = [], {}, 0
        for shard in manifest["shards"]:
            path = folder / SHARDS / shard["file"]
            parts.append(_Part(str(path), 0, shard["records"], shard["records"]))
            for height, width, count in shard["buckets"]:
                runs.setdefault((height, width), []).append(np.arange(first, first + count))
                first += count
        self.buckets = {size: np.concatenate(runs[size]) for size in sorted(runs)}
        self._records = ArrayRecordDataSource(parts)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> CachedRecord:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[CachedRecord]:
        """The records of these numbers, read in one call.

        Raises:
          UserError: naming the folder, if one cannot be read.
        """
        try:
            return [unpack(data) for data in self._records.__getitems__(indices)]
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"{self.folder}: records {min(indices)} to {max(indices)} cannot be read: {error}"
            ) from error


def open_cache(folder: str | Path) -> Cache:
    """Opens what `encode` wrote, if it is all there.

    Every shard's size and last bytes are compared with the manifest, so that a copy or an upload which was
    interrupted is refused. A record that is damaged further inside is found by its checksum when it is read;
    `verify_cache` looks at all bytes at once.

    Raises:
      UserError: no manifest, one of another format, or a shard that is missing, cut short, changed, or not
        of this folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    shards = {shard["file"]: shard for shard in manifest["shards"]}
    if not shards:
        raise UserError(f"{folder} has no record: see {folder / 'rejected.jsonl'}")
    found = {path.name for path in (folder / SHARDS).glob("*.array_record")}
    if foreign := sorted(found - set(shards)):
        raise UserError(f"{folder / SHARDS / foreign[0]} is not of this folder: take it away")

    def check(shard: dict[str, Any]) -> None:
        path = folder / SHARDS / shard["file"]
        size, tail = _end_of(path)
        if size != shard["bytes"]:
            raise UserError(
                f"{path} has {size} bytes instead of {shard['bytes']}: copy it again"
                if size
                else f"{path} is missing or empty: copy the folder again"
            )
        if tail != shard["tail"]:
            raise UserError(f"{path} is not the shard that was written: copy it again")

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(check, shards.values()))
    _allow_open_files(len(shards))
    path = folder / NULL_TEXT
    if not path.is_file() or hash_file(path) != manifest["null_text_sha256"]:
        raise UserError(f"{path} is missing or not the one that was written: copy it again")
    return Cache(folder, manifest, safetensors.numpy.load_file(path))


def _allow_open_files(count: int) -> None:
    """Lets this process have as many files open as the system allows: a reader keeps its shards open.

    Raises:
      UserError: that is not enough for ``count`` shards and what else a training has open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = soft + count if hard == resource.RLIM_INFINITY else hard
    if soft not in (limit, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if count + OTHER_FILES > limit:
        raise UserError(
            f"{count} shards cannot be open at once: this system allows {hard} files (ulimit -Hn); raise that, "
            "or encode with a larger config.encode.unit"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """``manifest.json`` of a folder. Raises UserError if it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a whole folder of latents" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{folder} {what} ({MANIFEST} is missing): let sprint_jax.encode end, or copy it again"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} is of format {found}, this version reads {FORMAT}: encode again")
    return manifest


def verify_cache(folder: str | Path) -> Cache:
    """`open_cache`, and every byte of every shard compared with its hash; shows its progress.

    Raises:
      UserError: naming the first shard that differs, and as `open_cache`.
    """
    cache = open_cache(folder)
    shards = cache.manifest["shards"]
    paths = [cache.folder / SHARDS / shard["file"] for shard in shards]
    with ThreadPoolExecutor(_HASHERS) as pool:
        hashes: Iterable[str] = tqdm(pool.map(hash_file, paths), "verify", len(paths), unit="shard")
        for path, shard, found in zip(paths, shards, hashes, strict=True):
            if found != shard["sha256"]:
                raise UserError(f"{path} is damaged: its hash is not the manifest's; copy it again")
    return cache


def describe_shard(path: Path) -> dict[str, Any]:
    """What the manifest says of a shard's bytes: their number, a CRC-32 of the last, sha256 of all."""
    size, tail = _end_of(path)
    return {"bytes": size, "tail": tail, "sha256": hash_file(path)}


def hash_file(path: Path) -> str:
    """sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _end_of(path: Path) -> tuple[int, int]:
    """Bytes of a file, and CRC-32 of the last `TAIL` of them; (0, 0) for one that is not there."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - TAIL))
            return size, zlib.crc32(file.read())
    except FileNotFoundError:
        return 0, 0
