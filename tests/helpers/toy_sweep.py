"""A sweep whose trainings are stood in for by sweep_train.py."""

import contextlib
import csv
import json
import sys
import threading
from collections import Counter
from pathlib import Path

from launch import sweep as command
from sprint_jax.sweeps.rows import load_rows

TOY = """
from configs import default
from sprint_jax.sweeps import chain, product, sweep

def get_config(arg=None):
    c = default.get_config()
    c.steps = 6
    return c

kinds = chain([{}], sweep("ladd.taps", [(1, 2), (3,), ()]), sweep("init", ["a/b", "a b"]),
              sweep("scm.mean_norm", [True]))
sweep_kinds = lambda: kinds
sweep_seed = lambda: sweep("seed", [0, 1, 2, 3])
sweep_lr = lambda: product(sweep("optimizer.learning_rate", [1e-4, 3e-4]), sweep("seed", [0, 1]))
sweep_unknown = lambda: chain(sweep("seed", [0]), sweep("optimizer.learning_rat", [1e-4]))
sweep_wrong = lambda: sweep("seed", [0, "many"])
sweep_small = lambda: sweep("data.batch_size", [64, 0])
sweep_twice = lambda: sweep("optimizer.learning_rate", [1e-4, 0.0001])
sweep_words = lambda: ["seed=1"]
sweep_empty = lambda: []
"""

FAKE = (sys.executable, "-S", str(Path(__file__).with_name("sweep_train.py")))


class ToySweep:
    """The toy sweep over seeds 0 to 3 in a folder, and the behaviour of its runs."""

    def __init__(self, folder: Path, monkeypatch):
        self.home, self.workdir, self.config = folder, folder / "sweep", folder / "toy.py"
        self.config.write_text(TOY)
        self.rows = load_rows(str(self.config), "seed", [], self.workdir)
        for row in self.rows:
            (folder / f"{row.name}.json").write_text(json.dumps(row.config.to_dict()))
        self.behave()
        monkeypatch.setenv("SWEEP_HOME", str(folder))
        monkeypatch.setitem(command.COMMANDS, "local", FAKE)

    def behave(self, **by_seed: str) -> None:
        named = {f"seed={key[1:]}": value for key, value in by_seed.items()}
        (self.home / "behaviour.json").write_text(json.dumps(named))

    def arguments(self, *flags: str, name: str = "seed") -> list[str]:
        words = ("--config", self.config, "--sweep", name, "--workdir", self.workdir, *flags)
        return list(map(str, words))

    def run(self, *flags: str) -> None:
        command.main(self.arguments(*flags))

    def results(self) -> dict[str, dict]:
        """Returns results.csv by seed, in its order."""
        with (self.workdir / "results.csv").open(newline="") as file:
            return {line["run"].removeprefix("seed="): line for line in csv.DictReader(file)}

    def column(self, name: str) -> list[str]:
        """Returns a column of results.csv in the order of seeds."""
        return [line[name] for _, line in sorted(self.results().items())]

    def starts(self) -> dict[str, int]:
        text = (self.home / "starts").read_text() if (self.home / "starts").exists() else ""
        return dict(Counter(line.removeprefix("seed=") for line in text.split()))

    def logged(self, seed: int) -> bool:
        return (self.workdir / f"seed={seed}" / "metrics.jsonl").exists()

    def checkpoint(self, seed: int, step: int) -> bool:
        return (self.workdir / f"seed={seed}" / "checkpoints" / str(step)).exists()


@contextlib.contextmanager
def meanwhile(function):
    """Runs a function in a thread beside the ``with`` block, and joins it."""
    thread = threading.Thread(target=function)
    thread.start()
    yield
    thread.join()
