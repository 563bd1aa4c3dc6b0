"""The records of a bucket, by place: increasing record numbers, found by searches in compact indices."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

Bucket = tuple[int, int]

BLOCK = 4096  # records that are looked through for one of them


class Members(Protocol):
    """Increasing numbers of records. Where no hash is needed, an increasing array of int64 is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Numbers, [n] int64, of the records at places [n] int64."""
        ...

    def hash(self) -> bytes:
        """A hash of all the numbers, or of what they follow from."""
        ...


Buckets = Mapping[Bucket, Members]


class Runs:
    """`Members` that stand next to each other in runs: 16 bytes a run.

    Args:
      starts, counts: of each run its first record and its number of records, at least 1; both [runs].
    """

    def __init__(self, starts: Sequence[int], counts: Sequence[int]):
        self._starts = np.asarray(starts, np.int64)
        self._ends = np.cumsum(np.asarray(counts, np.int64))
        self._shift = self._starts - np.concatenate([[0], self._ends[:-1]])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        places = np.asarray(places, np.int64)
        return places + self._shift[np.searchsorted(self._ends, places, side="right")]

    def hash(self) -> bytes:
        return hashlib.sha256(self._starts.tobytes() + self._ends.tobytes()).digest()


class Surveyed:
    """Records of a source by a number for each, such as that of its size.

    Args:
      numbers: [records], small integers, of a file that is mapped into memory, or in it; below 0 for none.
      kinds: how many numbers there are.
    """

    def __init__(self, numbers: np.ndarray, kinds: int):
        self.numbers = numbers
        # Of each number, those before each block: [blocks + 1, kinds].
        self._before = np.zeros((-(-len(numbers) // BLOCK) + 1, kinds), np.int64)
        part = BLOCK * 256  # at a time, so that no thread waits long
        for start in range(0, len(numbers), part):
            values = numbers[start : start + part].astype(np.int64)
            blocks = np.arange(len(values)) // BLOCK * (kinds + 1)
            stop = -(-len(values) // BLOCK)
            counts = np.bincount(blocks + np.maximum(values, -1) + 1, minlength=stop * (kinds + 1))
            first = start // BLOCK + 1
            self._before[first : first + stop] = counts.reshape(stop, -1)[:, 1:]
        np.cumsum(self._before, axis=0, out=self._before)

    @property
    def counts(self) -> np.ndarray:
        """The number of records of each kind, [kinds] int64."""
        return self._before[-1]

    @functools.cached_property
    def hash(self) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(self.numbers)).digest()

    def select(self, kinds: Sequence[int]) -> "Selected":
        """The records of one kind, or of several together."""
        return Selected(self, np.array(kinds, np.int64), self._before[:, list(kinds)].sum(1))


class Selected:
    """`Members` of some kinds in a `Surveyed`: 8 bytes a block."""

    def __init__(self, survey: Surveyed, kinds: np.ndarray, before: np.ndarray):
        self._survey, self._kinds, self._before = survey, kinds, before
        self._wanted = np.zeros(len(survey.counts) + 1, bool)  # the last is that of -1
        self._wanted[kinds] = True

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        places = np.asarray(places, np.int64)
        blocks = np.searchsorted(self._before, places, side="right") - 1
        found = BLOCK * blocks
        for k, (block, inside) in enumerate(
            zip(blocks, places - self._before[blocks], strict=True)
        ):
            values = self._survey.numbers[block * BLOCK : (block + 1) * BLOCK]
            found[k] += np.flatnonzero(self._wanted[values])[inside]
        return found

    def hash(self) -> bytes:
        return hashlib.sha256(self._survey.hash + self._kinds.tobytes()).digest()


class Without:
    """`Members` but those at some places: 8 bytes a place.

    Args:
      places: different ones, increasing.
    """

    def __init__(self, members: Members, places: np.ndarray):
        self._members, self._count = members, len(members) - len(places)
        # Of each that is left out, how many of the others stand before it.
        self._before = np.asarray(places, np.int64) - np.arange(len(places))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        places = np.asarray(places, np.int64)
        return self._members[places + np.searchsorted(self._before, places, side="right")]
