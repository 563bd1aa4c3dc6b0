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
from helpers.pods import start_one
from helpers.runs import (
    assert_same_bits,
    checkpoint_steps,
    finish,
    read_state,
    records,
    run_here,
    tiny,
    words,
    write_digits,
)

from sprint_jax import train
from sprint_jax.training import updates

pytestmark = pytest.mark.usefixtures("quick")

STEPS, EVERY, BROKEN = 12, 4, 8  # the disk breaks when this step is to be saved


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """``line(workdir) -> words`` of a short training of a teacher."""
    data = write_digits(tmp_path_factory.getbasetemp() / "digits")
    options = {"steps": STEPS, "log__checkpoint_every": EVERY, "log__sample_every": 1000}
    spec = "configs/digits.py:teacher,small"

    def arguments(workdir, **changes):
        return words(spec, data, workdir, **options | changes)

    arguments.config = lambda workdir: tiny(spec, data, **options).to_dict()
    return arguments


@pytest.fixture(scope="module")
def whole(line, tmp_path_factory):
    """A run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("faults") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("signal.signal", lambda *arguments: None)
        train.main(line(workdir))
    return workdir


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


def break_and_go_on(arguments, workdir, whole, damage, mend, named, run):
    """Runs ``damage``, a command, just before the checkpoint of step `BROKEN`; then the same line goes on."""
    helper = Path(__file__).parents[1] / "helpers" / "broken_disk.py"
    begun = time.monotonic()
    ended = finish(start_one([str(helper), str(BROKEN), shlex.join(damage), *arguments], devices=8))
    assert time.monotonic() - begun < 120
    line = ended.err.splitlines()[-1]
    assert ended.code == 1 and line.startswith("error: "), ended.err
    assert f"{workdir}/checkpoints" in line and named in line
    assert checkpoint_steps(workdir) == [EVERY]
    mend()
    assert run_here(arguments, *run).code == 0
    assert records(workdir) == records(whole)
    assert_same_bits(read_state(workdir, STEPS), read_state(whole, STEPS))


def test_full_disk(line, whole, tmp_path, monkeypatch, capfd):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=32m,mode=1777", "tmpfs") as disk:
        workdir, ballast = disk / "run", disk / "ballast"
        damage = ["sh", "-c", f"cat /dev/zero >{ballast} || true"]
        run = monkeypatch, capfd
        break_and_go_on(
            line(workdir), workdir, whole, damage, ballast.unlink, "No space left on device", run
        )


def test_checkpoints_made_read_only(line, whole, tmp_path, monkeypatch, capfd):
    """By a mount, since root may write whatever the mode bits say."""
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"
    folder.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(line.config(workdir)))
    with mounted(folder, "--bind", str(folder)):
        remount = ["mount", "-o", "remount,bind"]
        damage = [*sudo(), *remount, "-o", "ro", str(folder)]
        mend = lambda: privileged(*remount, "-o", "rw", str(folder))  # noqa: E731
        run = monkeypatch, capfd
        break_and_go_on(line(workdir), workdir, whole, damage, mend, "Read-only file system", run)


def test_one_bad_gradient_is_skipped_and_counted(line, tmp_path, monkeypatch, capfd):
    """One NaN in one leaf of the gradients of step 4, behind a loss that is finite."""
    gradients = updates.gradients
    seed = tiny("configs/digits.py:teacher,small", tmp_path).seed

    def poisoned(loss, params, batch, key, parts):
        value, aux, grads = gradients(loss, params, batch, key, parts)
        fourth = jax.random.fold_in(jax.random.key(seed), 3)
        now = jnp.all(jax.random.key_data(key) == jax.random.key_data(fourth))
        leaves, shape = jax.tree.flatten(grads)
        leaves[0] = jnp.where(now, leaves[0].at[(0,) * leaves[0].ndim].set(jnp.nan), leaves[0])
        return value, aux, jax.tree.unflatten(shape, leaves)

    monkeypatch.setattr(updates, "gradients", poisoned)
    workdir = tmp_path / "run"
    changes = {"steps": 6, "log__checkpoint_every": 1, "log__keep": 10}
    ended = run_here(line(workdir, **changes), monkeypatch, capfd)
    assert ended.code == 0
    found = records(workdir)
    assert [record["health/skipped"] for record in found.values()] == [0, 0, 0, 1, 1, 1]
    assert [record["health/in_a_row"] for record in found.values()] == [0, 0, 0, 1, 0, 0]
    assert found[4]["loss/flow"] is not None and found[4]["grad/student"] is None
    third, fourth, fifth = (read_state(workdir, step) for step in (3, 4, 5))
    for name in ("params", "ema", "opt_state"):
        assert_same_bits(third[name], fourth[name])
        with pytest.raises(AssertionError):
            assert_same_bits(fourth[name], fifth[name])
