"""A sweep outlives each of its runs, and itself. Trainings are stood in for by sweep_train.py."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.runs import ROOT
from helpers.toy_sweep import FAKE, ToySweep, wait_for
from PIL import Image

from launch import sweep as command
from sprint_jax.core.errors import UserError
from sprint_jax.sweeps import drive
from sprint_jax.sweeps import run as run_module
from sprint_jax.sweeps.report import Ranking, rank
from sprint_jax.sweeps.run import Progress, Result, last_error


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return ToySweep(tmp_path, monkeypatch)


def test_the_best_row_is_on_top(sweep, capsys):
    sweep.run("--metric", "loss/flow", "grad/student", "--last", "2", "--parallel", "4")
    results = sweep.results()
    # Last values are (1 + |seed - 2|) / step at steps 5 and 6.
    assert next(iter(results)) == "2" and list(results)[-1] == "0"
    assert [line["rank"] for line in results.values()] == ["1", "2", "3", "4"]
    best = results["2"]
    assert float(best["loss/flow"]) == pytest.approx((1 / 5 + 1 / 6) / 2, rel=1e-5)
    assert float(best["grad/student"]) == pytest.approx(5.5)
    assert (best["status"], best["exit_code"], best["error"]) == ("done", "0", "")
    assert best["steps"] == "6" and float(best["seconds"]) > 0
    assert best["workdir"] == str(sweep.workdir / "seed=2") and best["config.seed"] == "2"
    with Image.open(sweep.workdir / "results.png") as image:
        assert image.size[0] > 1000 and image.size[1] > 500
    out = capsys.readouterr().out
    assert "best: seed=2  loss/flow 0.183333" in out and "4/4 done" in out
    sweep.run("--goal", "max", "--last", "1")
    assert next(iter(sweep.results())) == "0"
    assert sum(sweep.starts().values()) == 4, "nothing was done twice"


def test_a_sweep_outlives_the_death_of_its_runs_and_redoes_only_those(sweep, capsys):
    sweep.behave(s0="fail", s1="kill")
    with pytest.raises(UserError, match="2 of 4 runs failed: seed=0 and 1 more") as caught:
        sweep.run()
    assert caught.value.exit_code == 1
    results = sweep.results()
    assert [line["status"] for line in results.values()] == ["done", "done", "failed", "failed"]
    assert list(results)[:2] == ["2", "3"]
    failed, killed = results["0"], results["1"]
    assert (failed["exit_code"], failed["error"]) == ("1", "error: the disk is full")
    assert (killed["exit_code"], killed["error"]) == (
        "-9",
        "killed by SIGKILL; last line: compiling",
    )
    assert failed["rank"] == "" and failed["steps"] == "3"
    assert "error: the disk is full" in (sweep.workdir / "seed=0" / "log.txt").read_text()
    seconds = {seed: float(line["seconds"]) for seed, line in results.items()}
    assert "2/4 done  2 failed" in capsys.readouterr().out

    sweep.behave(s0="ok", s1="fail")
    with pytest.raises(UserError, match="1 of 4 runs failed: seed=1"):
        sweep.run()
    results = sweep.results()
    assert sweep.starts() == {"0": 2, "1": 2, "2": 1, "3": 1}
    assert results["0"]["status"] == "done" and results["0"]["error"] == ""
    assert results["1"]["exit_code"] == "1"
    # What the earlier sweep measured stays, and attempts add up.
    assert float(results["2"]["seconds"]) == seconds["2"]
    assert float(results["0"]["seconds"]) > seconds["0"]
    sweep.behave()
    sweep.run()
    assert {line["status"] for line in sweep.results().values()} == {"done"}


def test_a_command_that_cannot_start_fails_its_row_alone(sweep, monkeypatch):
    (sweep.workdir / "x").mkdir(parents=True)
    (sweep.workdir / "seed=1").write_text("a file in the way")
    with pytest.raises(UserError, match="1 of 4 runs failed: seed=1"):
        sweep.run()
    assert "seed=1: File exists" in sweep.results()["1"]["error"]
    monkeypatch.setattr(drive, "TRAIN", ("no-such-program",))
    (sweep.workdir / "seed=2" / "checkpoints" / "6").rmdir()
    with pytest.raises(UserError, match="2 of 4 runs failed"):
        sweep.run()
    assert sweep.results()["2"]["error"] == "no-such-program: No such file or directory"


@pytest.mark.parametrize("parallel", [1, 3])
def test_so_many_at_a_time_and_no_more(sweep, parallel):
    sweep.behave(s0="slow", s1="slow", s2="slow", s3="slow")
    most = []

    def release():
        wait_for(lambda: len(sweep.starts()) >= parallel)
        time.sleep(0.5)
        most.append(len(sweep.starts()))
        (sweep.home / "release").touch()

    watcher = threading.Thread(target=release)
    watcher.start()
    sweep.run("--parallel", str(parallel))
    watcher.join()
    assert most == [parallel] and len(sweep.starts()) == 4


def test_a_signal_is_handed_on_and_leaves_unfinished_runs(sweep, capsys):
    sweep.behave(s1="slow", s2="slow")

    def stop():
        wait_for(lambda: (sweep.workdir / "seed=2" / "metrics.jsonl").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    watcher = threading.Thread(target=stop)
    watcher.start()
    with pytest.raises(SystemExit) as caught:
        sweep.run("--parallel", "2")
    watcher.join()
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    results = sweep.results()
    states = {seed: (line["status"], line["exit_code"]) for seed, line in results.items()}
    assert states["0"] == ("done", "0") and states["3"] == ("waiting", "")
    assert states["1"] == states["2"] == ("stopped", "143")
    assert (sweep.workdir / "seed=1" / "checkpoints" / "3").exists(), "it could write a checkpoint"
    assert "stopped by signal" in capsys.readouterr().out
    (sweep.home / "release").touch()
    sweep.run()
    assert sweep.starts() == {"0": 1, "1": 2, "2": 2, "3": 1}


def test_a_second_signal_kills(sweep, monkeypatch):
    sweep.behave(s0="slow")
    seen = []

    def forward(active, number):
        seen.append(number)  # the first is lost on a run that hangs
        if number == signal.SIGKILL:
            original(active, number)

    original = run_module._forward
    monkeypatch.setattr(run_module, "_forward", forward)

    def stop():
        wait_for(lambda: sweep.starts())
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    watcher = threading.Thread(target=stop)
    watcher.start()
    with pytest.raises(SystemExit) as caught:
        sweep.run()
    watcher.join()
    assert caught.value.code == 128 + signal.SIGINT
    assert seen == [signal.SIGTERM, signal.SIGKILL]
    assert sweep.results()["0"]["exit_code"] == "-9"


def test_killed_by_9_a_sweep_loses_nothing_and_is_not_run_beside_itself(sweep):
    sweep.behave(s1="slow")
    driver = sweep.home / "driver.py"
    driver.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from launch import sweep\nfrom sprint_jax.sweeps import drive\n"
        f"drive.TRAIN = {FAKE!r}\nsweep.main(sys.argv[1:])\n"
    )
    # A backend that cannot be had: a sweep must not take the devices of its trainings.
    process = subprocess.Popen(
        [sys.executable, str(driver), *sweep.arguments()],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
    )
    wait_for(lambda: "1" in sweep.starts())
    with pytest.raises(UserError, match="another sweep runs in --workdir"):
        sweep.run()
    process.kill()
    process.wait()
    results = sweep.results()
    assert results["0"]["status"] == "done" and float(results["0"]["seconds"]) > 0
    assert results["3"]["status"] == "waiting"

    # Run 1 was orphaned and lives: the next sweep waits for it, and takes it as it ends.
    def release():
        wait_for(lambda: sweep.results()["1"]["status"] == "running")
        time.sleep(0.5)
        (sweep.home / "release").touch()

    watcher = threading.Thread(target=release)
    watcher.start()
    sweep.run("--parallel", "1")
    watcher.join()
    assert sweep.starts() == {"0": 1, "1": 1, "2": 1, "3": 1}
    assert {line["status"] for line in sweep.results().values()} == {"done"}


def test_an_error_of_the_sweep_itself_leaves_no_run_behind(sweep, monkeypatch):
    sweep.behave(s0="slow")
    write = drive.write_results

    def full(workdir, ranked, metrics):
        if sweep.starts():
            wait_for(lambda: (sweep.workdir / "seed=0" / "metrics.jsonl").exists())
            raise UserError("cannot write results.csv: No space left on device")
        write(workdir, ranked, metrics)

    def tell(row, result, command, original=run_module._try_start):
        what = original(row, result, command)
        wait_for(lambda: sweep.starts())
        return what

    monkeypatch.setattr(drive, "write_results", full)
    monkeypatch.setattr(run_module, "_try_start", tell)
    with pytest.raises(UserError, match="No space left"):
        sweep.run()
    assert (sweep.workdir / "seed=0" / "checkpoints" / "3").exists()
    assert sweep.starts() == {"0": 1}


def test_folders_of_another_sweep_and_foreign_results_are_refused(sweep):
    sweep.run()
    other = [word if word != "seed" else "lr" for word in sweep.arguments()]
    with pytest.raises(UserError, match="holds another sweep"):
        command.main(other)
    (sweep.workdir / "results.csv").write_text("name,age\nme,7\n")
    with pytest.raises(UserError, match=r"results.csv is not what a sweep writes"):
        sweep.run()
    assert sum(sweep.starts().values()) == 4


def test_a_metric_that_nobody_logs_is_named(sweep, capsys):
    sweep.run("--metric", "loss/folw")
    assert "no row has logged 'loss/folw', nearest is 'loss/flow'" in capsys.readouterr().err
    assert {line["loss/folw"] for line in sweep.results().values()} == {""}


def test_a_row_whose_last_values_are_not_finite_is_never_the_best(sweep):
    sweep.run()
    path = sweep.workdir / "seed=2" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "loss/flow": null}\n')
    results = {row.name: Result("done") for row in sweep.rows}
    ranked = rank(sweep.rows, results, Ranking(("loss/flow",), "min", 2))
    assert ranked[-1].row.name == "seed=2" and ranked[-1].scores == [None]


def test_progress_line_and_what_is_left(sweep):
    now = [0.0]
    results = {row.name: Result() for row in sweep.rows}
    for row in sweep.rows:
        row.folder.mkdir(parents=True)
    progress = Progress(sweep.rows, results, clock=lambda: now[0])
    assert progress.line("begins") == "0/4 done  4 waiting  begins"
    metrics = "".join(f'{{"step": {step}, "loss/flow": 1.0}}\n' for step in range(1, 7))
    (sweep.rows[0].folder / "metrics.jsonl").write_text(metrics)
    (sweep.rows[1].folder / "metrics.jsonl").write_text('{"step": 2, "x": 1}\n{"step": 3')
    for row, status in zip(sweep.rows, ("done", "running", "failed", "waiting"), strict=True):
        results[row.name].status = status
    now[0] = 80.0  # for 8 steps; 4 of the second and 6 of the last are left
    expected = "1/4 done  1 failed  1 running  1 waiting  so far  ETA 0:01:40"
    assert progress.line("so far") == expected
    assert progress.running() == "seed=1 step 2/6"


def test_last_error(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("error: an old one\n")
    offset = path.stat().st_size
    assert last_error(path) == "error: an old one" and last_error(path, offset) == ""
    path.write_text(path.read_text() + "Traceback\n\nValueError: x\n\n")
    assert last_error(path, offset) == "ValueError: x"
    path.write_text(path.read_text() + "error: " + "y" * 1000 + "\nafter\n")
    assert last_error(path, offset).startswith("error: yyy") and len(last_error(path)) == 300
