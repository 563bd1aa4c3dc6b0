"""Records that could not be used: named in rejected.jsonl, counted, and limited in their share."""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..core.errors import UserError
from ..core.files import write_atomic
from ..core.storage import AnyPath, in_bucket
from .sources.records import Rejected

REJECTED = "rejected.jsonl"
FIRST = 100  # records seen before their share is judged: at the start a few mean nothing
REWRITE_SECONDS = 30.0  # between two versions of the file in a bucket
PRINTED = 20  # rejects that are printed; all are in the file


class Reject(NamedTuple):
    """A record that could not be used: its key, the name of its source, and why; see `Rejected`."""

    key: str
    source: str
    reason: str

    def line(self) -> bytes:
        """A line of rejected.jsonl."""
        return json.dumps(self._asdict()).encode() + b"\n"


def write_rejects(path: AnyPath, rejects: Sequence[Reject]) -> None:
    """Writes rejected.jsonl, whole; an empty file for no rejects. Raises UserError where it cannot."""
    write_atomic(path, b"".join(reject.line() for reject in rejects))


def check_rejects(
    rejects: Sequence[Reject], seen: int, limit: float, path: AnyPath, *, total: int
) -> None:
    """Raises UserError, with counts, kinds of reason and three examples, where too many cannot be used.

    Args:
      rejects: those so far; seen: records so far, good or not; total: records in all. The share is at least
        that of FIRST records, or of all where there are fewer.
      limit: the largest share that is accepted, 0 to 1.
      path: of rejected.jsonl, for the message.
    """
    if len(rejects) <= limit * max(seen, min(total, FIRST)):
        return
    kinds = Counter(reject.reason.partition(":")[0] for reject in rejects)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    examples = "; ".join(f"{reject.key} ({reject.reason})" for reject in rejects[:3])
    raise UserError(
        f"{len(rejects)} of {seen} records cannot be used, more than config.data.max_rejected = {limit:g}: "
        f"{counts}. For example: {examples}. All are in {path}: mend the data or raise the limit"
    )


class RejectLog:
    """Records that a training met and could not use: printed once each, added to a file, limited.

    The file is this process's rejected.jsonl in ``folder``, if any; what it names already is not added again.
    """

    def __init__(self, folder: AnyPath | None, limit: float, process: int = 0):
        name = REJECTED.replace(".", f"-{process}.") if process else REJECTED
        self._path = None if folder is None else folder / name
        self._limit, self._total = limit, 0
        self._found: dict[tuple[str, str], Reject] = {}
        self._lock, self._due = threading.Lock(), 0.0
        content = b""
        if self._path is not None and self._path.is_file():
            content = self._path.read_bytes()
            if torn := content.rpartition(b"\n")[2]:  # a killed process may leave half a line
                content = content.removesuffix(torn)
                write_atomic(self._path, content)
        self._written = set(content.splitlines(keepends=True))

    def count(self, records: int) -> None:
        """Adds the records of a source, good or not, to those of which rejects are a share."""
        self._total += records

    def add(self, rejected: Rejected, source: str) -> None:
        """Notes one. Raises UserError once they are too many."""
        found = Reject(rejected.key, source, rejected.reason)
        with self._lock:
            if (source, found.key) in self._found:
                return
            self._found[source, found.key] = found
            if found.line() not in self._written:
                self._write(found)
            if len(self._found) > self._limit * self._total:
                self._due = 0.0
                if self._path is not None and in_bucket(self._path):
                    self._rewrite(found.line())
                rejects = list(self._found.values())
                path = self._path or Path(REJECTED)
                check_rejects(rejects, self._total, self._limit, path, total=self._total)

    def _write(self, found: Reject) -> None:
        if len(self._found) <= PRINTED:
            more = " (no more are printed)" if len(self._found) == PRINTED else ""
            line = f"left out: {found.key} of {found.source}: {found.reason}{more}"
            tqdm.write(line, file=sys.stderr)
        if self._path is not None:
            try:
                if in_bucket(self._path):
                    self._rewrite(found.line())
                    return
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab") as file:
                    file.write(found.line())
            except OSError as error:
                raise UserError(f"cannot write {self._path}: {error.strerror}") from error

    def _rewrite(self, line: bytes) -> None:
        """Adds a line to the file of a bucket, which takes whole files alone: not too often."""
        self._written.add(line)
        if time.monotonic() >= self._due:
            write_atomic(self._path, b"".join(sorted(self._written)))
            self._due = time.monotonic() + REWRITE_SECONDS
