"""Paths on disks and in buckets (``gs://``, ``s3://``), with the methods of pathlib in both cases.

A bucket has neither folders, renames nor appends. What is written there is written whole, an object at a time,
and the object that makes the others count comes last. Credentials are those of the environment, as the
provider's own tools find them; nothing here reads or prints them.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from .errors import UserError

AnyPath = Path | epath.Path
# By scheme: the package that reads it, and the extra of this project that installs it.
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Whose exceptions say what a provider or the network answered.
PROVIDERS = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")
PART = 64 << 20  # bytes that are on the way at once while a file is copied


def as_path(name: str | os.PathLike) -> AnyPath:
    """The path of a name that a user gave; nothing is looked up.

    Raises:
      UserError: exit code 2, for a scheme that is not known, a bucket without a name, or a package that its
        scheme needs and that is not installed.
    """
    text = os.fspath(name)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme not in SCHEMES:
        raise UserError(f"{text}: {scheme}:// is not known; give a local path, gs:// or s3://", 2)
    if not rest.partition("/")[0]:
        raise UserError(f"{text} names no bucket: {scheme}://BUCKET/PATH", 2)
    package, extra = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{text} needs {package}: pip install 'sprint_jax[{extra}]'", 2)
    import fsspec

    os.environ.setdefault("EPATH_USE_TF", "0")  # else etils takes TensorFlow where there is one
    # Other processes write to the same places: what was listed once is asked for again.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(text.rstrip("/"))


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is of a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def absolute(path: AnyPath) -> AnyPath:
    """The path from the root, links resolved; that of a bucket is one already."""
    return path if in_bucket(path) else path.resolve()


def make_folder(path: AnyPath) -> None:
    """Makes a folder and its parents, where there are such things."""
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def is_provider_error(error: BaseException) -> bool:
    """Whether an exception is a provider's or the network's answer, and no bug.

    Some of these are plain `OSError`, or `ValueError` for a bucket in the place of a file, which their packages
    raise.
    """
    modules = [type(error).__module__]
    if isinstance(error, OSError | ValueError):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        frames = frames if isinstance(error, OSError) else frames[-1:]
        modules += [frame.f_globals.get("__name__", "") for frame in frames]
    return any(module.partition(".")[0] in PROVIDERS for module in modules)


@contextlib.contextmanager
def answers_as_os_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns what a provider or the network says into an `OSError` with a number, words and the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", os.fspath(path)) from error
    except Exception as error:
        if not in_bucket(path) or not is_provider_error(error):
            raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(errno.EIO, words, os.fspath(path)) from error


def read_range(path: AnyPath, start: int, stop: int) -> bytes:
    """The bytes of a file from ``start`` to ``stop`` or its end, in one request; raises OSError."""
    if in_bucket(path):
        with answers_as_os_errors(path):
            return filesystem(path).cat_file(os.fspath(path), start=start, end=stop)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def read_ranges(
    paths: Sequence[AnyPath], starts: Sequence[int], stops: Sequence[int]
) -> list[bytes]:
    """The bytes of several ranges, those of a bucket all asked for at once; raises OSError."""
    if not paths or not in_bucket(paths[0]):
        return [read_range(*each) for each in zip(paths, starts, stops, strict=True)]
    names = [os.fspath(path) for path in paths]
    with answers_as_os_errors(paths[0]):
        files = filesystem(paths[0])
        return files.cat_ranges(names, list(starts), list(stops), on_error="raise")


def size_of(path: AnyPath) -> int:
    """The size of a file in bytes; raises OSError."""
    if in_bucket(path):
        with answers_as_os_errors(path):
            return filesystem(path).size(os.fspath(path))
    return path.stat().st_size


def filesystem(path: str | os.PathLike) -> Any:
    """fsspec's file system of a bucket's path."""
    import fsspec

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


class Entry(NamedTuple):
    """An object of a bucket: its size in bytes, and a word that changes with its content."""

    size: int
    mark: str


def walk(path: AnyPath) -> dict[str, Entry]:
    """The files below a folder of a bucket, by their path from there, sorted."""
    files, root = filesystem(path), os.fspath(path).partition("://")[2]
    with answers_as_os_errors(path):
        found = files.find(os.fspath(path), detail=True)
    return {name[len(root) :].strip("/"): _entry(info) for name, info in sorted(found.items())}


def stamp_of(path: AnyPath) -> list[int | str]:
    """What changes with a file: its size, and time of change or the provider's mark; raises OSError."""
    if in_bucket(path):
        with answers_as_os_errors(path):
            return list(_entry(filesystem(path).info(os.fspath(path))))
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _entry(info: dict[str, Any]) -> Entry:
    marks = (info[key] for key in ("etag", "ETag", "md5Hash", "mtime") if info.get(key))
    return Entry(info["size"], str(next(marks, "")))


