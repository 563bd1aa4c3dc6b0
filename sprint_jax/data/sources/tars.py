"""Tar shards as WebDataset has them, by random access."""

import concurrent.futures
import functools
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...core.errors import UserError
from .caption_files import captions_beside, parse_json
from .images import EXTENSIONS, MAX_PIXELS, decode_image, measure_image
from .records import Record, Rejected, cannot_read, hash_identity
from .tar_index import Group, index_tar

THREADS = 8  # that index shards: on a network's disk they wait more than they work


class TarSource:
    """The groups of tar shards, shard by shard in their order; see `open_tars`."""

    def __init__(
        self,
        groups: Sequence[tuple[Path, str, Group]],
        models: dict[Path, list[Path]],
        name: str,
        identity: str,
        max_pixels: int,
    ):
        self.name, self.identity = name, identity
        self._groups, self._models, self._max_pixels = groups, models, max_pixels
        self._values: dict[Path, Any] = {}  # of Sana's files, each read once

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Record:
        """The record; raises `Rejected`."""
        path, key, group = self._groups[index]
        data = self._read(path, key, _image_of(key, group))
        image = decode_image(data, key, max_pixels=self._max_pixels)
        text, json_bytes = (
            self._read(path, key, group.members[name]) if name in group.members else None
            for name in ("txt", "json")
        )
        models = [(file.stem, self._value(file, key)) for file in self._models.get(path, ())]
        captions = captions_beside(key, text, json_bytes, models, entry=group.key)
        return Record(key, image, captions)

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        """Key and (height, width), from the headers of the image; raises `Rejected`."""
        path, key, group = self._groups[index]
        place = _image_of(key, group)
        try:
            with path.open("rb", buffering=0) as file:
                member = io.BufferedReader(_Member(file.fileno(), *place))
                return key, measure_image(member, key, max_pixels=self._max_pixels)
        except OSError as error:
            raise cannot_read(key, error, path) from error

    def _value(self, path: Path, key: str) -> Any:
        if path not in self._values:
            try:
                self._values[path] = parse_json(path.read_bytes(), key, path.name)
            except OSError as error:
                raise cannot_read(key, error, path) from error
        return self._values[path]

    def _read(self, path: Path, key: str, place: tuple[int, int]) -> bytes:
        offset, size = place
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise cannot_read(key, error, path) from error
        if len(data) < size:
            raise Rejected(key, f"broken tar member: {path.name} has shrunk since it was indexed")
        return data


def open_tars(
    paths: Sequence[str | os.PathLike],
    *,
    name: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    max_pixels: int = MAX_PIXELS,
) -> TarSource:
    """Opens tar shards in WebDataset's layout: an image, and ``.txt`` or ``.json``, of one name.

    A key is WebDataset's ``__key__`` (`tar_index.index_tar`); where a key occurs in several shards, all
    keys have the shard's path before them. Captions are as in `caption_files`, with Sana's
    ``SHARD_MODEL.json`` beside the shards, which stay in memory once they are read. A group needs
    exactly one image. Shards are indexed at the first opening, with progress.

    Args:
      paths: of the shards, ``*.tar`` without compression.
      name: of the source in messages; the paths if left out.
      cache_dir: of indices; beside the shards if left out.
      max_pixels: see `images.decode_image`.

    Raises:
      UserError: a shard that is missing or compressed or cannot be read, or no image in any of them.
    """
    shards = [Path(path).expanduser() for path in paths]
    name = ", ".join(map(str, shards)) if name is None else name
    for path in shards:
        if path.suffix != ".tar":
            raise UserError(
                f"shard {path} is not a .tar: unpack or rewrite it, without compression"
            )
        if not path.is_file():
            raise UserError(f"shard {path} is not there, or not a file")
    index = functools.partial(
        index_tar, cache_dir=None if cache_dir is None else Path(cache_dir).expanduser()
    )
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(index, shards)
        bar = tqdm(
            found, f"index {name}", len(shards), delay=5, mininterval=5, leave=False, unit="shard"
        )
        indexed = list(bar)
    if not any(EXTENSIONS & group.members.keys() for groups in indexed for group in groups):
        raise UserError(f"{name} has no image: are these tar shards in WebDataset's layout?")
    models = _models_beside(shards)
    files = [*shards, *(file for files in models.values() for file in files)]
    sizes = [(file.name, file.stat().st_size) for file in files]
    # A tar is filled up to whole blocks: its size alone does not show a change.
    identity = hash_identity("tar", [max_pixels, *sizes, *indexed])
    return TarSource(_with_keys(shards, indexed), models, name, identity, max_pixels)


def _with_keys(
    shards: Sequence[Path], indexed: Sequence[Sequence[Group]]
) -> list[tuple[Path, str, Group]]:
    """(shard, key, group) of every group, with keys that are there once."""
    counts = Counter(group.key for groups in indexed for group in groups)
    common = os.path.commonpath([path.absolute().parent for path in shards])
    keyed = []
    for path, groups in zip(shards, indexed, strict=True):
        shard = path.absolute().relative_to(common).with_suffix("").as_posix()
        for group in groups:
            key = group.key if len(counts) == counts.total() else f"{shard}/{group.key}"
            printable = key.encode(errors="backslashreplace").decode()
            if printable != key:
                group = group._replace(problem="bad file name: not UTF-8")
            keyed.append((path, printable, group))
    return keyed


def _models_beside(shards: Sequence[Path]) -> dict[Path, list[Path]]:
    """Sana's files beside each shard, sorted; a file belongs to the shard of the longest fitting name."""
    files: dict[Path, list[Path]] = {}
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


def _image_of(key: str, group: Group) -> tuple[int, int]:
    """Where the image of a group lies: offset and size in bytes; raises `Rejected`."""
    if group.problem is not None:
        raise Rejected(key, group.problem)
    images = sorted(EXTENSIONS & group.members.keys())
    if len(images) != 1:
        found = ", ".join(images or sorted(group.members))
        raise Rejected(key, f"{'several' if images else 'no'} images in a group: it has {found}")
    return group.members[images[0]]


class _Member(io.RawIOBase):
    """A part of a file as a file of its own, for reading."""

    def __init__(self, descriptor: int, offset: int, size: int):
        self._descriptor, self._offset, self._size, self._at = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: bytearray) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._descriptor, length, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
