"""Reasons for a run to end before its last step: a signal, memory, or numbers that are not finite."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..core.errors import OUT_OF_MEMORY, UserError, is_out_of_memory
from ..core.progress import format_duration
from .peers import NOT_FINITE, Peers

PATIENCE = (
    150.0  # seconds from a signal to the end of a step; launch scripts give 180 until they kill
)
TELL = 30.0  # seconds between signs of life in a long phase


class Stop(contextlib.AbstractContextManager):
    """The phases of a run, and the SIGTERM that ends it in any of them. Use as a context manager.

    Until `begin` a signal ends the process at once, and all others with it: nothing is lost. After it the run
    ends in a checkpoint of the same step everywhere (`after`); a second signal, or `PATIENCE` seconds without
    the end of a step, end it at once. A thread reads the signals, since the main thread may wait for devices,
    disks or other processes where Python does not see them. A phase that takes long is named on stderr.

    Args:
      peers: the other processes of the run, told of each phase and step; None: there are none.
    """

    def __init__(self, peers: Peers | None = None):
        self._requested, self._peers = 0, peers
        self._stepping, self._timer = False, None
        self.doing, self._since, self._told = "starting", time.monotonic(), TELL
        self._over = threading.Event()

    def __enter__(self) -> "Stop":
        self._before = signal.signal(signal.SIGTERM, self._handle)
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=[reader], daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._before)
        self._writer.close()  # wakes the thread
        self._thread.join()
        if self._timer:  # which the thread may have started just now
            self._timer.cancel()

    def phase(self, doing: str) -> None:
        """Notes what the run does from now on, such as "reading the data"."""
        self.doing, self._since, self._told = doing, time.monotonic(), TELL
        if self._peers is not None:
            self._peers.at_phase(doing)

    def begin(self) -> None:
        """Notes that steps follow, each of which is told to `after`."""
        self._stepping = True
        if self._peers is not None:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
            self._split = NamedSharding(mesh, PartitionSpec("all"))
            self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
            self._agreed = self._spread()

    def after(self, step: int) -> int:
        """Returns the signal for which the run ends after this step, or 0. Call it once each step.

        With several processes a signal to any of them counts, one step later: the processes compute
        their largest number on the devices and read that of the step before, so that all of them get
        the same answer and no device waits for it.
        """
        self.doing, self._since, self._told = "", time.monotonic(), TELL
        number = self._requested
        if self._peers is not None:
            self._peers.at_step(step)
            before, self._agreed = self._agreed, self._spread()
            number = int(before)
        if number and self._timer:
            self._timer.cancel()  # what is left to do is a checkpoint
        return number

    def _handle(self, number, frame):
        self._requested = number

    def _spread(self) -> jax.Array:
        flags = np.full(jax.local_device_count(), self._requested, np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._split, flags))

    def _watch(self, reader: socket.socket) -> None:
        reader.settimeout(1.0)
        with reader:
            while not self._over.is_set():
                try:
                    numbers = reader.recv(64)
                except TimeoutError:
                    self._tell()
                    continue
                if signal.SIGTERM in numbers:
                    self._signalled()

    def _signalled(self) -> None:
        if self._over.is_set():  # the run was over before this thread saw the signal
            return
        if not self._stepping:
            self._end(f"while {self.doing}, before the first step")
        if self._timer:
            self._end("twice")
        why = f"and no step ended for {PATIENCE:g} s"
        self._timer = threading.Timer(PATIENCE, self._end, [why])
        self._timer.daemon = True
        self._timer.start()

    def _end(self, why: str) -> NoReturn:
        line = f"was stopped by a signal {why}; the same line goes on from the last checkpoint"
        print(f"this process {line}", flush=True)
        code = 128 + signal.SIGTERM
        if self._peers is not None:
            self._peers.end(code, line)
        os._exit(code)

    def _tell(self) -> None:
        seconds = time.monotonic() - self._since
        if self.doing and seconds >= self._told and not (self._peers and self._peers.index):
            print(f"{self.doing}: {format_duration(seconds)} so far", file=sys.stderr, flush=True)
            self._told = seconds + TELL


@contextlib.contextmanager
def named_memory(stop: Stop) -> Iterator[None]:
    """Turns an error of memory into one line that says what to change.

    Raises:
      UserError: with exit code 4, which tells supervisors not to try again.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"out of memory while {stop.doing or 'training'} ({what}): lower config.data.batch_size or raise "
            "config.accumulate, set config.model.remat=full, or split the state with config.mesh.fsdp",
            exit_code=OUT_OF_MEMORY,
        ) from error


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
