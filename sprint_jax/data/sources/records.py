"""Records of an image and its captions, and the interface of sources of them."""

import bisect
import errno
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ...core.errors import UserError
from ...core.storage import AnyPath, read_range, size_of
from ...parallel.sharding import from_everyone

_MISSING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
_MISSING += (errno.ENODEV, errno.ENAMETOOLONG)


class Caption(NamedTuple):
    """One caption of an image: ``weight`` (at least 0) is how often it is drawn beside the others, ``score``
    its CLIP score where one is known."""

    text: str
    weight: float = 1.0
    score: float | None = None


class Record(NamedTuple):
    """An image, uint8 RGB [H, W, 3], upright, over white; its captions, at least one; and its unique key.

    An image without a caption has ``''``, the null prompt. ``control`` is a map of the image, in any size, for
    a control branch.
    """

    key: str
    image: np.ndarray
    captions: tuple[Caption, ...]
    control: np.ndarray | None = None


class Rejected(Exception):
    """A record that cannot be used: its key, or the best name there is, and the reason in a few words.

    The reason begins with its kind, up to a colon.
    """

    def __init__(self, key: str, reason: str):
        self.key, self.reason = key, " ".join(reason.split())
        super().__init__(f"{key}: {self.reason}")


class Source(Protocol):
    """Random access to records, from any thread.

    Attributes:
      name: the source in the user's words, for messages.
      identity: hash of its files, sizes and options; an interrupted encoding goes on with the same alone.
    """

    name: str
    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Reads the record; raises `Rejected`."""
        ...

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        """Reads key and (height, width) of the record's image from headers; raises `Rejected`."""
        ...


class Concatenation:
    """Sources one after the other as one, for `encode`.

    The keys of several sources have the number of the source before them, from 0, as in ``0/cat``.
    """

    def __init__(self, sources: Sequence[Source]):
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources]).tolist()
        self.name = ", ".join(source.name for source in sources)
        self.identity = hash_identity("all", [source.identity for source in sources])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Reads the record; raises `Rejected`."""
        number = bisect.bisect_right(self._ends, index)
        source = self._sources[number]
        prefix = f"{number}/" if len(self._sources) > 1 else ""
        try:
            record = source[index - self._ends[number] + len(source)]
        except Rejected as rejected:
            raise Rejected(prefix + rejected.key, rejected.reason) from rejected
        return record._replace(key=prefix + record.key)


def cannot_read(key: str, error: OSError, path: object) -> Exception:
    """Returns what to raise where a record's file cannot be read: `Rejected` for a missing or forbidden one, or
    what is no regular file.

    Anything else, such as an input/output error, is a UserError: it would lose good records.
    """
    if error.errno in _MISSING:
        return Rejected(key, f"cannot be read: {path}: {error.strerror}")
    return UserError(f"cannot read {path}: {error.strerror or error}; run it again later")


def hash_identity(kind: str, parts: Iterable[object]) -> str:
    """Hashes a kind of source and what it consists of, in that order, to a `Source.identity`: 64 hex digits."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        # surrogateescape: names of files need not be UTF-8.
        digest.update(b"\0" + str(part).encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_same(name: str, mark: bytes) -> None:
    """Raises UserError if processes see other images in a source, by a hash of them; all call it together."""
    everyone = from_everyone(np.frombuffer(mark, np.uint8))
    for process, other in enumerate(everyone):
        if (other != everyone[0]).any():
            raise UserError(
                f"process {process} sees other images in {name} than process 0: do all hosts have the same "
                "config.data.images, whole?"
            )


def fingerprint(path: AnyPath) -> tuple[str, int, str]:
    """Name, size and hash of the last 256 KiB of a file, where ArrayRecord keeps the places of its records.

    The size alone does not show a change: files are filled up to whole blocks. Raises OSError.
    """
    size = size_of(path)
    tail = read_range(path, max(0, size - (1 << 18)), size)
    return path.name, size, hashlib.sha256(tail).hexdigest()
