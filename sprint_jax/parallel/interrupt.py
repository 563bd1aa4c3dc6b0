"""Two reasons for a run to end before its last step: a signal, or numbers that are not finite."""

import signal
import sys
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..core.errors import UserError
from .peers import NOT_FINITE, Peers


class Stop:
    """Remembers that SIGTERM came, so that a run can end in a checkpoint of the same step everywhere.

    Args:
      peers: the other processes of the run, told of each step; None: there are none.
    """

    def __init__(self, peers: Peers | None = None):
        self._requested, self._peers = 0, peers
        if peers is not None:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
            self._split = NamedSharding(mesh, PartitionSpec("all"))
            self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
            self._agreed = self._spread()
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame):
        self._requested = number

    def _spread(self) -> jax.Array:
        flags = np.full(jax.local_device_count(), self._requested, np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._split, flags))

    def after(self, step: int) -> int:
        """Returns the signal for which the run ends after this step, or 0. Call it once each step.

        With several processes a signal to any of them counts, one step later: the processes compute
        their largest number on the devices and read that of the step before, so that all of them get
        the same answer and no device waits for it.
        """
        if self._peers is None:
            return self._requested
        self._peers.at_step(step)
        before, self._agreed = self._agreed, self._spread()
        return int(before)


def end_stopped(number: int, step: int) -> NoReturn:
    """Ends a command that was stopped by a signal, with 128 + its number."""
    print(f"stopped by signal at step {step}; the same line goes on from there", flush=True)
    sys.exit(128 + number)


def check_finite(in_a_row: int, limit: int, workdir: Path, step: int, metrics: dict) -> None:
    """Ends a run after too many updates that were not finite.

    Raises:
      UserError: when ``in_a_row`` reached ``limit``; it says which numbers went bad at ``step``. Its
        exit code 3 tells supervisors not to try again.
    """
    if in_a_row < limit:
        return
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = [name for name, value in values.items() if not np.isfinite(value) and "/t" not in name]
    raise UserError(
        f"{workdir}: {limit} updates in a row were not finite, the last at step {step} "
        f"(not finite: {', '.join(bad) or 'gradients'}); checkpoints hold the parameters before "
        "them. Lower the learning rate or lengthen scm.tangent_warmup, and see metrics.jsonl for the time bins",
        exit_code=NOT_FINITE,
    )
