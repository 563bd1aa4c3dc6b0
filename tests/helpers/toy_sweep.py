"""A sweep whose trainings are stood in for by sweep_train.py, for several tests."""

import csv
import json
import sys
import time
from collections import Counter
from pathlib import Path

from helpers.runs import ROOT

from launch import sweep as command
from sprint_jax.sweeps import drive
from sprint_jax.sweeps.rows import load_rows

TOY = """
from configs import default
from sprint_jax.sweeps import chain, product, sweep

def get_config(arg=None):
    c = default.get_config()
    c.steps = 6
    return c

def sweep_seed():
    return sweep("seed", [0, 1, 2, 3])

def sweep_lr():
    return product(sweep("optimizer.learning_rate", [1e-4, 3e-4]), sweep("seed", [0, 1]))

def sweep_kinds():
    return chain([{}], sweep("ladd.taps", [(1, 2), (3,), ()]), sweep("init", ["a/b", "a b"]),
                 sweep("scm.mean_norm", [True]))

def sweep_unknown():
    return chain(sweep("seed", [0]), sweep("optimizer.learning_rat", [1e-4]))

def sweep_wrong():
    return [{"seed": 0}, {"seed": "many"}]

def sweep_small():
    return sweep("data.batch_size", [64, 0])

def sweep_twice():
    return sweep("optimizer.learning_rate", [1e-4, 0.0001])

def sweep_words():
    return ["seed=1"]

def sweep_empty():
    return []
"""


FAKE = (sys.executable, "-S", str(ROOT / "tests" / "sweep_train.py"))


class ToySweep:
    """The toy sweep over seeds 0 to 3 in a folder, and what its runs do."""

    def __init__(self, folder: Path, monkeypatch):
        self.home, self.workdir, self.config = folder, folder / "sweep", folder / "toy.py"
        self.config.write_text(TOY)
        self.rows = load_rows(str(self.config), "seed", [], self.workdir)
        for row in self.rows:
            (folder / f"{row.name}.json").write_text(json.dumps(row.config.to_dict()))
        self.behave()
        monkeypatch.setenv("SWEEP_HOME", str(folder))
        monkeypatch.setattr(drive, "TRAIN", FAKE)

    def behave(self, **by_seed: str) -> None:
        named = {f"seed={key[1:]}": value for key, value in by_seed.items()}
        (self.home / "behaviour.json").write_text(json.dumps(named))

    def arguments(self, *flags: str) -> list[str]:
        base = ["--config", str(self.config), "--sweep", "seed", "--workdir", str(self.workdir)]
        return [*base, *flags]

    def run(self, *flags: str) -> None:
        command.main(self.arguments(*flags))

    def results(self) -> dict[str, dict]:
        """results.csv by run, in its order."""
        with (self.workdir / "results.csv").open(newline="") as file:
            return {line["run"].removeprefix("seed="): line for line in csv.DictReader(file)}

    def starts(self) -> dict[str, int]:
        text = (self.home / "starts").read_text() if (self.home / "starts").exists() else ""
        return dict(Counter(line.removeprefix("seed=") for line in text.split()))


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
