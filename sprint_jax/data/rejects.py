"""Records that could not be used: named in a file, counted, and too many of them refused."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.errors import UserError
from ..core.files import write_atomic
from .sources.records import Rejected

FIRST = 100  # records seen before their share is judged: at the start a few say nothing


class Reject(NamedTuple):
    """A record that could not be used: its key, the name of its source, and why.

    ``reason`` begins with the kind of reason, up to a colon.
    """

    key: str
    source: str
    reason: str


def reject(rejected: Rejected, source: str) -> Reject:
    """What is kept of an exception; ``source`` is `Source.name`."""
    return Reject(rejected.key, source, rejected.reason)


def reject_line(rejected: Reject) -> bytes:
    """One line of rejected.jsonl: a JSON object with key, source and reason."""
    return json.dumps(rejected._asdict()).encode() + b"\n"


def write_rejects(path: str | Path, rejects: Sequence[Reject]) -> None:
    """Writes rejected.jsonl, whole; an empty file for no rejects. Raises UserError where it cannot."""
    write_atomic(Path(path), b"".join(map(reject_line, rejects)))


def read_rejects(path: str | Path) -> list[Reject]:
    """Reads what `write_rejects` wrote; nothing where there is no such file.

    Raises:
      UserError: the file has been damaged, naming the line.
    """
    path = Path(path)
    rejects = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            rejects.append(Reject(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number} is damaged: delete the file") from error
    return rejects


def check_rejects(
    rejects: Sequence[Reject], seen: int, limit: float, path: str | Path, *, total: int = FIRST
) -> None:
    """Stops a job in which too many records could not be used, once that is sure.

    As long as fewer than FIRST were seen, and fewer than there are, the share is that of so many.

    Args:
      rejects: those so far.
      seen: records so far, good or not.
      limit: the largest share of rejects that is accepted, 0 to 1.
      path: of rejected.jsonl, for the message.
      total: records in all, where that is known.

    Raises:
      UserError: with counts, the kinds of reason by frequency, and three examples.
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
