"""Where the members of a tar shard lie: read once from its headers, kept beside it."""

import hashlib
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from ...core.errors import UserError
from ...core.files import write_atomic

VERSION = 1  # of what is kept; another is indexed anew
BLOCK = 512


class Group(NamedTuple):
    """The files of one key in a shard: extension -> (offset, size) in bytes, or why they are of no use."""

    key: str
    members: dict[str, tuple[int, int]]
    problem: str | None = None


def index_tar(path: Path, cache_dir: Path | None = None) -> list[Group]:
    """The groups of a shard in its order, from the kept index where that is of this very file.

    Members belong together by their path up to the first dot of the file name, which is the key, without
    a leading ``./``; what follows the dot is the extension, in lower case (WebDataset's rule). Members
    that are no files, hidden ones and those without a dot are left out. Damage becomes the problem of
    the group that it can be told to belong to, or of one named ``SHARD.tar@BYTE``; members that stand
    after it are found again.

    The index is kept beside the shard as ``.NAME.index.json``, or in ``cache_dir``; where it cannot be
    written, a line on stderr says so. It is of this file by size and time of change.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        status = path.stat()
        stamp = [VERSION, status.st_size, status.st_mtime_ns]
        kept = _index_path(path, cache_dir)
        groups = _read_index(kept, stamp)
        if groups is None:
            groups = scan_tar(path)
            _write_index(kept, stamp, groups)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return groups


def scan_tar(path: Path) -> list[Group]:
    """`index_tar` without anything kept; reads headers only. Raises OSError."""
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


def _add_member(
    groups: dict[str, Group], member: tarfile.TarInfo, size: int, nameless: bool
) -> None:
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
    name = name.removeprefix("./")
    folder, slash, file = name.rpartition("/")
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
            # Of what stands there the first block counts, and every one that still looks like a header.
            if block.count(0) == len(block) or (noted and not header):
                continue
            noted, nameless = True, header and block[156:157] in (b"x", b"L")
            # The name is the first 100 bytes of a header; it may be whole where the rest is not.
            name = block[:100].partition(b"\0")[0].decode(errors="replace")
            split = _split_name(name) if name.isprintable() and "\ufffd" not in name else None
            if nameless:
                continue
            if split is None:
                _spoil(groups, f"{path.name}@{at}", f"broken tar: no member up to byte {stop}")
            else:
                why = f"broken tar member: {name} has a damaged header at byte {at}"
                _spoil(groups, split[0], why)
    return nameless


def _spoil(groups: dict[str, Group], key: str, problem: str) -> None:
    group = groups.get(key, Group(key, {}))
    groups[key] = group._replace(problem=group.problem or problem)


def _index_path(path: Path, cache_dir: Path | None) -> Path:
    if cache_dir is None:
        return path.with_name(f".{path.name}.index.json")
    # Shards of one name lie in several folders.
    folder = hashlib.sha256(os.fsencode(path.absolute().parent)).hexdigest()[:16]
    return cache_dir / f"{folder}-{path.name}.index.json"


def _read_index(path: Path, stamp: list[int]) -> list[Group] | None:
    """What was kept, or None where that is missing, torn or of another file."""
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
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(own, content)
        own.replace(path)
    except (OSError, UserError) as error:
        print(
            f"the index of a shard is not kept, and made anew each time: {error}", file=sys.stderr
        )
