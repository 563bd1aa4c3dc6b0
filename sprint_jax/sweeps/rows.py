"""The rows of a sweep: its runs, their folders and their state."""

import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import complete_steps
from ..checkpoints.workdir import LOG_FILE, read_workdir_config
from ..core.config import Config, load_config, load_functions
from ..core.errors import UserError
from ..core.storage import AnyPath, in_bucket
from ..training.checks import check_values

NAME_LIMIT = 100  # with a hash behind it, below the 255 bytes that file systems allow
PLAIN = re.compile(r"[\w.+-]+")


@dataclass(eq=False)
class Row:
    """One run of a sweep, and its state as far as this sweep knows it.

    Attributes:
      overrides: {dotted key: value as text}; name: of its folder, made of them.
      config: resolved; folder: the run's workdir; arguments: of ``python -m sprint_jax.train``.
      status: waiting, queued (SLURM), running, done, failed, or stopped (by a signal to the sweep).
      exit_code: of its last process, negative for a signal; error: what it printed before it failed.
      process: its training on this machine; log_start: where its output begins in log.txt.
    """

    name: str
    overrides: dict[str, str]
    config: Config
    folder: AnyPath
    arguments: tuple[str, ...]
    status: str = "waiting"
    exit_code: int | None = None
    error: str = ""
    process: subprocess.Popen | None = None
    log_start: int = 0

    def same_as(self, other: "Row") -> bool:
        """Returns whether two rows have one folder, or are one run."""
        return self.name == other.name or self.overrides == other.overrides

    @property
    def log(self) -> Path:
        """The file of what its training prints; for a run in a bucket below ``logs`` of the current folder."""
        local = Path("logs", os.fspath(self.folder).partition("://")[2])
        return (local if in_bucket(self.folder) else Path(self.folder)) / LOG_FILE

    def finished(self) -> bool:
        """Returns whether the folder holds this very run with a checkpoint of its last step."""
        if self.config.steps not in complete_steps(self.folder / "checkpoints"):
            return False
        try:
            return read_workdir_config(self.folder) == self.config
        except UserError:  # damaged: the run itself reports it when it is started
            return False


def load_rows(spec: str, name: str, words: Sequence[str], workdir: AnyPath) -> list[Row]:
    """Calls ``sweep_<name>()`` of a config file and checks every row that it returns.

    Args:
      spec, words: ``FILE.py[:WORDS]`` and ``--config.key=value``, as for training.

    Raises:
      UserError: exit code 2; it names a row that sets a wrong key or value, or repeats another.
    """
    functions = load_functions(spec, "sweep_")
    if name not in functions:
        known = ", ".join(sorted(functions)) or "none"
        raise UserError(f"{spec} has no sweep_{name}(); its sweeps: {known}", exit_code=2)
    listed = list(functions[name]())
    if not listed:
        raise UserError(f"sweep_{name}() of {spec} has no rows", exit_code=2)
    rows: dict[str, Row] = {}
    for number, overrides in enumerate(listed, 1):
        try:
            row = _load_row(spec, words, overrides, workdir)
            same = [n for n, other in enumerate(rows.values(), 1) if row.same_as(other)]
            if same:
                raise UserError(f"repeats row {same[0]}")
        except UserError as error:
            where = f"row {number} of {len(listed)} of sweep_{name}(), {overrides!r:.120}"
            raise UserError(f"{where}: {error}", exit_code=2) from error
        rows[row.name] = row
    return list(rows.values())


def _load_row(spec: str, words: Sequence[str], overrides: Any, workdir: AnyPath) -> Row:
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise UserError("a row must be a dict of dotted keys")
    texts = {key: _text(value) for key, value in sorted(overrides.items())}
    name = texts.pop("name", "")
    if name and not re.fullmatch(r"[\w+-]+", name):
        raise UserError(f"name {name!r} has other characters than letters, digits and _+-")
    for key in texts.keys() & {word[len("--config.") :].partition("=")[0] for word in words}:
        raise UserError(f"--config.{key} is set for all rows on the command line")
    words = [*words, *(f"--config.{key}={text}" for key, text in texts.items())]
    config = load_config(spec, words)
    check_values(config)
    folder = workdir / (name or folder_name(texts))
    arguments = ("--config", spec, "--workdir", str(folder), *words)
    return Row(folder.name, texts, config, folder, arguments)


def folder_name(texts: dict[str, str]) -> str:
    """Returns ``key=value,key=value``, or ``base`` for no overrides.

    A name that would be too long, or has a value of other characters than letters, digits and ``._+-``
    (a path, a tuple), is shortened, and a hash of the overrides follows.
    """
    name = ",".join(f"{key}={'-'.join(PLAIN.findall(text))}" for key, text in texts.items())
    if all(map(PLAIN.fullmatch, texts.values())) and len(name) <= NAME_LIMIT:
        return name or "base"
    return f"{name[:NAME_LIMIT]}_{hashlib.sha256(repr(texts).encode()).hexdigest()[:8]}"


def _text(value: Any) -> str:
    """Writes a value as it stands on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(_text, value)) + ("," if len(value) == 1 else "")
    return "none" if value is None else str(value)