def find(pattern: str) -> list[AnyPath]:
    """The files that a pattern of a bucket names, sorted; ``**`` stands for any folders."""
    scheme = pattern.partition("://")[0]
    return [as_path(f"{scheme}://{name}") for name in sorted(filesystem(pattern).glob(pattern))]


def open_file(path: AnyPath, block: int = 1 << 16) -> BinaryIO:
    """Opens a file to read from, one of a bucket by at least ``block`` bytes at a time; raises OSError."""
    if in_bucket(path):
        return filesystem(path).open(os.fspath(path), "rb", block_size=block)
    return path.open("rb")


def fetch(path: epath.Path, patterns: Sequence[str] = ("*",)) -> Path:
    """A copy of a bucket's file or folder on this machine, in the user's cache, made unless it is there.

    Args:
      patterns: of the files that are wanted, by their path below the folder.

    Raises:
      UserError: there is nothing at this path.
    """
    files, name = filesystem(path), os.fspath(path)
    found = walk(path)
    wanted = {file: mark for file, mark in found.items() if any(fnmatch(file, p) for p in patterns)}
    if not wanted:
        raise UserError(f"{path} does not exist, or has no {', '.join(patterns)}")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    mark = hashlib.sha256(repr((name, sorted(wanted.items()))).encode()).hexdigest()[:16]
    target = home / "sprint_jax_buckets" / mark / path.name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may come to this; each makes a copy of its own, and one keeps its name.
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=target.parent))
        try:
            for file in wanted:
                local = partial / path.name / file if file else partial / path.name
                local.parent.mkdir(parents=True, exist_ok=True)
                with answers_as_os_errors(path):
                    files.get_file(f"{name}/{file}" if file else name, str(local))
            try:
                (partial / path.name).replace(target)
            except OSError:
                if not target.exists():  # another one was first
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def local_copy(name: str | os.PathLike) -> Path:
    """The path of a file or folder on this machine; of one in a bucket, that of a copy (`fetch`)."""
    return fetch(as_path(name)) if in_bucket(name) else Path(name)


class Mirror:
    """A local folder whose files go to a bucket, those that changed, whenever `push` is called.

    Attributes:
      local: the folder, temporary; it goes with `close`.
    """

    def __init__(self, place: epath.Path):
        self.place = place
        self.local = Path(tempfile.mkdtemp(prefix="sprint_jax-"))
        self._pushed: dict[Path, tuple[int, int]] = {}

    def push(self, last: tuple[str, ...] = ()) -> None:
        """Copies what is new or has changed since it was copied, ``last`` after all others."""
        files = filesystem(self.place)
        paths = [path for path in sorted(self.local.rglob("*")) if path.is_file()]
        for path in sorted(paths, key=lambda path: path.name in last):
            status = path.stat()
            stamp = status.st_size, status.st_mtime_ns
            if self._pushed.get(path) != stamp:
                name = path.relative_to(self.local).as_posix()
                with answers_as_os_errors(self.place / name):
                    files.put_file(str(path), os.fspath(self.place / name), chunksize=PART)
                self._pushed[path] = stamp

    def close(self) -> None:
        """Removes the local folder."""
        shutil.rmtree(self.local, ignore_errors=True)


def local_path(name: str | os.PathLike) -> Path:
    """The path of a place that must be on this machine; UserError for one in a bucket."""
    if in_bucket(name):
        raise UserError(f"{os.fspath(name)} is in a bucket: this takes a path on this machine", 2)
    return Path(name)


@contextlib.contextmanager
def local_output(place: AnyPath, last: tuple[str, ...] = ()) -> Iterator[Path]:
    """A local folder whose files lie at ``place`` at the end, ``last`` written last; nothing after an error.

    ``place`` itself if it is local; that need not be there yet.
    """
    if not in_bucket(place):
        yield place
        return
    mirror = Mirror(place)
    try:
        yield mirror.local
        mirror.push(last)
    finally:
        mirror.close()
