"""The running of a sweep: its rows as trainings on this machine or jobs on SLURM, and its results."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..checkpoints import workdir as workdirs
from ..core.errors import UserError
from ..core.files import try_lock, write_atomic
from ..core.storage import AnyPath, in_bucket, make_folder
from .report import Ranking, draw, rank, write_results
from .rows import Row
from .slurm import submit_rows

# A training holds its log.txt locked as long as it lives, even if its sweep is killed. A process of the next
# sweep waits here for it, and then becomes a training of its own, which goes on from there.
WAIT = "import fcntl, os, sys; fcntl.flock(1, fcntl.LOCK_EX); os.execvp(sys.argv[1], sys.argv[1:])"


@contextlib.contextmanager
def claim(workdir: AnyPath, spec: str, name: str) -> Iterator[None]:
    """Holds a sweep's folder for this process. UserError if it is another sweep's, or one runs in it."""
    record = json.dumps({"config": spec, "sweep": name}, indent=2) + "\n"
    if in_bucket(workdir):
        with workdirs.claim(workdir, patience=0.0):
            path = workdir / "sweep.json"
            _check_sweep(workdir, path.read_text() if path.is_file() else "", record)
            write_atomic(path, record.encode())
            yield
        return
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a directory")
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "sweep.json", "a+", buffering=1) as file:
        if not try_lock(file):
            raise UserError(f"another sweep runs in --workdir {workdir}")
        file.seek(0)
        found = file.read()
        _check_sweep(workdir, found, record)
        file.write("" if found else record)
        yield


def _check_sweep(workdir: AnyPath, found: str, record: str) -> None:
    if found not in ("", record):
        raise UserError(f"--workdir {workdir} holds another sweep ({found.strip()})")


def run_sweep(
    workdir: AnyPath, rows: Sequence[Row], ranking: Ranking, command: Sequence[str], parallel: int
) -> None:
    """Runs or submits the unfinished rows, and keeps results.csv and results.png up to date.

    Args:
      command: the words before a row's arguments, ``parallel`` at once; none to submit them to SLURM.

    Raises:
      UserError: if rows failed, after all have had their turn.
      SystemExit: 128 + the signal that stopped the sweep.
    """
    results, picture = workdir / "results.csv", workdir / "results.png"

    def changed(row: Row | None) -> None:
        ranked = rank(rows, ranking)
        write_results(results, ranked, ranking)
        if row is None or row.status in ("done", "failed", "stopped"):
            draw(picture, ranked, ranking)
        what = [f"{n} {state}" for state, n in Counter(each.status for each in rows).items()]
        what += [f"{row.name} {row.status} {row.error}".rstrip()] if row else []
        print(", ".join(what), flush=True)

    for row in rows:
        if row.folder.is_file():
            raise UserError(f"{row.folder} is a file, in the place of a run's folder: move it away")
        make_folder(row.folder)
        if row.finished():
            row.status, row.exit_code = "done", 0
    unfinished = [row for row in rows if row.status != "done"]
    changed(None)
    signal_number = None
    if command:
        signal_number = run_rows(unfinished, command, parallel, changed)
    else:
        submit_rows(unfinished, changed)
    ranked = rank(rows, ranking)
    for index, metric in enumerate(ranking.metrics):
        if any(each.steps for each in ranked) and not any(each.curves[index][0] for each in ranked):
            print(f"warning: no run has logged {metric!r}", file=sys.stderr)
    print(f"results: {results}, {picture}", flush=True)
    if signal_number:
        sys.exit(128 + signal_number)
    if failed := [row.name for row in rows if row.status == "failed"]:
        more = f" and {len(failed) - 1} more" if failed[1:] else ""
        raise UserError(
            f"{len(failed)} of {len(rows)} runs failed: {failed[0]}{more}; see {results}"
        )


def run_rows(
    rows: Sequence[Row], command: Sequence[str], parallel: int, changed: Callable[[Row], None]
) -> int | None:
    """Runs rows as processes, ``parallel`` at once; none of them can end the others.

    Args:
      command: the words before a row's arguments.

    Returns:
      The signal that stopped the sweep, if one did. SIGTERM and Ctrl-C reach the processes as SIGTERM, upon
      which `train` writes a checkpoint; a second signal kills them.
    """
    waiting, running, signals, sent = [*rows], [], [], 0
    stops = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: signals.append(number)) for number in stops]
    try:
        while running or (waiting and not signals):
            while waiting and len(running) < parallel and not signals:
                row = waiting.pop(0)
                _start(row, command)
                running.append(row)
                changed(row)
            if sent < len(signals):
                _send(running, signal.SIGKILL if sent else signal.SIGTERM)
                sent += 1
            for row in [row for row in running if row.process.poll() is not None]:
                running.remove(row)
                _end(row, stopping=bool(signals))
                changed(row)
            time.sleep(0.1)
    finally:
        _send(running, signal.SIGTERM)  # after an error of the sweep itself, such as a full disk
        for row in running:
            row.process.wait()
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)
    return signals[0] if signals else None


def _start(row: Row, command: Sequence[str]) -> None:
    row.log.parent.mkdir(parents=True, exist_ok=True)
    with open(row.log, "ab") as log:
        row.log_start = log.tell()
        row.process = subprocess.Popen(
            [sys.executable, "-S", "-c", WAIT, *command, *row.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us alone, as SIGTERM
        )
    row.status = "running"


def _end(row: Row, stopping: bool) -> None:
    code = row.exit_code = row.process.returncode
    row.status = "done" if code == 0 else "stopped" if stopping else "failed"
    if row.status == "failed":
        row.error = last_error(row.log, row.log_start)
    if code < 0:
        row.error = f"killed by {signal.Signals(-code).name}  {row.error}".rstrip()
    if in_bucket(row.folder):
        try:
            write_atomic(row.folder / workdirs.LOG_FILE, row.log.read_bytes())
        except (OSError, UserError) as error:
            print(f"{row.log} is not copied: {error}", file=sys.stderr, flush=True)


def _send(rows: Sequence[Row], number: int) -> None:
    for row in rows:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(row.process.pid, number)  # the group: also what a launch script started


def last_error(path: Path, start: int) -> str:
    """Returns the last line after ``start`` that begins with ``error:``, or else the last with text."""
    text = path.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:300]
