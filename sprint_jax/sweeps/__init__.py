"""Sweeps: many runs of one config, from overrides that the config file itself lists.

A config file defines ``sweep_<name>()``, which gives a list of overrides, dicts of dotted keys::

    from sprint_jax.sweeps import product, sweep

    def sweep_lr():
        "Which learning rate, and how much is luck."
        return product(sweep("optimizer.learning_rate", [1e-4, 3e-4]), sweep("seed", [0, 1]))

Four pure functions build such lists; ``launch/sweep.py`` runs them (see `plan`, `run`, `submit`,
`report`).
"""

import builtins
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from ..core.errors import UserError

Overrides = dict[str, Any]


def sweep(key: str, values: Iterable[Any]) -> list[Overrides]:
    """One override per value: ``sweep("seed", [0, 1])`` is ``[{"seed": 0}, {"seed": 1}]``."""
    return [{key: value} for value in values]


def product(*parts: Sequence[Overrides]) -> list[Overrides]:
    """Every combination, the last part fastest.

    Raises:
      UserError: when two parts set one key.
    """
    return [_merged(rows) for rows in itertools.product(*parts)]


def zip(*parts: Sequence[Overrides]) -> list[Overrides]:
    """The first of all parts together, then the second, ...

    Raises:
      UserError: when two parts set one key, or differ in length.
    """
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        raise UserError(f"zip of sweeps of {lengths} rows: give all the same length", exit_code=2)
    return [_merged(rows) for rows in builtins.zip(*parts, strict=True)]


def chain(*parts: Sequence[Overrides]) -> list[Overrides]:
    """One part after the other; ``[{}]`` is the config as it stands."""
    return list(itertools.chain(*parts))


def _merged(rows: Iterable[Overrides]) -> Overrides:
    merged: Overrides = {}
    for row in rows:
        for key in row.keys() & merged.keys():
            raise UserError(f"two parts of a sweep set {key!r}", exit_code=2)
        merged |= row
    return merged
