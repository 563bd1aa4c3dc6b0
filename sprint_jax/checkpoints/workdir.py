"""Files of a training workdir that others read: config.json, metrics.jsonl, log.txt."""

import json
from pathlib import Path
from typing import Any

import jax

from ..core.config import Config
from ..core.errors import UserError
from ..core.files import read_json, write_json_atomic

LOG_FILE = "log.txt"  # what a run prints, where nobody watches it
HISTORY = (
    "history"  # in config.json, beside the config: [{"step": 120, "changed": {KEY: [OLD, NEW]}}]
)


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
