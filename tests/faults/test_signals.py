"""SIGTERM in every phase of a run that stands still there, and a second one."""

import signal
import time
from pathlib import Path

import pytest
from helpers import runs
from helpers.pods import start_one

SPEC = "configs/digits.py:teacher,small"
BLOCKED = str(Path(__file__).parents[1] / "helpers" / "blocked.py")
START = ["opening the data", "reading frozen weights", "making the first state"]
START += ["tracing the updates", "restoring", "compiling"]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def blocked(data, tmp_path):
    """``blocked(phase, patience)``: a training that stands still in a phase of its start, or from step 2."""
    workdir, mark = tmp_path / "run", tmp_path / "mark"

    def blocked(phase, patience):
        often = {"log__sample_every": 2, "log__checkpoint_every": 1, "steps": 4}
        words = runs.words(SPEC, data, workdir, **often)
        process = start_one([BLOCKED, phase, str(mark), str(patience), *words], devices=1)
        runs.wait_for(mark.exists, process)
        return process, workdir

    return blocked


@pytest.mark.parametrize("phase", START)
def test_before_the_first_step_it_ends_at_once(phase, blocked):
    process, workdir = blocked(phase, 1000)
    process.send_signal(signal.SIGTERM)
    ended = runs.finish(process)
    assert ended.code == 128 + signal.SIGTERM and "Traceback" not in ended.err, ended
    assert f"while {phase}, before the first step" in ended.out
    assert not runs.checkpoint_steps(workdir)


@pytest.mark.parametrize("phase", ["step 3", "drawing samples", "writing a checkpoint"])
def test_later_the_end_of_a_step_is_waited_for_so_long(phase, blocked):
    """In a checkpoint's phase that of step 1 has not begun."""
    process, workdir = blocked(phase, 2)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended = runs.finish(process)
    assert ended.code == 128 + signal.SIGTERM and time.monotonic() - begun >= 2
    assert "no step ended for 2 s" in ended.out and "Traceback" not in ended.err
    assert all(step < 3 for step in runs.checkpoint_steps(workdir))


def test_a_second_signal_is_not_waited_for(blocked):
    process, _ = blocked("step 3", 1000)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    ended = runs.finish(process)
    assert ended.code == 128 + signal.SIGTERM and "twice" in ended.out
