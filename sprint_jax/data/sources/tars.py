"""Tar shards in WebDataset's layout, by random access; their headers are indexed once."""

import concurrent.futures
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ...core.errors import UserError
from ...core.files import write_atomic
from .files import FileSource, Item, Span, make_printable
from .images import EXTENSIONS, MAX_PIXELS
from .records import hash_identity

THREADS = 8  # that index shards: on a network's disk they wait more than they work
VERSION = 1  # of a kept index; another is made anew
BLOCK = 512


class Group(NamedTuple):
    """The files of one key in a shard: extension -> (offset, size) in bytes, or why they are of no use."""

    key: str
    members: dict[str, tuple[int, int]]
    problem: str | None = None


def open_tars(paths: Sequence[str | os.PathLike], name: str | None = None) -> FileSource:
    """Opens tar shards in WebDataset's layout: an image, and ``.txt`` or ``.json``, of one name.

    A key is WebDataset's ``__key__`` (`index_tar`); where a key occurs in several shards, all keys have the
    shard's path before them. Captions are as in `caption_files`, with Sana's ``SHARD_MODEL.json`` beside the
    shards. A group needs exactly one image. Shards are indexed at the first opening, with progress.

    Args:
      paths: of the shards, ``*.tar`` without compression.
      name: of the source in messages; the paths if left out.

    Raises:
      UserError: a shard that is missing or compressed or cannot be read, or no image in any of them.
    """
    shards = [Path(path).expanduser() for path in paths]
    name = name or ", ".join(map(str, shards))
    for path in shards:
        if path.suffix != ".tar":
            raise UserError(
                f"shard {path} is not a .tar: unpack or rewrite it, without compression"
            )
        if not path.is_file():
            raise UserError(f"shard {path} is not there, or not a file")
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        bar = dict(delay=5, mininterval=5, leave=False, unit="shard")
        indexed = list(tqdm(pool.map(index_tar, shards), f"index {name}", len(shards), **bar))
    if not any(EXTENSIONS & group.members.keys() for groups in indexed for group in groups):
        raise UserError(f"{name} has no image: are these tar shards in WebDataset's layout?")
    models = _find_models(shards)
    files = [*shards, *(file for files in models.values() for file in files)]
    sizes = [(file.name, file.stat().st_size) for file in files]
    # A tar is filled up to whole blocks: its size alone does not show a change.
    identity = hash_identity("tar", [MAX_PIXELS, *sizes, *indexed])
    items = list(_make_items(shards, indexed, models))
    return FileSource(items, name=name, identity=identity, keep_models=True)


def _make_items(shards, indexed, models: dict[Path, list[Path]]) -> Iterator[Item]:
    counts = Counter(group.key for groups in indexed for group in groups)
    once = len(counts) == counts.total()
    common = os.path.commonpath([path.absolute().parent for path in shards])
    for path, groups in zip(shards, indexed, strict=True):
        shard = path.absolute().relative_to(common).with_suffix("").as_posix()
        file, others = str(path), tuple(map(str, models.get(path, ())))
        for group in groups:
            key, bad_name = make_printable(group.key if once else f"{shard}/{group.key}")
            spans = {name: Span(file, *place) for name, place in group.members.items()}
            images = sorted(EXTENSIONS & spans.keys())
            problem = bad_name or group.problem
            if len(images) != 1 and problem is None:
                found = ", ".join(images or sorted(spans))
                problem = f"{'several' if images else 'no'} images in a group: it has {found}"
            image = None if problem else spans[images[0]]
            captions = spans.get("txt"), spans.get("json")
            yield Item(key, image, *captions, others, group.key, problem=problem)


def _find_models(shards: Sequence[Path]) -> dict[Path, list[Path]]:
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


def index_tar(path: Path) -> list[Group]:
    """Lists the groups of a shard in its order, from the kept index where that is of this very file.

    Members belong together by their path up to the first dot of the file name, which is the key, without
    a leading ``./``; what follows the dot is the extension, in lower case (WebDataset's rule). Members
    that are no files, hidden ones and those without a dot are left out. Damage becomes the problem of
    the group that it can be told to belong to, or of one named ``SHARD.tar@BYTE``; members after it are
    found again.

    The index is kept beside the shard as ``.NAME.index.json``, with the file's size and time of change; where
    it cannot be written, a line on stderr says so.

    Raises:
      UserError: the file cannot be read.
    """
    kept = path.with_name(f".{path.name}.index.json")
    try:
        status = path.stat()
        stamp = [VERSION, status.st_size, status.st_mtime_ns]
        groups = _read_index(kept, stamp)
        if groups is None:
            groups = scan_tar(path)
            _write_index(kept, stamp, groups)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return groups


