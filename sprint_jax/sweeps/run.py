"""Runs the rows of a sweep as processes of their own, some at a time.

A row's output goes to ``log.txt`` in its folder. That file is also the lock of the row: the process
holds it as long as it lives, even if the sweep that started it is killed, so a second sweep waits
for it instead of training twice in one folder.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..checkpoints.workdir import LOG_FILE
from ..core.errors import UserError
from .rows import Row

TRAIN = (sys.executable, "-m", "sprint_jax.train")
LINE_LIMIT = 300
HEARTBEAT_SECONDS = 60.0


@dataclass
class Result:
    """How a row stands.

    Attributes:
      status: waiting, queued (with a batch system), running, done, failed, or stopped (by a signal to
        the sweep, with a checkpoint; unfinished).
      exit_code: of its last process; negative for a signal.
      error: the last line that it printed before it failed.
      seconds: wall clock of all its processes that this sweep saw end.
    """

    status: str = "waiting"
    exit_code: int | None = None
    error: str = ""
    seconds: float = 0.0


@dataclass
class _Child:
    process: subprocess.Popen
    began: float
    offset: int  # of log.txt when it started


class Interrupt:
    """Counts the signals that ask the sweep to stop, inside a ``with`` block."""

    def __init__(self):
        self.number, self.count = 0, 0

    def __enter__(self) -> "Interrupt":
        self._before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        self.number, self.count = number, self.count + 1


def run_rows(
    rows: Sequence[Row],
    results: dict[str, Result],
    changed: Callable[[Row, str], None],
    *,
    command: Sequence[str] = TRAIN,
    parallel: int = 1,
    heartbeat: Callable[[], None] = lambda: None,
    poll_seconds: float = 0.1,
) -> int:
    """Runs all rows that are not done; none of them can end the others.

    Args:
      rows, results: the sweep; ``results`` by name, changed in place.
      changed: called with (row, what happened) after each change of a result.
      command: before a row's arguments.
      parallel: how many processes at once.
      heartbeat: called every minute without a change.

    Returns:
      0, or the signal that stopped the sweep. SIGTERM and Ctrl-C go to the processes as SIGTERM, upon
      which `train` writes a checkpoint; a second signal kills them.
    """
    waiting = [row for row in rows if results[row.name].status != "done"]
    active: dict[str, tuple[Row, _Child]] = {}
    told = time.monotonic()
    forwarded = 0

    def tell(row: Row, what: str) -> None:
        nonlocal told
        told = time.monotonic()
        changed(row, what)

    with Interrupt() as interrupt:
        try:
            while active or (waiting and not interrupt.count):
                if interrupt.count > forwarded:
                    forwarded = interrupt.count
                    _forward(active, signal.SIGTERM if forwarded == 1 else signal.SIGKILL)
                for name, (row, child) in list(active.items()):
                    if child.process.poll() is not None:
                        del active[name]
                        tell(row, _end(row, child, results[name], bool(interrupt.count)))
                busy = len(active)
                for row in list(waiting):
                    if busy >= parallel or interrupt.count:
                        break
                    what, child = _try_start(row, results[row.name], command)
                    busy += child is not None or results[row.name].status == "running"
                    if results[row.name].status != "running" or child:
                        waiting.remove(row)
                    if child:
                        active[row.name] = row, child
                    if what:
                        tell(row, what)
                if time.monotonic() - told > HEARTBEAT_SECONDS:
                    told = time.monotonic()
                    heartbeat()
                time.sleep(poll_seconds)
        except BaseException:
            # A full disk under results.csv, say: what runs must not go on unseen.
            _forward(active, signal.SIGTERM)
            for _, child in active.values():
                child.process.wait()
            raise
    return interrupt.number


def _try_start(row: Row, result: Result, command) -> tuple[str, _Child | None]:
    """Starts a row, or finds it done, broken, or in the hands of an earlier sweep's process."""
    try:
        row.folder.mkdir(parents=True, exist_ok=True)
        with open(row.folder / LOG_FILE, "ab") as log:
            if not _lock(log):
                what = "" if result.status == "running" else "still runs from an earlier sweep"
                result.status = "running"
                return what, None
            if row.finished():
                result.status, result.error, result.exit_code = "done", "", 0
                return "done already", None
            words = [*command, *row.arguments]
            offset = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Of a group of its own: Ctrl-C reaches it through us alone, as SIGTERM.
                start_new_session=True,
            )
    except OSError as error:
        result.status, result.error = "failed", f"{error.filename}: {error.strerror}"
        return f"failed: {result.error}", None
    result.status, result.error, result.exit_code = "running", "", None
    return "started", _Child(process, time.monotonic(), offset)


def _lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forward(active: dict[str, tuple[Row, _Child]], number: int) -> None:
    for _, child in active.values():
        # The group, so that what a launch script started gets it too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, number)


def _end(row: Row, child: _Child, result: Result, stopping: bool) -> str:
    """Notes how a process ended, and says it in a few words."""
    code = child.process.returncode
    result.exit_code = code
    result.seconds += time.monotonic() - child.began
    if code == 0:
        result.status, result.error = "done", ""
        return f"done in {duration(result.seconds)}"
    if stopping:
        result.status, result.error = "stopped", ""
        return f"stopped, exit code {code}"
    result.status = "failed"
    result.error = last_error(row.folder / LOG_FILE, child.offset)
    if code < 0:
        killed = f"killed by {signal.Signals(-code).name}"
        result.error = f"{killed}; last line: {result.error}" if result.error else killed
    return f"failed, exit code {code}: {result.error}"


def last_error(path: Path, offset: int = 0) -> str:
    """The last line after ``offset`` that starts with ``error:``, or else the last with any text."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(offset, size - 64 * 1024))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:LINE_LIMIT]


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@contextlib.contextmanager
def only_sweep(workdir: Path) -> Iterator[None]:
    """Holds ``workdir`` for this process.

    Raises:
      UserError: when another sweep has it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "sweep.lock", "ab") as file:
        if not _lock(file):
            raise UserError(f"another sweep runs in --workdir {workdir}")
        yield


class Progress:
    """One line per change: how many rows stand where, and the time that is left.

    The estimate is steps still to be made over steps per second since the sweep began.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        results: dict[str, Result],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._rows, self._results, self._clock = rows, results, clock
        self._began = clock()
        self._first = {row.name: row.last_step() for row in rows}

    def line(self, what: str) -> str:
        """``2/6 done  1 failed  2 running  WHAT  ETA 0:10:00``."""
        states = [self._results[row.name].status for row in self._rows]
        words = [f"{states.count('done')}/{len(states)} done"]
        for status in ("failed", "stopped", "queued", "running", "waiting"):
            if status in states:
                words.append(f"{states.count(status)} {status}")
        return "  ".join([*words, what, *self._eta()])

    def running(self) -> str:
        """``NAME step 120/400, ...`` of the rows that run."""
        return ", ".join(
            f"{row.name} step {row.last_step()}/{row.config.steps}"
            for row in self._rows
            if self._results[row.name].status == "running"
        )

    def _eta(self) -> list[str]:
        made = left = 0
        for row in self._rows:
            step = row.last_step()
            made += max(0, step - self._first[row.name])
            if self._results[row.name].status in ("running", "waiting"):
                left += max(0, row.config.steps - step)
        if not (made and left):
            return []
        return [f"ETA {duration(left / made * (self._clock() - self._began))}"]
