"""Stands in for `train` in tests of sweeps; behaviour.json in the folder SWEEP_HOME says what a run does.

It is ok, fails, is killed (by -9), is slow (waits for the file "release" or SIGTERM) or deaf (slow, and no
SIGTERM ends it). NAME.json is its resolved config. Every start appends a line to "starts".
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
home = Path(os.environ["SWEEP_HOME"])
behaviour = json.loads((home / "behaviour.json").read_text()).get(workdir.name, "ok")
with (home / "starts").open("a") as file:
    file.write(f"{workdir.name}\n")
shutil.copy(home / f"{workdir.name}.json", workdir / "config.json")


def log(step, value):
    record = {"step": step, "loss/flow": value, "grad/student": 1 / value, "time/step_seconds": 0.5}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def stop(number, frame):
    (workdir / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
    if behaviour != "deaf":
        sys.exit(128 + number)


signal.signal(signal.SIGTERM, stop)
print("compiling", flush=True)
if (workdir / "checkpoints" / "6").exists():
    sys.exit()
for step in range(1, 4):
    log(step, 1.0 / step)
if behaviour == "fail":
    print("error: the disk is full\nsomething else", file=sys.stderr, flush=True)
    sys.exit(1)
if behaviour == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
while behaviour in ("slow", "deaf") and not (home / "release").exists():
    time.sleep(0.02)
for step in range(4, 7):
    log(step, (1.0 + abs(int(workdir.name[-1]) - 2)) / step)
(workdir / "checkpoints" / "6").mkdir(parents=True)