def scan_tar(path: Path) -> list[Group]:
    """Makes the index of a shard; reads headers only. Raises OSError."""
    groups: dict[str, Group] = {}
    size = path.stat().st_size
    end = 0  # of what has been read
    try:
        # Zeros and headers that cannot be read are passed block by block until one can.
        with path.open("rb") as file, tarfile.open(None, "r:", file, ignore_zeros=True) as tar:
            while (member := tar.next()) is not None and tar.offset > end:
                nameless = _note_damage(groups, path, end, member.offset)
                end = tar.offset
                if member.isreg():
                    _add_member(groups, member, size, nameless)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        # Of a member that ends after the file, and of one whose extended header is damaged: the rest of
        # the file is then named as damaged.
        if size > end:
            _spoil(groups, f"{path.name}@{end}", f"broken tar: {error}; the rest is lost")
            return list(groups.values())
    if size > end:
        if _note_damage(groups, path, end, size):
            _spoil(groups, f"{path.name}@{end}", "broken tar: ends in the header of a name")
    elif size == end:
        what = "no end mark, members may be missing" if size else "empty file"
        _spoil(groups, f"{path.name}@{size}", f"broken tar: {what}")
    return list(groups.values())


def _add_member(groups: dict[str, Group], member, size: int, nameless: bool) -> None:
    """Puts a file into its group; ``nameless``: the header before it, with its true name, is damaged."""
    if (split := _split_name(member.name)) is None:
        return
    key, extension = split
    group = groups.setdefault(key, Group(key, {}))
    if nameless:
        _spoil(groups, key, f"broken tar member: {member.name} may have had another name")
    if extension in group.members:
        _spoil(groups, key, f"broken tar member: {member.name} stands there twice")
    elif member.offset_data + member.size > size:
        _spoil(groups, key, f"broken tar member: {member.name} is cut off at the end of the file")
    group.members[extension] = (member.offset_data, member.size)


def _split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member's name; None where it has none."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def _note_damage(groups: dict[str, Group], path: Path, start: int, stop: int) -> bool:
    """Notes what stands between two members, or after the last, if it is not padding with zeros.

    Returns:
      Whether it was the header of a long or non-ASCII name, which the member after it then lacks.
    """
    noted = nameless = False
    with path.open("rb") as file:
        file.seek(start)
        for at in range(start, stop, BLOCK):
            block = file.read(min(BLOCK, stop - at))
            header = block[257:262] == b"ustar"
            # The first block counts, and every one after it that still looks like a header.
            if block.count(0) == len(block) or (noted and not header):
                continue
            noted, nameless = True, header and block[156:157] in (b"x", b"L")
            # The name is the first 100 bytes of a header; it may be whole where the rest is not.
            name = block[:100].partition(b"\0")[0].decode(errors="replace")
            split = _split_name(name) if name.isprintable() and "\ufffd" not in name else None
            if split is not None and not nameless:
                problem = f"broken tar member: {name} has a damaged header at byte {at}"
                _spoil(groups, split[0], problem)
            elif not nameless:
                _spoil(groups, f"{path.name}@{at}", f"broken tar: no member up to byte {stop}")
    return nameless


def _spoil(groups: dict[str, Group], key: str, problem: str) -> None:
    group = groups.get(key, Group(key, {}))
    groups[key] = group._replace(problem=group.problem or problem)


def _read_index(path: Path, stamp: list[int]) -> list[Group] | None:
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


def _write_index(path: Path, stamp: list[int], groups: list[Group]) -> None:
    content = json.dumps({"stamp": stamp, "groups": groups}, separators=(",", ":")).encode()
    # Several processes may index a shard at once: each writes a file of its own.
    own = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        write_atomic(own, content)
        own.replace(path)
    except (OSError, UserError) as error:
        print(f"a shard's index is not kept, and made anew each time: {error}", file=sys.stderr)
