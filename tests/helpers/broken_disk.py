"""Trains, and damages the disk just before a checkpoint: ``broken_disk.py STEP COMMAND WORDS OF train``."""

import subprocess
import sys

from sprint_jax import train
from sprint_jax.checkpoints.checkpoint import Checkpoints
from sprint_jax.core import cli

STEP, COMMAND = int(sys.argv[1]), sys.argv[2]
sys.argv[1:3] = []
save = Checkpoints.save


def broken(self, step, *arguments, **options):
    if step == STEP:
        self.wait()
        subprocess.run(COMMAND, shell=True, check=True, capture_output=True)
    return save(self, step, *arguments, **options)


Checkpoints.save = broken
cli.run_command(train.main)
