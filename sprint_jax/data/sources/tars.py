"""Tar shards in WebDataset's layout, by random access; their headers are indexed once."""

import concurrent.futures
import hashlib
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from tqdm import tqdm

from ...core.errors import UserError
from ...core.files import write_atomic
from ...core.storage import AnyPath, as_path, in_bucket, size_of, stamp_of
from ...parallel.sharding import bytes_from_everyone
from .files import FileSource, Item, Span, make_printable, open_regular
from .images import EXTENSIONS, MAX_PIXELS
from .records import check_same, hash_identity

THREADS = 8  # that index shards: on a network's disk they wait more than they work
AT_ONCE = 64  # shards whose indices a process hands to the others at once
SCAN = 8 << 20  # bytes of a bucket's shard that are asked for at a time, to look for headers
VERSION = 2  # of a kept index; another is made anew


class Group(NamedTuple):
    """The files of one key in a shard: extension -> (offset, size) in bytes, or why they are of no use."""

    key: str
    members: dict[str, tuple[int, int]]
    problem: str | None = None


def open_tars(paths: Sequence[str | os.PathLike], name: str | None = None) -> FileSource:
    """Opens tar shards in WebDataset's layout: an image, and ``.txt`` or ``.json``, of one name.

    A key is WebDataset's ``__key__`` (`index_tar`); where a key occurs in several shards, all keys have the
    shard's path before them. Captions are as in `caption_files`, with Sana's ``SHARD_MODEL.json`` beside the
    shards. A group needs exactly one image. Shards are indexed at the first opening, with progress; all
    processes of a run call this together, and each reads its share of them.

    The source is called ``name``, by default the paths. Raises UserError for a shard that cannot be read, or
    no image in any of them.
    """
    shards = [as_path(path).expanduser() for path in paths]
    name = name or ", ".join(map(str, shards))
    models = _find_models(shards)
    files = [*shards, *(file for files in models.values() for file in files)]
    try:
        sizes = [(file.name, size_of(file)) for file in files]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    check_same(name, hashlib.sha256(repr(sizes).encode()).digest())
    indices = _index_all(shards, name)
    # A tar is filled up to whole blocks: its size alone does not show a change.
    marks = [index.mark for index in indices]
    identity = hash_identity("tar", [MAX_PIXELS, *sizes, *marks])
    if not any(index.has_image for index in indices):
        raise UserError(f"{name} has no image: are these tar shards in WebDataset's layout?")
    common = os.path.commonpath([os.path.dirname(_place(path)) for path in shards])
    hashes = np.sort(np.concatenate([index.hashes for index in indices]))
    packed = []
    for path, index in zip(shards, indices, strict=True):
        prefix = Path(os.path.relpath(_place(path), common)).with_suffix("").as_posix()
        index = index._replace(hashes=hashes[:0])  # of no more use
        packed.append(_Shard(str(path), prefix, tuple(map(str, models.get(path, ()))), index))
    items = TarItems(packed, once=not (hashes[1:] == hashes[:-1]).any())
    return FileSource(items, name=name, identity=identity, keep_models=True)


