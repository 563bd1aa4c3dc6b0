"""Files of a training workdir that others read: config.json, metrics.jsonl, log.txt."""

import json
from pathlib import Path
from typing import Any

from ..core.config import Config
from ..core.errors import UserError

LOG_FILE = "log.txt"  # what a run prints, where nobody watches it


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
      UserError: if there is none, or it is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a training workdir: it has no config.json")
    try:
        return Config(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); is it damaged?") from error
