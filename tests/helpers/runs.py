"""Trainings of the shipped configs, shrunk to two blocks of 32 features, for several tests.

Compiling is what they cost: they do without most of XLA's optimizations, and a command started here
shares the compilation cache of the tests (see conftest.py).
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds

from sprint_jax import train
from sprint_jax.checkpoints.workdir import read_metrics
from sprint_jax.core import cli
from sprint_jax.core.config import Config, load_config
from sprint_jax.data import feed
from sprint_jax.digits.dataset import Digits, DigitsConfig, open_digits
from sprint_jax.digits.worlds import World, get_world
from sprint_jax.parallel import sharding
from sprint_jax.training import setup
from sprint_jax.training.stages import lower_updates

ROOT = Path(__file__).parents[2]
BATCH = 16
TINY = {
    "model.num_layers": 2,
    "model.num_attention_heads": 1,
    "model.num_cross_attention_heads": 1,
    "model.scan": True,
    "data.batch_size": BATCH,
    "log.every": 1,
    "log.exam": 16,
}


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Most of XLA's optimizations are off, here and in the commands that are started meanwhile."""
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    before = jax.config.read(name.lower())
    jax.clear_caches()  # programs that earlier tests compiled with all optimizations round otherwise
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "1")
        jax.config.update(name.lower(), True)
        try:
            yield
        finally:
            jax.config.update(name.lower(), before)


def write_digits(folder: Path, world: str = "small") -> Path:
    """Builds a world of few scenes in ``folder``; trainings take what they find there."""
    if not (folder / "digits" / world).exists():
        few = World(get_world(world).cells, train=200, test=20)
        with tfds.core.registered.skip_registration():
            # A class of its own, since TFDS remembers each class's configs; found by its name.
            fields = {"BUILDER_CONFIGS": [DigitsConfig(name=world, world=few)], "name": "digits"}
            kind = type("Digits", (Digits,), fields | {"__module__": Digits.__module__})
        kind(data_dir=folder, config=world, file_format="array_record").download_and_prepare()
    assert len(open_digits(folder, world, "train")) == 200
    return folder


def overrides(spec: str, data: Path, **changes: Any) -> dict[str, Any]:
    """Dotted keys and values that shrink a shipped config; ``a__b=1`` in ``changes`` sets a.b."""
    values = TINY | {"data.dir": str(data)}
    if "student" in spec:
        values["ladd.taps"] = (1,)
    return values | {name.replace("__", "."): value for name, value in changes.items()}


def tiny(spec: str, data: Path, **changes: Any) -> Config:
    return load_config(str(ROOT / spec), overrides(spec, data, **changes))


def words(spec: str, data: Path, workdir: Path, **changes: Any) -> list[str]:
    """The command line after ``train`` for `tiny` of the same arguments."""

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    values = overrides(spec, data, **changes)
    flags = [f"--config.{name}={text(value)}" for name, value in values.items()]
    return ["--config", str(ROOT / spec), "--workdir", str(workdir), *flags]


# Changes of a student's config: between them every kind of fake score, critic, and way to make images.
RECIPES = {
    "flow map and trajectories": {
        "ladd.weight": 0.0,
        "scm.weight": 0.0,
        "meanflow.weight": 1.0,
        "model.flow_map": True,
        "trajectory.weight": 1.0,
        "trajectory.steps": 3,
        "dmd.weight": 1.0,
        "images.balance": True,
    },
    "twinflow with a critic of its own": {
        "twinflow.weight": 1.0,
        "images.balance": True,
        "ladd.features": "copy",
        "ladd.loss": "relativistic",
        "ladd.paired": True,
        "ladd.misaligned": False,
        "ladd.clean": True,
        "ladd.r1": 0.1,
        "ladd.r2": 0.1,
        "ladd.penalty_noise": 0.01,
    },
    "rcm with a critic on the fake score": {
        "dmd.weight": 0.5,
        "dmd.decoupled": True,
        "ladd.features": "fake",
        "ladd.loss": "softplus",
        "ladd.pooled": True,
        "ladd.kernel": 1,
        "images.balance": True,
        "images.rollout": 2,
    },
}


class Ended(NamedTuple):
    """A command that is over: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr that starts with ``error:``; it is the last, with no traceback."""
        lines = self.err.splitlines()
        assert "Traceback" not in self.err, self.err
        assert [line.startswith("error: ") for line in lines].count(True) == 1, self.err
        assert lines[-1].startswith("error: "), self.err
        return lines[-1]


def run_here(arguments: list[str], monkeypatch, capfd, main=train.main) -> Ended:
    """Runs a command in this process, through `cli.run_command`, as ``python -m`` would."""
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        try:
            cli.run_command(main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return Ended(code, *capfd.readouterr())


def train_here(c: Config, workdir: Path) -> Path:
    """Runs `train.train`; returns the workdir."""
    train.train(c, workdir)
    return workdir


def start(arguments: list[str], module: str = "train") -> subprocess.Popen:
    """Starts a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"sprint_jax.{module}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> Ended:
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, err)


def wait_for(ready: Callable[[], Any], *processes: subprocess.Popen, timeout: float = 300) -> None:
    """Waits for ``ready()``, with all these processes still running; else ends them."""
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline or any(each.poll() is not None for each in processes):
            raise AssertionError([each.kill() or each.communicate() for each in processes])
        time.sleep(0.002)


def signal_when(process: subprocess.Popen, number: int, ready: Callable[[], Any]) -> Ended:
    """Sends a signal as soon as ``ready()``; the process must still be running then."""
    wait_for(ready, process)
    process.send_signal(number)
    return finish(process)


def records(workdir: Path) -> dict[int, dict]:
    """metrics.jsonl by step, without what a clock measured; each step must be there once."""
    found = read_metrics(workdir / "metrics.jsonl")
    steps = [record["step"] for record in found]
    assert len(set(steps)) == len(steps), steps
    clean = [{k: v for k, v in record.items() if not k.startswith("time/")} for record in found]
    return dict(zip(steps, clean, strict=True))


def checkpoint_steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_state(workdir: Path, step: int) -> dict:
    """All arrays of a checkpoint, read by Orbax alone, as nested dicts of numpy arrays."""
    path = (workdir / "checkpoints" / str(step) / "state").resolve()
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(path).item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=numpy))


class Built(NamedTuple):
    """All that a run has before its first step, and its compiled updates."""

    c: Config
    nets: setup.Nets
    data: feed.Data
    mesh: jax.sharding.Mesh
    frozen: dict
    state: Any
    updates: list[Callable]

    def batch(self, number: int) -> dict[str, jax.Array]:
        return sharding.to_devices(self.mesh, self.data.batches(number))


def build(c: Config, mesh: jax.sharding.Mesh, state: Any = None) -> Built:
    """Builds and compiles a run on a mesh; from a copy of ``state``, or from step 0."""
    nets, data = setup.build_nets(c, mesh), feed.open_data(c, mesh)
    frozen, _ = setup.load_frozen(c, data, mesh)
    batch = sharding.to_devices(mesh, data.batches(0))
    if state is None:
        state = setup.init_state(c, nets, batch, frozen, mesh)
    else:
        state = jax.device_put(jax.device_get(state), sharding.state_shardings(mesh, state))
    frozen = setup.at_compute_precision(c, nets, frozen)
    updates = [program.compile() for program in lower_updates(c, nets, state, batch, frozen)]
    return Built(c, nets, data, mesh, frozen, state, updates)


def copy(state: Any) -> Any:
    """A copy of a state that an update may take (updates reuse the memory of what they get)."""
    return jax.device_put(jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, state))
