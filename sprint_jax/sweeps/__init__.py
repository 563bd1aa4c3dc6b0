"""Sweeps: many runs of one config, from lists of overrides that a config file's ``sweep_<name>()`` returns.

    def sweep_lr():
        return product(sweep("optimizer.learning_rate", [1e-4, 3e-4]), sweep("seed", [0, 1]))

The functions here build such lists; ``launch/sweep.py`` runs them (docs/sweeps.md).
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from ..core.errors import UserError

Overrides = dict[str, Any]  # {dotted key: value}


def sweep(key: str, values: Iterable[Any]) -> list[Overrides]:
    """Returns one override per value: ``sweep("seed", [0, 1])`` is ``[{"seed": 0}, {"seed": 1}]``."""
    return [{key: value} for value in values]


def product(*parts: Sequence[Overrides]) -> list[Overrides]:
    """Returns every combination, the last part varying fastest. UserError if two parts set one key."""
    return [_merged(rows) for rows in itertools.product(*parts)]


def together(*parts: Sequence[Overrides]) -> list[Overrides]:
    """Returns the first rows of all parts merged, then the second rows, ... UserError if lengths differ."""
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        raise UserError(f"together() needs parts of one length, not {lengths} rows", exit_code=2)
    return [_merged(rows) for rows in zip(*parts, strict=True)]


def chain(*parts: Sequence[Overrides]) -> list[Overrides]:
    """Returns the rows of all parts, one part after the other; ``[{}]`` is the config unchanged."""
    return list(itertools.chain(*parts))


def _merged(rows: Sequence[Overrides]) -> Overrides:
    keys = [key for row in rows for key in row]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"two parts of a sweep set {key!r}", exit_code=2)
    return {key: value for row in rows for key, value in row.items()}
