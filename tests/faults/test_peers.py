"""Joining, watching and leaving: pure parts, then processes that fail in every way."""

import argparse
import signal
from typing import ClassVar

import pytest
from helpers.pods import (
    HOST,
    WORKER,
    errors,
    finish_pod,
    free_port,
    start_one,
    start_pod,
    survivor_of,
    until,
)

from sprint_jax.core.errors import UserError
from sprint_jax.parallel import distributed
from sprint_jax.parallel.distributed import Place, find_place, several_tasks
from sprint_jax.parallel.interrupt import Stop
from sprint_jax.parallel.peers import LOST_PEER, Vitals, exit_code, follow, judge
from sprint_jax.parallel.rendezvous import roll_call, split_address


def flags(*words):
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    return parser.parse_args(words)


ALL = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_place_from_flags_and_environment():
    assert find_place(flags(), {}) is None
    assert find_place(flags("--distributed"), {}) == Place(None, None, None)
    assert find_place(flags("--distributed"), ALL) == Place("a:1", 4, 3)
    mixed = flags("--distributed", "--coordinator", "b:2", "--process_index", "0")
    assert find_place(mixed, ALL) == Place("b:2", 4, 0)


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ([], {"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4 .*--distributed is not given"),
        ([], {"SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        ([], {"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES=2 .*--distributed"),
        ([], {"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8 "),
        ([], {"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b "),
        (["--process_count", "2"], {}, "--process_count needs --distributed"),
        (["--distributed", "--coordinator", "a:1"], {}, "lacks --process_count, --process_index"),
        (["--distributed"], ALL | {"JAX_PROCESS_ID": "4"}, "=4 is not one of 4 processes"),
        (["--distributed"], ALL | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID=x is not a number"),
        (["--distributed"], ALL | {"JAX_COORDINATOR_ADDRESS": "a"}, "'a' must be HOST:PORT"),
    ],
)
def test_misuse_is_refused(words, environment, message):
    with pytest.raises(UserError, match=message) as error:
        find_place(flags(*words), environment)
    assert error.value.exit_code == 2


def test_one_task_is_no_misuse():
    assert several_tasks({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_addresses():
    assert split_address("host:80") == ("host", 80)
    assert split_address("[::1]:80") == ("::1", 80)
    for bad in ("host", "host:", ":80", "host:0", "host:99999", "host:x"):
        with pytest.raises(UserError, match="HOST:PORT"):
            split_address(bad)


def test_vitals_follow_beats():
    seen = follow({}, {0: "1 0"}, 10.0, 2)
    assert seen == {0: Vitals("1 0", 0, 10.0, 10.0), 1: Vitals("", -1, 10.0, 10.0)}
    seen = follow(seen, {0: "2 0", 1: "1 7"}, 11.0, 2)
    assert seen == {0: Vitals("2 0", 0, 11.0, 10.0), 1: Vitals("1 7", 7, 11.0, 11.0)}


def test_judgement_names_the_silent_and_the_stuck():
    hosts = ["a", "b", "c"]
    steps = {0: 8, 1: 7, 2: 8}

    def vitals(**beats):
        return {i: Vitals("", steps[i], beats.get(f"p{i}", 100.0), 50.0) for i in range(3)}

    assert judge(vitals(), hosts, 100.0, 30.0, 60.0) is None
    line = judge(vitals(p1=69.0, p2=60.0), hosts, 100.0, 30.0, 60.0)
    assert line.startswith(
        "process 1 of 3 on host b, process 2 of 3 on host c: no sign of life for 30"
    )
    line = judge(vitals(), hosts, 111.0, 30.0, 60.0)
    assert (
        line == "no step for 60 s: process 1 of 3 on host b hangs in step 8, the others are ahead"
    )
    same = {i: v._replace(step=5) for i, v in vitals().items()}
    assert judge(same, hosts, 111.0, 30.0, 60.0) == "no step for 60 s: all processes hang in step 6"
    assert judge({}, hosts, 111.0, 30.0, 60.0) is None


def test_exit_codes():
    errors = [UserError("x"), UserError("x", 2), KeyboardInterrupt(), ValueError()]
    assert list(map(exit_code, errors)) == [1, 2, 130, 1]


def test_roll_call_alone():
    assert roll_call(f"localhost:{free_port()}", 1, 0, 5.0) == [HOST]


def test_nobody_there():
    with pytest.raises(
        UserError, match="process 1 of 2 could not join: process 0 is missing"
    ) as error:
        roll_call(f"localhost:{free_port()}", 2, 1, 1.0)
    assert error.value.exit_code == 1


def join(*indices, count=3, timeout=4):
    port = free_port()
    words = [*WORKER, "--distributed", "--coordinator", f"localhost:{port}", "--steps", "1"]
    words += ["--join_timeout", str(timeout), "--process_count", str(count)]
    return finish_pod([start_one([*words, "--process_index", str(i)], 1) for i in indices])


def test_processes_that_never_join_are_named():
    # Long enough for a busy machine to start the two that do.
    for ended in join(0, 2, timeout=20):
        assert ended.code == 1
        assert "1 of 3 processes did not join" in ended.error and "process 1 missing" in ended.error
        assert f"0 on {HOST}, 2 on {HOST}" in ended.error and "within 20 s" in ended.error


def test_a_number_given_twice():
    ended = join(0, 1, 1, timeout=60)
    assert {e.code for e in ended} == {1}
    assert sum("two processes call themselves 1" in e.err for e in ended) >= 2


def running(pod, tmp_path):
    """Waits until every process has done a few steps."""
    until(lambda: all((tmp_path / str(i)).exists() for i in range(len(pod))), pod)


def work(tmp_path, *words, peer_timeout=8):
    return [*WORKER, "--mark", str(tmp_path), "--peer_timeout", str(peer_timeout), *words]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_is_named(victim, number, tmp_path):
    pod = start_pod(work(tmp_path), devices=1)
    running(pod, tmp_path)
    survivor, seconds = survivor_of(pod, victim, number)
    print(f"{number.name} of process {victim}: the survivor ended after {seconds:.1f} s")
    assert survivor.code == LOST_PEER and seconds < 30
    (error,) = errors(survivor)
    assert f"process {victim} of 2 on host {HOST}" in error
    assert "Traceback" not in survivor.err


@pytest.mark.parametrize(
    ("index", "kind", "mine", "others"),
    [(0, "full", 1, LOST_PEER), (1, "usage", 2, 2), (1, "bug", 1, LOST_PEER)],
)
def test_a_failed_process_takes_the_others_along(index, kind, mine, others, tmp_path):
    ended = finish_pod(start_pod(work(tmp_path, "--fail", f"{index}:{kind}"), devices=1))
    assert (ended[index].code, ended[1 - index].code) == (mine, others), ended
    (line,) = errors(ended[1 - index])
    assert f"process {index} of 2 on host {HOST} ended: " in line
    assert ("Traceback" in ended[index].err) == (kind == "bug")


def test_a_stuck_process_is_named(tmp_path):
    words = work(tmp_path, "--hang", "1", "--stall_timeout", "5")
    for ended in finish_pod(start_pod(words, devices=1)):
        assert ended.code == LOST_PEER
        assert f"process 1 of 2 on host {HOST} hangs in step 5, the others are ahead" in ended.error


def test_distributed_without_a_cluster():
    (ended,) = finish_pod([start_one([*WORKER, "--distributed"], 1)])
    assert ended.code == 2 and "--distributed needs --coordinator" in ended.error


def test_a_signal_counts_one_step_later_in_all_processes():
    """One to spread it over the devices, and all processes read the same number."""

    class Peers:
        seen: ClassVar = []

        def at_step(self, step):
            self.seen.append(step)

    handler = signal.getsignal(signal.SIGTERM)
    try:
        stop = Stop(Peers())
        assert [stop.after(step) for step in (1, 2, 3)] == [0, 0, 0]
        signal.raise_signal(signal.SIGTERM)
        assert [stop.after(step) for step in (4, 5, 6)] == [0, signal.SIGTERM, signal.SIGTERM]
        assert Peers.seen == [1, 2, 3, 4, 5, 6]
        # A process by itself stops after the step in progress.
        alone = Stop()
        assert alone.after(1) == 0
        signal.raise_signal(signal.SIGTERM)
        assert alone.after(2) == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, handler)
