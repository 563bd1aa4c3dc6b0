"""The two ways in which a run ends before its last step: a signal, or numbers that are not finite."""

import signal
from pathlib import Path

import jax
import numpy as np

from ..errors import UserError


class Stop:
    """Remembers that SIGTERM came, so that the step in progress can end in a checkpoint."""

    def __init__(self):
        self.requested = 0
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame):
        self.requested = number


def check_finite(in_a_row: int, limit: int, workdir: Path, step: int, metrics: dict) -> None:
    """Ends a run after too many updates that were not finite.

    Raises:
      UserError: when ``in_a_row`` reached ``limit``; it says which numbers went bad at ``step``.
    """
    if in_a_row < limit:
        return
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = [name for name, value in values.items() if not np.isfinite(value) and "/t" not in name]
    raise UserError(
        f"{workdir}: {limit} updates in a row were not finite, the last at step {step} "
        f"(not finite: {', '.join(bad) or 'gradients'}); checkpoints hold the parameters before "
        "them. Lower the learning rate or lengthen scm.tangent_warmup, and see metrics.jsonl for the time bins"
    )
