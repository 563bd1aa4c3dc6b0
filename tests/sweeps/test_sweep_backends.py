"""Sweeps on SLURM, with programs in place of its own, on a pod, and with real trainings."""

import csv
import os
import subprocess

import pytest
from helpers.runs import ROOT, run_here, words
from helpers.toy_sweep import FAKE, ToySweep

from launch import sweep as command
from sprint_jax.core.errors import UserError
from sprint_jax.sweeps.slurm import job_name

SBATCH = """#!/bin/sh
case "$1" in *seed=3*) echo "invalid partition" >&2; exit 1 ;; esac
echo "${1#--job-name=}" >>"$SWEEP_HOME/queue"
echo "$@" >>"$SWEEP_HOME/submitted"
"""
SQUEUE = '#!/bin/sh\n[ "$*" = "--me --noheader --format=%j" ] && cat "$SWEEP_HOME/queue"\n'


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The toy sweep, with SLURM's programs on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    (tmp_path / "queue").touch()
    return ToySweep(tmp_path, monkeypatch)


def test_slurm_submits_each_unfinished_run_once(sweep):
    with pytest.raises(UserError, match="1 of 4 runs failed: seed=3"):
        sweep.run("--backend", "slurm")
    names = [f"--job-name={job_name(row)}" for row in sweep.rows]
    log = f"--output={sweep.workdir / 'seed=0' / 'log.txt'}"
    line = [names[0], log, "--open-mode=append", "launch/slurm.sbatch --", *sweep.rows[0].arguments]
    submitted = sweep.home / "submitted"
    assert submitted.read_text().splitlines()[0] == " ".join(line)
    assert sweep.column("status") == ["queued"] * 3 + ["failed"]
    assert "invalid partition" in sweep.results()["3"]["error"]

    # Run 0 finished, run 1 left the queue unfinished, run 2 is still in it.
    subprocess.run([*FAKE, *sweep.rows[0].arguments], check=True)
    (sweep.home / "queue").write_text(job_name(sweep.rows[2]) + "\n")
    with pytest.raises(UserError, match="seed=3"):
        sweep.run("--backend", "slurm")
    again = [each.split()[0] for each in submitted.read_text().splitlines()]
    assert again == [*names[:3], names[1]]
    assert sweep.column("status") == ["done", "queued", "queued", "failed"]
    assert float(sweep.results()["0"]["loss/flow"]) > 0


def test_slurm_does_not_submit_blindly(sweep, monkeypatch):
    (sweep.home / "queue").unlink()
    for path in (os.environ["PATH"], str(sweep.home)):
        monkeypatch.setenv("PATH", path)
        with pytest.raises(UserError, match="squeue"):
            sweep.run("--backend", "slurm")
    assert not (sweep.home / "submitted").exists()


def test_pod_runs_one_after_the_other_through_its_script(sweep, monkeypatch):
    (sweep.home / "launch").mkdir()
    script = f'echo pod >>log.of.pods; [ "$1" = -- ]; shift; exec {" ".join(FAKE)} "$@"\n'
    (sweep.home / "launch" / "tpu_pod.sh").write_text(script)
    monkeypatch.chdir(sweep.home)
    sweep.behave(s1="fail")
    with pytest.raises(UserError, match="1 of 4 runs failed: seed=1"):
        sweep.run("--backend", "pod")
    assert (sweep.home / "log.of.pods").read_text() == 4 * "pod\n"
    assert sweep.column("status") == ["done", "failed", "done", "done"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_real_trainings_one_of_which_is_refused(data, tmp_path, monkeypatch, capfd):
    """The shrunk teacher; a batch of 16 cannot be split into three microbatches."""
    config, workdir = tmp_path / "small.py", tmp_path / "sweep"
    config.write_text(
        "from configs.digits import get_config\n"
        "sweep_parts = lambda: [{'accumulate': 1}, {'accumulate': 3}]\n"
    )
    line = words("configs/digits.py:teacher,small", data, workdir, steps=3)[2:]
    line += ["--config", f"{config}:teacher,small", "--sweep", "parts", "--parallel", "2"]
    monkeypatch.chdir(ROOT)
    ended = run_here(line, monkeypatch, capfd, main=command.main)
    assert ended.code == 1 and "accumulate=3" in ended.error
    with (workdir / "results.csv").open(newline="") as file:
        done, refused = csv.DictReader(file)
    assert (done["run"], done["status"], done["steps"]) == ("accumulate=1", "done", "3")
    assert float(done["loss/flow"]) > 0 and float(done["seconds"]) > 0
    assert (refused["run"], refused["status"]) == ("accumulate=3", "failed")
    assert refused["exit_code"] == "2" and "config.accumulate" in refused["error"]
    assert (workdir / "accumulate=1" / "samples").is_dir() and (workdir / "results.png").is_file()
