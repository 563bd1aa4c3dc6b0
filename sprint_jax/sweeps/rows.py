"""The rows of a sweep: which runs there are, where each lies, and how far it has come."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.workdir import read_metrics, read_workdir_config
from ..core.config import Config, load_config, load_functions
from ..core.errors import UserError
from ..training.checks import check_values

# With a hash behind it, below the 255 bytes that file systems allow.
NAME_LIMIT = 100
TAIL_BYTES = 64 * 1024  # some lines of metrics.jsonl
STEP = re.compile(rb'^{"step": (\d+),', re.MULTILINE)
PLAIN = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
      name: of its folder; made of its overrides alone.
      overrides: {dotted key: value with the type that the config wants}.
      config: resolved.
      folder: the run's workdir.
      arguments: of ``python -m sprint_jax.train``.
    """

    name: str
    overrides: dict[str, Any]
    config: Config
    folder: Path
    arguments: tuple[str, ...]

    def finished(self) -> bool:
        """Whether the folder holds this very run with a checkpoint of its last step."""
        if not (self.folder / "config.json").is_file():
            return False
        try:
            same = read_workdir_config(self.folder) == self.config
        except UserError:  # damaged; the run itself says so when it is started
            return False
        return same and self.checkpoint() >= self.config.steps

    def checkpoint(self) -> int:
        """Step of the newest checkpoint; 0 where there is none."""
        # Orbax renames a folder to its number when the checkpoint is whole.
        names = [path.name for path in (self.folder / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def last_step(self) -> int:
        """The newest step in metrics.jsonl, from its end alone; 0 where there is none."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            steps = STEP.findall(file.read())
        return int(steps[-1]) if steps else 0

    def metrics(self) -> list[dict[str, Any]]:
        """What the run has logged so far."""
        return read_metrics(self.folder / "metrics.jsonl")


def load_rows(spec: str, name: str, words: Sequence[str], workdir: Path) -> list[Row]:
    """Calls ``sweep_<name>()`` of a config file and checks all that it gives.

    Args:
      spec: ``FILE.py`` or ``FILE.py:WORDS``, as for training.
      name: of the sweep.
      words: ``--config.key=value``, for every row.
      workdir: gets one folder per row.

    Raises:
      UserError: exit code 2, for an unknown sweep, and for a row that is no dict, sets a wrong key or
        value, or repeats another; it names the row.
    """
    functions = load_functions(spec, "sweep_")
    if name not in functions:
        known = ", ".join(sorted(functions)) or "none"
        raise UserError(
            f"--sweep {name}: {spec.partition(':')[0]} has no sweep_{name}(); it has: {known}",
            exit_code=2,
        )
    listed = list(functions[name]())
    if not listed:
        raise UserError(f"sweep '{name}' has no rows", exit_code=2)
    base = load_config(spec, words)
    fixed = {word.removeprefix("--config.").partition("=")[0] for word in words}
    rows: dict[str, Row] = {}
    for number, overrides in enumerate(listed, 1):
        where = f"sweep '{name}', row {number} of {len(listed)} ({overrides!r:.120})"
        if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
            raise UserError(f"{where} must be a dict of dotted keys", exit_code=2)
        for key in overrides.keys() & fixed:
            raise UserError(f"{where}: --config.{key} is set for all rows", exit_code=2)
        try:
            config = base.override(overrides)
            check_values(config)
        except UserError as error:
            raise UserError(f"{where}: {error}", exit_code=2) from error
        row = _row(spec, words, overrides, config, workdir)
        if row.name in rows:
            before = list(rows).index(row.name) + 1
            raise UserError(f"{where} repeats row {before}", exit_code=2)
        rows[row.name] = row
    return list(rows.values())


def _row(spec, words, overrides, config, workdir: Path) -> Row:
    values = {key: _value(config, key) for key in sorted(overrides)}
    name = folder_name(values)
    flags = [f"--config.{key}={_text(value)}" for key, value in values.items()]
    folder = workdir / name
    # A string for a key whose default is None may read as a number on the command line.
    for flag in flags:
        key, _, text = flag.removeprefix("--config.").partition("=")
        if _value(config.override([flag]), key) != values[key]:
            raise UserError(
                f"config.{key}={text!r} cannot be written on a command line", exit_code=2
            )
    arguments = ("--config", spec, "--workdir", str(folder), *words, *flags)
    return Row(name, values, config, folder, arguments)


def folder_name(overrides: dict[str, Any]) -> str:
    """``key=value,key=value`` in the order of keys, readable and unique.

    A value with other characters than letters, digits and ``._+-`` (a path, a tuple), and a name that
    would be too long, is shortened, and a hash of all overrides follows.
    """
    if not overrides:
        return "base"
    parts, exact = [], True
    for key, value in sorted(overrides.items()):
        text = _text(value)
        exact &= bool(PLAIN.fullmatch(text)) and not isinstance(value, tuple)
        parts.append(f"{key}={'-'.join(PLAIN.findall(text))}")
    name = ",".join(parts)
    if exact and len(name) <= NAME_LIMIT:
        return name
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[:NAME_LIMIT]}_{digest}"


def _value(config: Config, key: str) -> Any:
    value = config
    for part in key.split("."):
        value = value[part]
    return value


def _text(value: Any) -> str:
    """A value as it stands on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_text, value)) + ("," if len(value) == 1 else "")
    return "none" if value is None else str(value)


def sweep_record(spec: str, name: str) -> bytes:
    """What sweep.json holds: which sweep a folder is of."""
    return (json.dumps({"config": spec, "sweep": name}, indent=2) + "\n").encode()


def check_same_sweep(workdir: Path, spec: str, name: str) -> None:
    """Refuses a folder of another sweep, whose results.csv would be lost.

    Raises:
      UserError: for another sweep, or a file in its place.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a directory")
    path = workdir / "sweep.json"
    if path.is_file() and path.read_bytes() != sweep_record(spec, name):
        raise UserError(
            f"--workdir {workdir} holds another sweep ({' '.join(path.read_text().split())}); "
            "use another --workdir"
        )