def _index_all(shards: Sequence[AnyPath], name: str) -> "list[_Index]":
    """The indices of shards in their order. Each process makes those of its share, and gets the others'."""
    me, processes, found = jax.process_index(), jax.process_count(), []
    how = dict(total=len(shards), delay=5, mininterval=5, leave=False, unit="shard")

    def make(path: AnyPath) -> _Index:
        index = _pack(index_tar(path))
        bar.update(processes)
        return index

    with (
        tqdm(desc=f"index {name}", disable=me > 0, **how) as bar,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        for start in range(0, len(shards), AT_ONCE * processes):
            part = shards[start : start + AT_ONCE * processes]
            mine = list(pool.map(make, part[me::processes]))
            if processes == 1:
                found += mine
                continue
            everyone = [_load(content) for content in bytes_from_everyone(_dump(mine))]
            found += [everyone[k % processes][k // processes] for k in range(len(part))]
    return found


def _place(path: AnyPath) -> str:
    """The path of a shard from the root of its disk, or with its bucket."""
    return os.fspath(path if in_bucket(path) else path.absolute()).rpartition("://")[2]


class _Index(NamedTuple):
    """The groups of a shard in few arrays.

    Key k is ``keys[ends[k - 1] : ends[k]]``, and ``hashes[k]`` a hash of it. ``places`` [groups, 3, 2] are
    offset and size of image, .txt and .json, size -1 where there is none; ``problems`` are by the number of the
    group. ``mark`` is a hash of all the groups.
    """

    keys: bytes
    ends: np.ndarray
    hashes: np.ndarray
    places: np.ndarray
    problems: dict[int, str]
    has_image: bool
    mark: str


class _Shard(NamedTuple):
    """A shard: its path, what stands before its keys where that is needed, Sana's files, its groups."""

    path: str
    prefix: str
    models: tuple[str, ...]
    index: _Index


def _pack(groups: Sequence[Group]) -> _Index:
    places = np.full((len(groups), 3, 2), -1, np.int64)
    keys, problems, has_image = [], {}, False
    for k, group in enumerate(groups):
        images = sorted(EXTENSIONS & group.members.keys())
        has_image |= bool(images)
        keys.append(group.key.encode(errors="surrogatepass"))
        problem = group.problem
        if len(images) != 1 and problem is None:
            found = ", ".join(images or sorted(group.members))
            problem = f"{'several' if images else 'no'} images in a group: it has {found}"
        if problem is not None:
            problems[k] = problem
        for place, extension in enumerate((*images[:1], "txt", "json") if images else ()):
            places[k, place] = group.members.get(extension, (0, -1))
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    hashes = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    mark = hashlib.sha256(str(groups).encode(errors="surrogatepass")).hexdigest()
    hashes = np.frombuffer(hashes, np.int64)
    return _Index(b"".join(keys), ends, hashes, places, problems, has_image, mark)


def _dump(indices: Sequence[_Index]) -> bytes:
    arrays = {}
    for k, index in enumerate(indices):
        about = json.dumps([list(index.problems.items()), index.has_image, index.mark]).encode()
        arrays |= {f"{k} {name}": getattr(index, name) for name in ("ends", "hashes", "places")}
        arrays |= {f"{k} keys": np.frombuffer(index.keys, np.uint8)}
        arrays |= {f"{k} about": np.frombuffer(about, np.uint8)}
    return safetensors.numpy.save(arrays)


def _load(content: bytes) -> list[_Index]:
    arrays, indices = safetensors.numpy.load(content), []
    for k in range(len(arrays) // 5):
        keys, ends, hashes, places, about = (
            arrays[f"{k} {name}"].copy() for name in ("keys", "ends", "hashes", "places", "about")
        )
        problems, *rest = json.loads(about.tobytes())
        indices.append(_Index(keys.tobytes(), ends, hashes, places, dict(problems), *rest))
    return indices


class TarItems(Sequence):
    """The items of shards, made as they are asked for: some 60 bytes of each, and its key, are in memory.

    Args:
      once: whether no key is in several shards.
    """

    def __init__(self, shards: Sequence[_Shard], once: bool):
        self._shards, self._once = shards, once
        self._ends = np.cumsum([len(shard.index.ends) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        k = index - int(self._ends[number]) + len(shard.index.ends)
        start = shard.index.ends[k - 1] if k else 0
        entry = shard.index.keys[start : shard.index.ends[k]].decode(errors="surrogatepass")
        key, bad_name = make_printable(entry if self._once else f"{shard.prefix}/{entry}")
        problem = bad_name or shard.index.problems.get(k)
        image, text, json_ = (
            Span(shard.path, offset, size) if size >= 0 else None
            for offset, size in shard.index.places[k].tolist()
        )
        image = None if problem else image
        return Item(key, image, text, json_, shard.models, entry, problem=problem)


def _find_models(shards: Sequence[AnyPath]) -> dict[AnyPath, list[AnyPath]]:
    """Sana's files beside each shard, sorted; a file belongs to the shard of the longest fitting name."""
    files: dict[AnyPath, list[AnyPath]] = {}
    known = set(shards)
    for folder in sorted({path.parent for path in shards}):
        for file in sorted(folder.glob("[!.]*_*.json")):
            owner = file.stem
            while "_" in owner:
                owner = owner.rpartition("_")[0]
                if (shard := folder / f"{owner}.tar") in known:
                    files.setdefault(shard, []).append(file)
                    break
    return files


def index_tar(path: AnyPath) -> list[Group]:
    """Lists the groups of a shard in its order, from the kept index where that is of this very file.

    Members belong together by their path up to the first dot of the file name, which is the key, without
    a leading ``./``; what follows the dot is the extension, in lower case (WebDataset's rule). Folders,
    hidden members and those without a dot are left out. A link or a device is the problem of its group.
    Damage becomes a group of its own, named ``SHARD.tar@BYTE``, and the problem of the groups before and
    after it, which may lack members.

    The index is kept beside the shard as ``.NAME.index.json``, with the file's size and time of change; where
    it cannot be written, a line on stderr says so.

    Raises:
      UserError: the file cannot be read.
    """
    kept = path.with_name(f".{path.name}.index.json")
    try:
        stamp = [VERSION, *stamp_of(path)]
        groups = _read_index(kept, stamp)
        if groups is None:
            groups = scan_tar(path)
            _write_index(kept, stamp, groups)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return groups


def scan_tar(path: AnyPath) -> list[Group]:
    """Makes the index of a shard; reads headers only. Raises OSError."""
    groups: dict[str, Group] = {}

    def spoil(key: str, problem: str) -> None:
        group = groups.get(key, Group(key, {}))
        groups[key] = group._replace(problem=group.problem or problem)

    size, end = size_of(path), 0  # end: of the members so far
    last, cut_off = None, False
    try:
        with open_regular(path, SCAN) as file, open_regular(path, SCAN) as raw:
            # Zeros and headers that cannot be read are passed block by block until one can.
            with tarfile.open(None, "r:", file, ignore_zeros=True) as tar:
                while (member := tar.next()) is not None:
                    split = None if member.isdir() else _split_name(member.name)
                    key = split and split[0]
                    if not _is_zero(raw, end, member.offset):
                        spoil(
                            f"{path.name}@{end}",
                            f"broken tar: no member up to byte {member.offset}",
                        )
                        # What is lost may belong to either; it may be the long name of the second.
                        for beside in filter(None, (last, key)):
                            spoil(beside, f"broken tar member: beside the damage at byte {end}")
                    # A size below 0 would lead back.
                    tar.offset = max(tar.offset, member.offset_data)
                    last, end = key, tar.offset
                    if split is None:
                        continue
                    members = groups.setdefault(key, Group(key, {})).members
                    if not member.isreg():
                        spoil(key, f"not a regular file: {member.name} is a link or a device")
                        continue
                    if split[1] in members:
                        spoil(key, f"broken tar member: {member.name} stands there twice")
                    if member.size < 0:
                        spoil(key, f"broken tar member: {member.name} has a size of {member.size}")
                        continue
                    if cut_off := member.offset_data + member.size > size:
                        problem = f"{member.name} is cut off at the end of the file"
                        spoil(key, f"broken tar member: {problem}")
                    members[split[1]] = (member.offset_data, member.size)
            if size <= end or not _is_zero(raw, end, size):
                raise tarfile.ReadError("no end mark" if size else "empty file")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        # The file ends early, or a header has a size or an extension that cannot be.
        if not cut_off:
            end = min(end, size)
            spoil(f"{path.name}@{end}", f"broken tar: {error}; members may be missing")
            if last is not None:
                spoil(last, f"broken tar member: beside the damage at byte {end}")
    return list(groups.values())


def _split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member's name; None where it has none."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def _is_zero(file: BinaryIO, start: int, stop: int) -> bool:
    """Whether nothing but padding stands between two places of a file."""
    file.seek(start)
    blocks = range(start, stop, tarfile.RECORDSIZE)
    return not any(file.read(min(blocks.step, stop - at)).strip(b"\0") for at in blocks)


def _read_index(path: AnyPath, stamp: list[int]) -> list[Group] | None:
    """The kept index, or None where it is missing, torn or of another file."""
    try:
        value = json.loads(path.read_bytes())
        if value["stamp"] != stamp:
            return None
        return [
            Group(key, {name: (at, size) for name, (at, size) in members.items()}, problem)
            for key, members, problem in value["groups"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # it is made again


def _write_index(path: AnyPath, stamp: list[int], groups: list[Group]) -> None:
    content = json.dumps({"stamp": stamp, "groups": groups}, separators=(",", ":")).encode()
    try:
        if in_bucket(path):
            write_atomic(path, content)
            return
        # Several processes may index a shard at once: each writes a file of its own.
        own = path.with_name(f"{path.name}.{os.getpid()}")
        write_atomic(own, content)
        own.replace(path)
    except (OSError, UserError) as error:
        print(f"a shard's index is not kept, and made anew each time: {error}", file=sys.stderr)
