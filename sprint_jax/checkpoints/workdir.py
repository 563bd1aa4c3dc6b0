"""Files of a training workdir that others read: config.json, metrics.jsonl, log.txt."""

import json
from typing import Any

from ..core.config import Config, flatten
from ..core.errors import UserError
from ..core.files import read_json
from ..core.storage import AnyPath, as_path

# Keys without which nothing can be done with a workdir.
NEEDED = ("stage", "sigma_d", "model.sample_size", "data.source", "data.world", "data.encoders")
NEEDED += ("flow.shift", "sampler.midpoint", "log.sample_guidance")
LOG_FILE = "log.txt"  # what a run prints, where nobody watches it


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
    try:
        config = Config(read_json(path))
    except ValueError as error:  # UserError, and of ml_collections for names that are no keys
        raise UserError(f"{path}: {error}") from error
    missing = [key for key in NEEDED if key not in flatten(config)]
    if missing:
        raise UserError(f"{path} is not of a training: it has no key {missing[0]!r}")
    return config


def is_student(config: Config) -> bool:
    """Whether a training's config is of a student: a network that embeds guidance and takes 1 to 4 steps."""
    return config.stage == "distill"
