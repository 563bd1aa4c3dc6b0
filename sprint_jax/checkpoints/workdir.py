"""Files of a training workdir that others read, and the lock of the process that writes them."""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

import jax

from ..core.config import Config, flatten
from ..core.errors import UserError
from ..core.files import read_json, try_lock, write_atomic, write_json_atomic
from ..core.storage import AnyPath, answers_as_os_errors, as_path, in_bucket

# Keys without which nothing can be done with a workdir.
NEEDED = ("stage", "sigma_d", "model.sample_size", "data.source", "data.world", "data.encoders")
NEEDED += ("flow.shift", "sampler.midpoint", "log.sample_guidance")
LOG_FILE = "log.txt"  # what a run prints, where nobody watches it
LOCK_FILE = ".lock"  # says which process trains here, and is locked by it
BEAT_FILE = ".lock.beat"  # in a bucket: written again and again by that process
STALE = 60.0  # seconds without that until the process counts as dead
HISTORY = (
    "history"  # in config.json, beside the config: [{"step": 120, "changed": {KEY: [OLD, NEW]}}]
)


@contextlib.contextmanager
def claim(workdir: AnyPath, patience: float = 60.0) -> Iterator[str]:
    """Holds a workdir for this process, made if missing; waits for a process that holds it.

    The lock goes when its process ends, however it ends. Yields the content of `LOCK_FILE`, which no other
    process writes. Folders that were made here and stayed empty are removed at the end.

    Raises:
      UserError: it cannot be made, or is still held after ``patience`` seconds.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a directory")
    if in_bucket(workdir):
        with _claim_in_bucket(workdir, patience) as mark:
            yield mark
        return
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path = workdir / LOCK_FILE
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _locked(path, patience)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
    mark = _mark()
    try:
        file.truncate(0)
        file.write(mark)
        file.flush()
        yield mark
    finally:
        with contextlib.suppress(OSError):  # of a disk that broke meanwhile
            path.unlink()
        file.close()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _mark() -> str:
    return f"process {os.getpid()} on host {socket.gethostname()} since {time.ctime()}"


@contextlib.contextmanager
def _claim_in_bucket(workdir: AnyPath, patience: float) -> Iterator[str]:
    """`claim` where there are no locks: the holder writes `BEAT_FILE` again and again.

    Two processes that start within the same second may both come through; a holder whose host was cut off
    for longer than ``STALE`` seconds is taken for dead.
    """
    path, beat, mark, over = workdir / LOCK_FILE, workdir / BEAT_FILE, _mark(), threading.Event()
    deadline, told = time.monotonic() + patience, False
    seen, since = None, time.monotonic()
    while (holder := _text(path)) and not _is_dead(holder):
        found = _text(beat)
        if found != seen:
            seen, since = found, time.monotonic()
        if time.monotonic() - since > STALE:
            break
        if time.monotonic() > deadline + STALE:
            raise UserError(
                f"--workdir {workdir} is in use: {holder} trains there; one run at a time, or another --workdir"
            )
        if not told:
            line = f"--workdir {workdir} is in use: {holder}; waiting {patience + STALE:g} s for its end"
            print(line, file=sys.stderr, flush=True)
            told = True
        time.sleep(1.0)

    def keep() -> None:
        while not over.wait(STALE / 6):
            with contextlib.suppress(OSError, UserError):  # the next one tells
                write_atomic(beat, f"{time.time()}".encode())

    write_atomic(beat, f"{time.time()}".encode())
    write_atomic(path, mark.encode())
    thread = threading.Thread(target=keep, name="workdir", daemon=True)
    thread.start()
    try:
        yield mark
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):  # a bucket that cannot be reached: the next one waits
            if _text(path) == mark:
                with answers_as_os_errors(path):
                    path.unlink()
                    beat.unlink()


def _text(path: AnyPath) -> str:
    """What a small object holds; nothing where there is none. Raises OSError."""
    try:
        with answers_as_os_errors(path):
            return path.read_text()
    except FileNotFoundError:
        return ""


def _is_dead(mark: str) -> bool:
    """Whether a mark is of a process of this host that is there no more."""
    match = re.match(r"process (\d+) on host (\S+) ", mark)
    if match is None or match[2] != socket.gethostname() or int(match[1]) == os.getpid():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _locked(path: AnyPath, patience: float) -> TextIO:
    """Opens and locks a lock file, once nobody else holds it."""
    deadline, told = time.monotonic() + patience, False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # its holder may have removed it
        file = path.open("a+")
        held = not try_lock(file)
        # A lock of a file that its holder has removed meanwhile holds nobody off.
        if not held and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.seek(0)
        holder = file.read() or "another process"
        file.close()
        if held and time.monotonic() > deadline:
            raise UserError(
                f"--workdir {path.parent} is in use: {holder} trains there; one run at a time, or another "
                "--workdir"
            )
        if held and not told:
            line = (
                f"--workdir {path.parent} is in use: {holder}; waiting {patience:g} s for its end"
            )
            print(line, file=sys.stderr, flush=True)
            told = True
        time.sleep(0.2)


def read_metrics(path: str | AnyPath) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl in file order; torn lines are left out."""
    path = as_path(path)
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # Also bytes that are not UTF-8: a crash may leave a block of zeros.
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def read_workdir_config(workdir: str | AnyPath) -> Config:
    """The resolved config of a training workdir.

    Raises:
      UserError: if there is none, or it is damaged or not of a training.
    """
    path = as_path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a training workdir: it has no config.json")
    content = read_json(path)
    content.pop(HISTORY, None)
    try:
        config = Config(content)
    except ValueError as error:  # UserError, and of ml_collections for names that are no keys
        raise UserError(f"{path}: {error}") from error
    missing = [key for key in NEEDED if key not in flatten(config)]
    if missing:
        raise UserError(f"{path} is not of a training: it has no key {missing[0]!r}")
    return config


def write_workdir_config(
    workdir: AnyPath, config: Config, step: int, changes: dict[str, list]
) -> None:
    """Writes config.json, on process 0 only, with the history of what changed at which step, and says it.

    Args:
      changes: {dotted key: [old, new]} since the last time; "absent" stands for a key that was not there.
    """
    path = workdir / "config.json"
    history = read_json(path).get(HISTORY, []) if path.is_file() else []
    if changes and step:
        history.append({"step": step, "changed": changes})
        words = [f"{key} {old} -> {new}" for key, (old, new) in changes.items()]
        if jax.process_index() == 0:
            print(f"{workdir}: from step {step} on {', '.join(words)}", flush=True)
    write_json_atomic(path, config.to_dict() | ({HISTORY: history} if history else {}))


def is_student(config: Config) -> bool:
    """Whether a training's config is of a student: a network that embeds guidance and takes 1 to 4 steps."""
    return config.stage == "distill"
