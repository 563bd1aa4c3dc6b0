"""Sweeps on SLURM, with programs in place of its own, on a pod, and with real trainings."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import ROOT, quick_compilation, words, write_digits
from helpers.toy_sweep import FAKE, ToySweep

from sprint_jax.core.errors import UserError
from sprint_jax.sweeps.rows import load_rows
from sprint_jax.sweeps.submit import job_name


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return ToySweep(tmp_path, monkeypatch)


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
    flags, (script, dashes), rest = first[:4], first[4:6], first[6:]
    log = f"--output={sweep.workdir / 'seed=0' / 'log.txt'}"
    assert flags == ["--parsable", flags[1], log, "--open-mode=append"]
    assert (script, dashes) == ("launch/slurm.sbatch", "--")
    assert tuple(rest) == sweep.rows[0].arguments
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
    script.write_text(f'echo pod >>log.of.pods; [ "$1" = -- ]; shift; exec {" ".join(FAKE)} "$@"\n')
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
