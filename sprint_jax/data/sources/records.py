"""What every image source gives: a record, or the reason why there is none."""

import errno
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ...core.errors import UserError

_MISSING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)


class Caption(NamedTuple):
    """One caption of an image: ``weight`` (at least 0) is how often it is drawn beside the others, ``score``
    its CLIP score where one is known."""

    text: str
    weight: float = 1.0
    score: float | None = None


class Record(NamedTuple):
    """An image as it is meant to be seen, its captions and its key.

    ``image`` is uint8 [H, W, 3], RGB, upright, transparency over white. ``captions`` has at least one; an
    image without any has ``''``, the null prompt. ``key`` is unique in its source and stays the same
    whatever form the source has.
    """

    key: str
    image: np.ndarray
    captions: tuple[Caption, ...]


class Rejected(Exception):
    """A record that cannot be used: its key, or the best name there is, and the reason in a few words."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self):
        return Rejected, (self.key, self.reason)  # an exception is pickled with its message alone


def cannot_read(key: str, error: OSError, path: object = "") -> Exception:
    """What to raise where a record's file cannot be read: `Rejected` for one that is not there or not for us.

    Anything else, such as an input/output error, is the disk's fault or the network's: it would come and go, so
    that good records were lost, and is a UserError.
    """
    where = f"{path}: " if path else ""
    if error.errno in _MISSING:
        return Rejected(key, f"cannot be read: {where}{error.strerror}")
    return UserError(f"cannot read {path or key}: {error.strerror or error}; run it again later")


class Source(Protocol):
    """Random access to records, from any thread.

    Attributes:
      name: the source in the user's words, for messages.
      identity: hash of what the source is (files, sizes, options): an interrupted encoding goes on only with
        the same.
    """

    name: str
    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record; raises `Rejected`."""
        ...

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        """Key and (height, width) as the record's image will have, read from headers; raises `Rejected`."""
        ...


def hash_identity(kind: str, parts: Iterable[object]) -> str:
    """The `Source.identity` of a kind of source that is what these parts say, in their order: 64 hex digits."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        # surrogateescape: names of files need not be UTF-8.
        digest.update(b"\0" + str(part).encode(errors="surrogateescape"))
    return digest.hexdigest()


def fingerprint(path: Path) -> tuple[str, int, str]:
    """Name, size and hash of the last 256 KiB of a file, where ArrayRecord keeps the places of its records.

    The size alone is that of whole blocks. Raises OSError.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 18)))
        return path.name, size, hashlib.sha256(file.read()).hexdigest()
