"""The two ways in which a run ends before its last step: a signal, or numbers that are not finite."""

import signal
from pathlib import Path

import jax
import numpy as np


class Stop:
    """Remembers that SIGTERM came, so that the step in progress can end in a checkpoint."""

    def __init__(self):
        self.requested = 0
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame):
        self.requested = number


def explain_nonfinite(workdir: Path, step: int, metrics: dict, limit: int) -> str:
    """One line that says which numbers went bad first, for the error that ends a run."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = [name for name, value in values.items() if not np.isfinite(value) and "/t" not in name]
    return (
        f"{workdir}: {limit} updates in a row were not finite, the last at step {step} "
        f"(not finite: {', '.join(bad) or 'gradients'}); checkpoints hold the parameters before "
        "them. Lower the learning rate or lengthen scm.tangent_warmup, and see metrics.jsonl for the time bins"
    )
