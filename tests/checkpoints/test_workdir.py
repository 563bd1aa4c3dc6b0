"""The lock of a workdir: one process at a time, and nothing left by one that ends."""

import signal
import subprocess
import sys
import threading

import pytest
from helpers.refusals import refuse
from helpers.runs import ROOT

from sprint_jax.checkpoints.workdir import LOCK_FILE, claim
from sprint_jax.core.errors import UserError

HOLD = "import sys, pathlib, time; from sprint_jax.checkpoints.workdir import claim\n"
HOLD += "with claim(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"


def test_a_held_workdir_is_refused_or_waited_for(tmp_path, capfd):
    workdir = tmp_path / "new" / "run"

    def enter(patience):
        with claim(workdir, patience):
            return (workdir / LOCK_FILE).read_text()

    with claim(workdir) as mark:
        assert (workdir / LOCK_FILE).read_text() == mark
        capfd.readouterr()
        with pytest.raises(UserError) as error:
            enter(0)
        assert str(workdir) in str(error.value) and mark in str(error.value)
        thread = threading.Thread(target=enter, args=[60])
        thread.start()
        while "waiting 60 s" not in capfd.readouterr().err:
            assert thread.is_alive()
    thread.join(timeout=60)
    assert not thread.is_alive() and not (workdir / LOCK_FILE).exists()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        refuse(claim(path).__enter__, exit_code=1, parts=[str(path)])


@pytest.mark.faults
def test_a_killed_process_holds_nothing(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        words = [str(tmp_path / "run"), f"process {process.pid} on host"]
        refuse(claim(tmp_path / "run", 0).__enter__, exit_code=1, parts=words)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with claim(tmp_path / "run", 0):
        assert (tmp_path / "run" / LOCK_FILE).exists()
    assert list((tmp_path / "run").iterdir()) == []
