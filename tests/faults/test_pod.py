"""Two processes as one run: the same numbers as one process, a shared stop, and exact resume after a death."""

import signal

import jax
import numpy as np
import pytest
from helpers import runs
from helpers.compare import assert_same_bits
from helpers.pods import HOST, TRAIN, errors, finish_pod, start_pod, survivor_of
from helpers.workdirs import make_workdir

from sprint_jax.parallel.peers import LOST_PEER

pytestmark = pytest.mark.usefixtures("quick")

STAGES = ("flow", "distill")
STEPS, LONGER, EVERY = 20, 24, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pod")


@pytest.fixture(scope="module")
def line(folder, data):
    """``line(stage, **changes) -> (spec, data, changes)`` for `tiny` and `words`."""
    every = {"steps": STEPS, "log__checkpoint_every": EVERY, "log__sample_every": 1000}
    teacher = str(make_workdir(folder / "teacher", "flow"))
    more = {"flow": {}, "distill": {"teacher": teacher, "log__diagnostics_every": 10}}
    spec = {"flow": "teacher", "distill": "student"}
    return lambda stage, **changes: (
        f"configs/digits.py:{spec[stage]},small",
        data,
        every | more[stage] | changes,
    )


def command(line, stage, workdir, **changes):
    spec, data, options = line(stage, **changes)
    return [*TRAIN, *runs.words(spec, data, workdir, **options)]


def succeed(pod):
    for ended in finish_pod(pod):
        assert ended.code == 0, ended.err


@pytest.fixture(scope="module")
def alone(folder, line):
    """Runs of one process with 8 devices, some steps longer: stage -> workdir."""
    for stage in STAGES:
        spec, data, options = line(stage, steps=LONGER, log__keep=10)
        runs.train_here(runs.tiny(spec, data, **options), folder / f"alone_{stage}")
    return {stage: folder / f"alone_{stage}" for stage in STAGES}


@pytest.fixture(scope="module")
def pair(folder, line):
    """Runs of two processes with 4 devices each: stage -> workdir."""
    for stage in STAGES:
        succeed(start_pod(command(line, stage, folder / f"pair_{stage}")))
    return {stage: folder / f"pair_{stage}" for stage in STAGES}


def losses(workdir):
    return {
        step: {name: value for name, value in record.items() if name.startswith("loss/")}
        for step, record in runs.records(workdir).items()
    }


def assert_losses_agree(mine, other, steps):
    for step in steps:
        # Logits are sums around zero: their mean is compared on the scale of the logits.
        assert mine[step] and mine[step] == pytest.approx(other[step], rel=1e-5, abs=1e-6), step


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(stage, alone, pair):
    mine, other = losses(pair[stage]), losses(alone[stage])
    assert list(mine) == list(range(1, STEPS + 1))
    assert_losses_agree(mine, other, mine)
    states = [runs.read_state(workdir[stage], STEPS)["params"] for workdir in (pair, alone)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert a.dtype == np.float32
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_death_of_a_process_is_named_and_resumed_exactly(line, folder, alone, pair):
    workdir = folder / "killed"
    words = command(line, "flow", workdir)
    pod = start_pod([*words, "--peer_timeout", "10"])
    runs.wait_for(
        lambda: runs.checkpoint_steps(workdir) and max(runs.records(workdir)) > EVERY, *pod
    )
    survivor, seconds = survivor_of(pod, 1, signal.SIGKILL)
    assert seconds < 30 and survivor.code == LOST_PEER
    (error,) = errors(survivor)
    assert f"process 1 of 2 on host {HOST}" in error
    assert EVERY <= runs.checkpoint_steps(workdir)[-1] < STEPS
    # The same command line resumes; the result is that of the run which nobody disturbed, bit for bit.
    succeed(start_pod(words))
    assert losses(workdir) == losses(pair["flow"])
    assert_same_bits(runs.read_state(workdir, STEPS), runs.read_state(pair["flow"], STEPS))
    # Elastic: goes on with one process and two devices.
    longer = command(line, "flow", workdir, steps=LONGER)
    (ended,) = finish_pod(start_pod(longer, count=1, devices=2))
    assert ended.code == 0 and "2 device(s)" in ended.out, ended.err
    assert_losses_agree(losses(workdir), losses(alone["flow"]), range(STEPS + 1, LONGER + 1))


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_the_same_step(line, folder, pair):
    workdir = folder / "stopped"
    words = command(line, "flow", workdir, log__checkpoint_every=1000)
    pod = start_pod(words)
    runs.wait_for(lambda: len(runs.records(workdir)) >= 3, *pod)
    pod[1].send_signal(signal.SIGTERM)
    both = finish_pod(pod)
    assert [ended.code for ended in both] == [128 + signal.SIGTERM] * 2, both
    (step,) = runs.checkpoint_steps(workdir)
    assert max(runs.records(workdir)) == step < STEPS
    assert all(str(step) in ended.out and "Traceback" not in ended.err for ended in both)
    succeed(start_pod(words))
    assert_same_bits(runs.read_state(workdir, STEPS), runs.read_state(pair["flow"], STEPS))
