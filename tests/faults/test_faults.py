"""A full disk, a read-only directory, NaN in a gradient: nothing is lost but steps since a checkpoint."""

import contextlib
import json
import os
import shlex
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import runs
from helpers.compare import assert_same_bits
from helpers.pods import start_one

from sprint_jax.training import updates

pytestmark = pytest.mark.usefixtures("quick")

STEPS, EVERY, BROKEN = 12, 4, 8  # the disk breaks when this step is to be saved


SPEC = "configs/digits.py:teacher,small"
SHORT = {"steps": STEPS, "log__checkpoint_every": EVERY, "log__sample_every": 1000}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing disturbs."""
    return runs.train_here(
        runs.tiny(SPEC, data, **SHORT), tmp_path_factory.mktemp("faults") / "whole"
    )


@pytest.fixture
def run(data, monkeypatch, capfd):
    """``run(workdir, **changes)``: trains in this process."""
    return lambda workdir, **changes: runs.run_here(
        runs.words(SPEC, data, workdir, **SHORT | changes), monkeypatch, capfd
    )


def sudo():
    return [] if os.geteuid() == 0 else ["sudo", "-n"]


def privileged(*command):
    """Runs a command as root; where that is not possible the test says that it shows nothing."""
    result = subprocess.run([*sudo(), *command], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{' '.join(command)}: {result.stderr.strip()}; this fault is not shown here")


@contextlib.contextmanager
def mounted(folder, *options):
    folder.mkdir(exist_ok=True)
    privileged("mount", *options, str(folder))
    try:
        yield folder
    finally:
        privileged("umount", "--lazy", str(folder))


@pytest.fixture
def break_and_go_on(data, whole, run):
    """``(workdir, damage, mend, named)``: runs ``damage``, a command, just before the checkpoint of step
    `BROKEN`; then ``mend()``, and the same line goes on."""
    helper = str(Path(__file__).parents[1] / "helpers" / "broken_disk.py")

    def break_and_go_on(workdir, damage, mend, named):
        line = [helper, str(BROKEN), shlex.join(damage), *runs.words(SPEC, data, workdir, **SHORT)]
        begun = time.monotonic()
        ended = runs.finish(start_one(line, devices=8))
        assert time.monotonic() - begun < 120
        last = ended.err.splitlines()[-1]
        assert ended.code == 1 and last.startswith("error: "), ended.err
        assert f"{workdir}/checkpoints" in last and named in last
        assert runs.checkpoint_steps(workdir) == [EVERY]
        mend()
        assert run(workdir).code == 0
        assert runs.records(workdir) == runs.records(whole)
        assert_same_bits(runs.read_state(workdir, STEPS), runs.read_state(whole, STEPS))

    return break_and_go_on


def test_full_disk(break_and_go_on, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=32m,mode=1777", "tmpfs") as disk:
        ballast = disk / "ballast"
        damage = ["sh", "-c", f"cat /dev/zero >{ballast} || true"]
        break_and_go_on(disk / "run", damage, ballast.unlink, "No space left on device")


def test_checkpoints_made_read_only(data, break_and_go_on, tmp_path):
    """By a mount, since root may write whatever the mode bits say."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    config = runs.tiny(SPEC, data, **SHORT).to_dict()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    remount = ["mount", "-o", "remount,bind", "-o"]
    with mounted(folder, "--bind", str(folder)):
        damage = [*sudo(), *remount, "ro", str(folder)]
        mend = lambda: privileged(*remount, "rw", str(folder))  # noqa: E731
        break_and_go_on(tmp_path / "run", damage, mend, "Read-only file system")


def test_one_bad_gradient_is_skipped_and_counted(run, tmp_path, monkeypatch):
    """One NaN in one leaf of the gradients of step 4, behind a loss that is finite."""
    gradients = updates.gradients
    seed = runs.tiny(SPEC, tmp_path).seed

    def poisoned(terms, params, batch, key, parts):
        value, aux, grads, balance = gradients(terms, params, batch, key, parts)
        fourth = jax.random.fold_in(jax.random.key(seed), 3)
        now = jnp.all(jax.random.key_data(key) == jax.random.key_data(fourth))
        leaves, shape = jax.tree.flatten(grads)
        leaves[0] = jnp.where(now, leaves[0].at[(0,) * leaves[0].ndim].set(jnp.nan), leaves[0])
        return value, aux, jax.tree.unflatten(shape, leaves), balance

    monkeypatch.setattr(updates, "gradients", poisoned)
    workdir = tmp_path / "run"
    assert run(workdir, steps=6, log__checkpoint_every=1, log__keep=10).code == 0
    found = runs.records(workdir)
    assert [record["health/skipped"] for record in found.values()] == [0, 0, 0, 1, 1, 1]
    assert [record["health/in_a_row"] for record in found.values()] == [0, 0, 0, 1, 0, 0]
    assert found[4]["loss/flow"] is not None and found[4]["grad/student"] is None
    third, fourth, fifth = (runs.read_state(workdir, step) for step in (3, 4, 5))
    for name in ("params", "ema", "opt_state"):
        assert_same_bits(third[name], fourth[name])
        with pytest.raises(AssertionError):
            assert_same_bits(fourth[name], fifth[name])
