"""Stands in for `train` in the tests of sweeps: quick, and as ill-behaved as SWEEP_BEHAVIOUR says.

That file maps a run's name to ok, fail, kill (by -9), bad (exit code 2) or slow (until the file
"release" is beside it, or SIGTERM); ``SWEEP_CONFIGS`` holds each run's resolved config. Every start
appends a line to "starts" beside them.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

STEPS = 6
workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
home = Path(os.environ["SWEEP_HOME"])
behaviour = json.loads((home / "behaviour.json").read_text()).get(workdir.name, "ok")
with (home / "starts").open("a") as file:
    file.write(f"{workdir.name}\n")
shutil.copy(home / f"{workdir.name}.json", workdir / "config.json")


def log(step, value):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss/flow": value, "grad/student": 1 / value}) + "\n")


def checkpoint(step):
    (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)


def stop(number, frame):
    checkpoint(3)
    print("stopped by signal at step 3", flush=True)
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, stop)
print("compiling", flush=True)
for step in range(1, 4):
    log(step, 1.0 / step)
if behaviour == "fail":
    print("error: the disk is full", file=sys.stderr, flush=True)
    print("something else", flush=True)
    sys.exit(1)
if behaviour == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
while behaviour == "slow" and not (home / "release").exists():
    time.sleep(0.02)
seed = int(workdir.name.partition("seed=")[2].partition(",")[0] or 9)
for step in range(4, STEPS + 1):
    log(step, (1.0 + abs(seed - 2)) / step)
checkpoint(STEPS)
