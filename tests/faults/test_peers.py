"""Joining, watching and leaving: the verdicts alone, then processes that fail in every way."""

import argparse
import signal
import types

import pytest
from helpers import pods
from helpers.pods import HOST, WORKER, finish_pod, start_one
from helpers.runs import wait_for

from sprint_jax.core.errors import UserError
from sprint_jax.parallel import distributed, peers
from sprint_jax.parallel.distributed import find_place
from sprint_jax.parallel.interrupt import Stop
from sprint_jax.parallel.peers import LOST_PEER, Peers

ALL = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
STATES = [{"JAX_PROCESS_ID": "4"}, {"JAX_PROCESS_ID": "x"}, {"JAX_COORDINATOR_ADDRESS": "a"}]


def flags(*words):
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    return parser.parse_args(words)


def test_place_from_flags_and_environment():
    assert find_place(flags(), {}) is None
    assert find_place(flags("--distributed"), {}) == (None, None, None)
    assert find_place(flags("--distributed"), ALL) == ("a:1", 4, 3)
    mixed = flags("--distributed", "--coordinator", "[::1]:2", "--process_index", "0")
    assert find_place(mixed, ALL) == ("[::1]:2", 4, 0)
    assert find_place(flags(), {"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}) is None


@pytest.mark.parametrize(
    ("words", "environment", "named"),
    [
        ([], {"SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        ([], {"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES=2"),
        ([], {"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8"),
        ([], {"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b"),
        (["--process_count", "2"], {}, "--process_count"),
        (["--distributed", "--stall_timeout", "nan"], ALL, "--stall_timeout=nan"),
        (["--distributed", "--peer_timeout", "-1"], ALL, "--peer_timeout=-1"),
        (["--distributed", "--coordinator", "a:1"], {}, "--process_count, --process_index"),
        *((["--distributed"], ALL | state, next(iter(state.values()))) for state in STATES),
    ],
)
def test_misuse_is_refused(words, environment, named):
    with pytest.raises(UserError, match=named) as error:
        find_place(flags(*words), environment)
    assert error.value.exit_code == 2


class Store(dict):
    """JAX's key-value store, without other processes."""

    def key_value_set(self, key, value, allow_overwrite):
        self[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.items() if key.startswith(folder)]

    def wait_at_barrier(self, name, milliseconds):
        pass


def test_the_clock_is_of_phases_then_of_steps_and_names_who_is_behind(monkeypatch):
    now, store = [0.0], Store()
    monkeypatch.setattr(peers, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    pair = [Peers(store, index, 2, silence=30, stall=60, start=600) for index in range(2)]

    def after(seconds, *steps):
        """Lets time go by, with signs of life; then the processes begin these steps."""
        for _ in range(seconds // 10):
            now[0] += 10
            for each in pair:
                each._beat()
            verdicts = [each.look() for each in pair]
        for each, step in zip(pair, steps, strict=False):
            each.at_step(step)
        return verdicts

    def phase(name, *pair):
        for each in pair:
            each.at_phase(name)

    def verdict(words):
        found, same = after(20)
        assert found == same and found.startswith(f"{LOST_PEER} {words}"), found
        store.clear()

    # Starting is not standing still, as long as one phase follows the other.
    for name in ("opening the data", "compiling"):
        phase(name, *pair)
        assert after(600) == [None, None]
    verdict("no progress for 600 s: every process hangs while compiling")
    # Whoever is further waits for the one that is behind, which has a clock of its own.
    phase("restoring", *pair)
    after(300)
    phase("compiling", pair[0])
    assert after(300) == [None, None]
    verdict(f"no progress for 600 s: process 1 of 2 on host {HOST} hangs while restoring")
    phase("compiling", pair[1])
    assert after(10, 7, 7) == [None, None]
    assert after(600, 8, 8) == [None, None]  # the first step is part of the start
    assert after(60) == [None, None]
    pair[1].meet("a point where process 1 waits for process 0")
    verdict(f"no step for 60 s: process 0 of 2 on host {HOST} hangs at step 8")
    pair[0].meet("a point where process 1 waits for process 0")
    assert after(60) == [None, None]
    verdict("no step for 60 s: every process hangs at step 8")
    # What happens between two steps may take longer than one.
    for each in pair:
        each.at_step(9)
    after(10)
    phase("drawing samples", pair[1])
    pair[0].at_step(10)
    assert after(600) == [None, None]
    verdict(f"no progress for 600 s: process 1 of 2 on host {HOST} hangs while drawing samples")


def test_a_signal_counts_one_step_later_in_all_processes():
    """One to spread it over the devices, and all processes read the same number."""
    handler = signal.getsignal(signal.SIGTERM)
    seen = []
    with Stop(types.SimpleNamespace(at_step=seen.append, index=0)) as stop:
        stop.begin()
        assert [stop.after(step) for step in (1, 2, 3)] == [0, 0, 0]
        signal.raise_signal(signal.SIGTERM)
        assert [stop.after(step) for step in (4, 5, 6)] == [0, signal.SIGTERM, signal.SIGTERM]
        assert seen == [1, 2, 3, 4, 5, 6]
    # A process by itself stops after the step in progress.
    with Stop() as alone:
        alone.begin()
        assert alone.after(1) == 0
        signal.raise_signal(signal.SIGTERM)
        assert alone.after(2) == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("there", [(0, 2), (1,)])
def test_processes_that_never_join(there):
    address = f"localhost:{pods.free_port()}"
    words = [*WORKER, "--distributed", "--coordinator", address, "--process_count", "3"]
    # Long enough for a busy machine to start those that do.
    words += ["--join_timeout", "15", "--process_index"]
    for ended in finish_pod([start_one([*words, str(index)], 1) for index in there]):
        assert ended.code == 1 and address in ended.error
        assert ("process 0 is missing" in ended.error) == (0 not in there)


def test_distributed_without_a_cluster():
    (ended,) = finish_pod([start_one([*WORKER, "--distributed"], 1)])
    assert ended.code == 2 and "--coordinator" in ended.error


def work(tmp_path, *words):
    return pods.start_pod(
        [*WORKER, "--mark", str(tmp_path), "--peer_timeout", "8", *words], devices=1
    )


@pytest.mark.parametrize(
    ("victim", "number"), [(1, signal.SIGSTOP), (0, signal.SIGSTOP), (0, signal.SIGKILL)]
)
def test_a_lost_process_ends_the_others(victim, number, tmp_path):
    pod = work(tmp_path)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, *pod)
    survivor, seconds = pods.survivor_of(pod, victim, number)
    assert seconds < 30
    if survivor.code == LOST_PEER:
        (error,) = pods.errors(survivor)
        assert f"process {victim} of 2 on host {HOST}" in error and "Traceback" not in survivor.err
    else:
        # JAX's coordination service goes with process 0: JAX's client aborts, unless the watch is faster.
        assert victim == 0 and survivor.code == -signal.SIGABRT and survivor.err


def test_a_process_that_comes_back_too_early_ends_the_others_and_waits_for_them(tmp_path):
    """As a supervisor on its host does it, before the others have missed it."""
    where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{pods.free_port()}", "JAX_NUM_PROCESSES": "2"}
    words = [*WORKER, "--distributed", "--mark", str(tmp_path), "--steps", "40"]
    start = lambda index: start_one(words, 1, JAX_PROCESS_ID=str(index), **where)  # noqa: E731
    pod = [start(0), start(1)]
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, *pod)
    pod[1].kill()
    back = start(1)
    assert all(ended.code for ended in finish_pod(pod, timeout=60))
    assert [ended.code for ended in finish_pod([start(0), back])] == [0, 0]


@pytest.mark.parametrize(
    ("index", "kind", "mine", "others"), [(0, "bug", 1, LOST_PEER), (1, "usage", 2, 2)]
)
def test_a_failed_process_takes_the_others_along(index, kind, mine, others, tmp_path):
    ended = finish_pod(work(tmp_path, "--fail", f"{index}:{kind}"))
    assert (ended[index].code, ended[1 - index].code) == (mine, others), ended
    (line,) = pods.errors(ended[1 - index])
    assert f"process {index} of 2 on host {HOST} ended: " in line
    assert ("Traceback" in ended[index].err) == (kind == "bug")


def test_a_stuck_process_is_named(tmp_path):
    """Starting takes longer than these two seconds, and does not count."""
    for ended in finish_pod(work(tmp_path, "--hang", "1", "--stall_timeout", "2")):
        assert ended.code == LOST_PEER and f"process 1 of 2 on host {HOST} " in ended.error


def test_a_long_start_is_no_stall_and_a_stuck_one_is_named(tmp_path):
    """Five seconds of start against two for a step; then one that stands still for longer than three."""
    long = ["--phases", "5", "--steps", "3", "--stall_timeout", "2", "--start_timeout", "30"]
    assert [ended.code for ended in finish_pod(work(tmp_path, *long))] == [0, 0]
    stuck = ["--phases", "2", "--stuck", "1", "--start_timeout", "3"]
    for ended in finish_pod(work(tmp_path, *stuck)):
        words = f"no progress for 3 s: process 1 of 2 on host {HOST} hangs while phase 1"
        assert ended.code == LOST_PEER and words in ended.error


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_before_the_first_step_ends_all_processes(victim, tmp_path):
    """The one that gets it waits where no signal reaches Python, the other for it."""
    pod = work(tmp_path, "--phases", "1", "--stuck", str(victim))
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, *pod)
    pod[victim].send_signal(signal.SIGTERM)
    both = finish_pod(pod, timeout=60)
    assert [ended.code for ended in both] == [128 + signal.SIGTERM] * 2, both
    assert "while phase 0, before the first step" in both[victim].out
    assert f"process {victim} of 2 on host {HOST} was stopped" in both[1 - victim].error


def test_processes_that_see_different_folders(tmp_path):
    """As on hosts that do not share a disk: one line for each, and nothing is left in the folders."""
    where = {"JAX_COORDINATOR_ADDRESS": f"localhost:{pods.free_port()}", "JAX_NUM_PROCESSES": "2"}
    words = [*WORKER, "--distributed", "--steps", "3", "--peer_timeout", "5", "--workdir"]
    folders = [str(tmp_path / name) for name in ("here", "there")]
    start = lambda i, folder: start_one([*words, folder], 1, JAX_PROCESS_ID=str(i), **where)  # noqa: E731
    for ended in finish_pod([start(i, folder) for i, folder in enumerate(folders)], timeout=120):
        assert ended.code == 2, ended
        line = pods.errors(ended)[0]
        assert f"process 1 on host {HOST} of 2 processes cannot see {tmp_path}" in line
    assert not list(tmp_path.rglob("*"))
    same = [start(i, folders[0]) for i in range(2)]
    assert [ended.code for ended in finish_pod(same, timeout=120)] == [0, 0]
