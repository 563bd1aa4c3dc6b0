"""A sweep outlives each of its runs, and itself. Trainings are stood in for by sweep_train.py."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.runs import ROOT, wait_for
from helpers.toy_sweep import FAKE, ToySweep, meanwhile
from PIL import Image

from launch import sweep as command
from sprint_jax.core.errors import UserError
from sprint_jax.sweeps import run as run_module


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return ToySweep(tmp_path, monkeypatch)


def test_the_best_row_is_on_top(sweep):
    sweep.run("--metric", "loss/flow", "grad/student", "--last", "2", "--parallel", "4")
    results = sweep.results()
    # Last values are (1 + |seed - 2|) / step at steps 5 and 6.
    assert next(iter(results)) == "2" and list(results)[-1] == "0"
    best = results["2"]
    assert float(best["loss/flow"]) == pytest.approx((1 / 5 + 1 / 6) / 2, rel=1e-5)
    assert float(best["grad/student"]) == pytest.approx(5.5)
    expected = {"rank": "1", "status": "done", "exit_code": "0", "error": "", "steps": "6"}
    expected |= {"seconds": "3.0", "config.seed": "2", "workdir": str(sweep.workdir / "seed=2")}
    assert expected.items() <= best.items()
    with Image.open(sweep.workdir / "results.png") as image:
        assert image.size[0] > 1000 and image.size[1] > 500
    sweep.run("--goal", "max", "--last", "1")
    assert next(iter(sweep.results())) == "0"
    assert sum(sweep.starts().values()) == 4, "nothing was done twice"


def test_a_sweep_outlives_the_death_of_its_runs_and_redoes_only_those(sweep, monkeypatch):
    sweep.behave(s0="fail", s1="kill")
    with pytest.raises(UserError, match="2 of 4 runs failed: seed=0 and 1 more") as caught:
        sweep.run()
    assert caught.value.exit_code == 1
    assert sweep.column("status") == ["failed", "failed", "done", "done"]
    failed, killed = sweep.results()["0"], sweep.results()["1"]
    assert (failed["rank"], failed["exit_code"], failed["steps"]) == ("", "1", "3")
    assert failed["error"] == "error: the disk is full"
    assert killed["exit_code"] == "-9" and "SIGKILL" in killed["error"]
    assert "something else" in (sweep.workdir / "seed=0" / "log.txt").read_text()

    sweep.behave()
    sweep.run()
    assert sweep.starts() == {"0": 2, "1": 2, "2": 1, "3": 1}
    assert sweep.column("status") == ["done"] * 4 and sweep.column("error") == [""] * 4

    (sweep.workdir / "seed=2" / "checkpoints" / "6").rmdir()
    monkeypatch.setitem(command.COMMANDS, "local", ("no-such-program",))
    with pytest.raises(UserError, match="1 of 4 runs failed: seed=2"):
        sweep.run()
    assert "FileNotFoundError" in sweep.results()["2"]["error"]


def test_a_signal_is_handed_on_and_a_second_one_kills(sweep):
    sweep.behave(s1="slow", s2="deaf")

    def stop():
        wait_for(lambda: sweep.logged(1) and sweep.logged(2))
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: sweep.column("status")[1] == "stopped" and sweep.checkpoint(2, step=3))
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGTERM)
    with meanwhile(stop), pytest.raises(SystemExit) as caught:
        sweep.run("--parallel", "2")
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert sweep.column("status") == ["done", "stopped", "stopped", "waiting"]
    assert sweep.column("exit_code") == ["0", "143", "-9", ""]
    assert sweep.checkpoint(1, step=3), "it could write a checkpoint"
    sweep.behave()
    sweep.run()
    assert sweep.starts() == {"0": 1, "1": 2, "2": 2, "3": 1}


def test_killed_by_9_a_sweep_loses_nothing_and_is_not_run_beside_itself(sweep):
    sweep.behave(s1="slow")
    program = f"import sys; from launch import sweep; sweep.COMMANDS['local'] = {FAKE!r}\n"
    # A backend that cannot be had: a sweep must not take the devices of its trainings.
    process = subprocess.Popen(
        [sys.executable, "-c", program + "sweep.main(sys.argv[1:])", *sweep.arguments()],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
    )
    wait_for(lambda: sweep.logged(1))
    with pytest.raises(UserError, match="another sweep runs"):
        sweep.run()
    process.kill()
    process.wait()
    assert sweep.column("status") == ["done", "running", "waiting", "waiting"]

    # Run 1 was orphaned and lives: the next sweep's process waits for it, and finds nothing left to do.
    def release():
        wait_for(lambda: sweep.column("status")[1] == "running")
        time.sleep(0.5)
        assert sweep.starts() == {"0": 1, "1": 1}
        (sweep.home / "release").touch()

    with meanwhile(release):
        sweep.run()
    assert sweep.starts() == {"0": 1, "1": 2, "2": 1, "3": 1}
    assert sweep.column("status") == ["done"] * 4
    assert sweep.results()["1"]["seconds"] == "3.0", "it was trained once"


def test_an_error_of_the_sweep_itself_leaves_no_run_behind(sweep, monkeypatch):
    sweep.behave(s0="slow")
    write = run_module.write_results

    def full(path, ranked, ranking):
        if any(each.row.status == "running" for each in ranked):
            wait_for(lambda: sweep.logged(0))
            raise UserError("No space left on device")
        write(path, ranked, ranking)

    monkeypatch.setattr(run_module, "write_results", full)
    with pytest.raises(UserError, match="No space left"):
        sweep.run()
    assert sweep.checkpoint(0, step=3) and sweep.starts() == {"0": 1}


def test_another_sweeps_folder_and_a_file_in_the_way_are_refused(sweep):
    sweep.workdir.mkdir()
    (sweep.workdir / "seed=1").write_text("a file in the way")
    with pytest.raises(UserError, match="seed=1"):
        sweep.run()
    with pytest.raises(UserError, match=str(sweep.workdir)):
        command.main(sweep.arguments(name="lr"))
    assert sweep.starts() == {}


def test_a_row_without_a_finite_score_is_never_the_best(sweep, capsys):
    sweep.run("--metric", "loss/folw")
    assert "'loss/folw'" in capsys.readouterr().err
    assert sweep.column("loss/folw") == [""] * 4 == sweep.column("rank")
    path = sweep.workdir / "seed=2" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "loss/flow": null}\n')
    sweep.run("--last", "2")
    assert list(sweep.results()) == ["1", "3", "0", "2"]
    assert sweep.results()["2"]["rank"] == sweep.results()["2"]["loss/flow"] == ""
