"""Files of a training workdir that others read, and the lock of the process that writes them."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from ..core.config import Config
from ..core.errors import UserError
from ..core.files import read_json, try_lock, write_json_atomic

LOG_FILE = "log.txt"  # what a run prints, where nobody watches it
LOCK_FILE = ".lock"  # says which process trains here, and is locked by it
HISTORY = (
    "history"  # in config.json, beside the config: [{"step": 120, "changed": {KEY: [OLD, NEW]}}]
)


@contextlib.contextmanager
def claim(workdir: Path, patience: float = 60.0) -> Iterator[str]:
    """Holds a workdir for this process, made if missing; waits for a process that holds it.

    The lock goes when its process ends, however it ends. Yields the content of `LOCK_FILE`, which no other
    process writes. Folders that were made here and stayed empty are removed at the end.

    Raises:
      UserError: it cannot be made, or is still held after ``patience`` seconds.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a directory")
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path = workdir / LOCK_FILE
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _locked(path, patience)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
    mark = f"process {os.getpid()} on host {socket.gethostname()} since {time.ctime()}"
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


def _locked(path: Path, patience: float) -> TextIO:
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


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl in file order; torn lines are left out."""
    path = Path(path)
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # Also bytes that are not UTF-8: a crash may leave a block of zeros.
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def read_workdir_config(workdir: str | Path) -> Config:
    """The resolved config of a training workdir.

    Raises:
      UserError: if there is none, or it is damaged or not of a training.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a training workdir: it has no config.json")
    content = read_json(path)
    content.pop(HISTORY, None)
    config = Config(content)
    missing = [key for key in ("stage", "model", "data", "sampler", "flow") if key not in config]
    if missing:
        raise UserError(f"{path} is not of a training: it has no key {missing[0]!r}")
    return config


def write_workdir_config(
    workdir: Path, config: Config, step: int, changes: dict[str, list]
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
