"""A sweep outlives each of its runs, and itself. Trainings are stood in for by sweep_train.py."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from runs import ROOT, quick_compilation, words, write_digits
from test_sweeps import TOY

from launch import sweep as command
from sprint_jax.errors import UserError
from sprint_jax.sweeps import drive
from sprint_jax.sweeps import run as run_module
from sprint_jax.sweeps.plan import load_rows
from sprint_jax.sweeps.report import Ranking, rank
from sprint_jax.sweeps.run import Progress, Result, last_error
from sprint_jax.sweeps.submit import job_name

FAKE = (sys.executable, "-S", str(ROOT / "tests" / "sweep_train.py"))


class Sweep:
    """The toy sweep over seeds 0 to 3 in a folder, and what its runs do."""

    def __init__(self, folder: Path, monkeypatch):
        self.home, self.workdir, self.config = folder, folder / "sweep", folder / "toy.py"
        self.config.write_text(TOY)
        self.rows = load_rows(str(self.config), "seed", [], self.workdir)
        for row in self.rows:
            (folder / f"{row.name}.json").write_text(json.dumps(row.config.to_dict()))
        self.behave()
        monkeypatch.setenv("SWEEP_HOME", str(folder))
        monkeypatch.setattr(drive, "TRAIN", FAKE)

    def behave(self, **by_seed: str) -> None:
        named = {f"seed={key[1:]}": value for key, value in by_seed.items()}
        (self.home / "behaviour.json").write_text(json.dumps(named))

    def arguments(self, *flags: str) -> list[str]:
        base = ["--config", str(self.config), "--sweep", "seed", "--workdir", str(self.workdir)]
        return [*base, *flags]

    def run(self, *flags: str) -> None:
        command.main(self.arguments(*flags))

    def results(self) -> dict[str, dict]:
        """results.csv by run, in its order."""
        with (self.workdir / "results.csv").open(newline="") as file:
            return {line["run"].removeprefix("seed="): line for line in csv.DictReader(file)}

    def starts(self) -> dict[str, int]:
        text = (self.home / "starts").read_text() if (self.home / "starts").exists() else ""
        return dict(Counter(line.removeprefix("seed=") for line in text.split()))


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return Sweep(tmp_path, monkeypatch)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
    process = subprocess.Popen([sys.executable, str(driver), *sweep.arguments()], cwd=ROOT)
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


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable} -S\n{text}")
    path.chmod(0o755)


@pytest.fixture
def cluster(sweep, monkeypatch):
    """``sbatch`` and ``squeue`` on PATH; the queue is a file of job names."""
    queue = sweep.home / "queue"
    queue.touch()
    write_program(
        sweep.home / "bin" / "sbatch",
        "import json, sys\n"
        f"home = {str(sweep.home)!r}\n"
        "name = [w for w in sys.argv if w.startswith('--job-name=')][0].partition('=')[2]\n"
        "if 'seed=3' in name:\n    sys.exit('sbatch: error: invalid partition')\n"
        "open(home + '/queue', 'a').write(name + '\\n')\n"
        "open(home + '/submitted', 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "print('1234;cluster')\n",
    )
    write_program(
        sweep.home / "bin" / "squeue",
        "import sys\n"
        "assert sys.argv[1:] == ['--me', '--noheader', '--format=%j'], sys.argv\n"
        f"print(open({str(queue)!r}).read(), end='')\n",
    )
    monkeypatch.setenv("PATH", f"{sweep.home / 'bin'}:{os.environ['PATH']}")

    def submitted():
        path = sweep.home / "submitted"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return queue, submitted


def test_slurm_submits_each_unfinished_run_once(sweep, cluster, capsys):
    queue, submitted = cluster
    with pytest.raises(UserError, match="1 of 4 runs failed: seed=3"):
        sweep.run("--backend", "slurm")
    assert len(submitted()) == 3
    first = submitted()[0]
    flags, script, rest = first[:4], first[4], first[5:]
    log = f"--output={sweep.workdir / 'seed=0' / 'log.txt'}"
    assert flags == ["--parsable", flags[1], log, "--open-mode=append"]
    assert script == "launch/slurm.sbatch" and tuple(rest) == sweep.rows[0].arguments
    results = sweep.results()
    assert [line["status"] for line in results.values()] == ["queued"] * 3 + ["failed"]
    assert (
        "sbatch failed with exit code 1: sbatch: error: invalid partition"
        in (results["3"]["error"])
    )
    assert "submitted as job 1234" in capsys.readouterr().out

    # In the queue: nothing more is submitted.
    with pytest.raises(UserError, match="seed=3"):
        sweep.run("--backend", "slurm")
    assert len(submitted()) == 3 and "is in the queue" in capsys.readouterr().out

    # Run 0 finished, run 1 left the queue unfinished, run 2 is still in it.
    subprocess.run([*FAKE, *sweep.rows[0].arguments], check=True)
    queue.write_text(job_name(sweep.rows[2]) + "\n")
    with pytest.raises(UserError, match="seed=3"):
        sweep.run("--backend", "slurm")
    assert [each[1] for each in submitted()[3:]] == [f"--job-name={job_name(sweep.rows[1])}"]
    results = sweep.results()
    states = {seed: line["status"] for seed, line in results.items()}
    assert states == {"0": "done", "1": "queued", "2": "queued", "3": "failed"}
    assert next(iter(results)) == "0" and float(results["0"]["loss/flow"]) > 0


def test_slurm_does_not_submit_blindly(sweep, cluster, monkeypatch):
    _, submitted = cluster
    write_program(
        sweep.home / "bin" / "squeue", "import sys\nsys.exit('cannot contact controller')"
    )
    with pytest.raises(UserError, match="squeue failed with exit code 1: cannot contact contr"):
        sweep.run("--backend", "slurm")
    assert submitted() == []
    monkeypatch.setenv("PATH", str(sweep.home))
    with pytest.raises(UserError, match="there is no squeue on PATH"):
        sweep.run("--backend", "slurm")


def test_pod_runs_one_after_the_other_through_its_script(sweep, monkeypatch):
    script = sweep.home / "launch" / "tpu_pod.sh"
    script.parent.mkdir()
    script.write_text(f'echo pod >>log.of.pods; exec {" ".join(FAKE)} "$@"\n')
    monkeypatch.chdir(sweep.home)
    sweep.behave(s1="fail")
    with pytest.raises(UserError, match="1 of 4 runs failed: seed=1"):
        sweep.run("--backend", "pod")
    assert (sweep.home / "log.of.pods").read_text() == 4 * "pod\n"
    assert [line["status"] for line in sweep.results().values()] == ["done"] * 3 + ["failed"]


def test_real_trainings_one_of_which_is_refused(tmp_path, tmp_path_factory):
    """Two seeds of the shrunk teacher; the folder of a third holds a run with other values."""
    data = write_digits(tmp_path_factory.getbasetemp() / "digits")
    config = tmp_path / "settings" / "small.py"
    config.parent.mkdir()
    config.write_text(
        "from configs.digits import get_config\n"
        "from sprint_jax.sweeps import sweep\n"
        "def sweep_seed():\n    return sweep('seed', [0, 1, 2])\n"
    )
    workdir = tmp_path / "sweep"
    _, _, _, _, *flags = words("configs/digits.py:teacher,small", data, workdir, steps=3)
    arguments = ["--config", f"{config}:teacher,small", "--sweep", "seed", *flags]
    arguments += ["--workdir", str(workdir), "--parallel", "2"]
    (other,) = (
        row
        for row in load_rows(f"{config}:teacher,small", "seed", flags, workdir)
        if row.name == "seed=1"
    )
    other.folder.mkdir(parents=True)
    changed = other.config.override({"seed": 5}).to_dict()
    (other.folder / "config.json").write_text(json.dumps(changed))
    with quick_compilation():
        done = subprocess.run(
            [sys.executable, "-m", "launch.sweep", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 3 runs failed: seed=1; see ")
    with (workdir / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["run"]: line["status"] for line in lines[:2]} == {
        "seed=0": "done",
        "seed=2": "done",
    }
    assert float(lines[0]["loss/flow"]) <= float(lines[1]["loss/flow"])
    refused = lines[2]
    assert (refused["run"], refused["status"], refused["exit_code"]) == ("seed=1", "failed", "1")
    assert "holds a run of another config: seed differ" in refused["error"]
    assert (workdir / "seed=0" / "samples").is_dir() and (workdir / "results.png").is_file()
