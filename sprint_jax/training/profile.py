"""A window of steps, traced on chosen hosts, for TensorBoard's or Perfetto's viewers."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax

from ..core.errors import UserError
from ..core.storage import AnyPath, local_output


class Profile(contextlib.AbstractContextManager):
    """Traces some steps into ``folder/host_K``, K the process index.

    Use as a context manager, and call `at` before every step. A run that is resumed inside the
    window traces nothing; one that ends inside it leaves the trace so far.

    Args:
      folder: gets one subfolder per host that traces.
      options: ``profile_start``, first step of the window, counted from 1 (0 is off);
        ``profile_steps``, its length; ``profile_hosts``, process indices that trace.

    Raises:
      UserError: exit code 2, for a window or host that cannot be.
    """

    def __init__(self, folder: AnyPath, options: Mapping[str, Any]):
        start, steps, hosts = (options[f"profile_{key}"] for key in ("start", "steps", "hosts"))
        if start < 0 or steps < 1:
            raise UserError(
                f"config.log.profile_start={start} must be at least 0 (off), "
                f"config.log.profile_steps={steps} at least 1",
                exit_code=2,
            )
        last = jax.process_count() - 1
        if start and not (hosts and all(0 <= host <= last for host in hosts)):
            raise UserError(
                f"config.log.profile_hosts={hosts}: name some of the processes 0 to {last}",
                exit_code=2,
            )
        self._folder = folder / f"host_{jax.process_index()}"
        self._start, self._stop = start, start + steps
        self._mine = bool(start) and jax.process_index() in hosts
        self._running = False

    def __exit__(self, *exception) -> None:
        self._end()

    def at(self, step: int, pending: Any) -> None:
        """Starts or ends the trace where ``step``, about to begin, is an edge of the window.

        Args:
          step: the step that comes.
          pending: arrays of the step before; waited for at the edges, so that the trace holds whole
            steps of the window and no others.
        """
        if self._mine and step == self._start:
            jax.block_until_ready(pending)
            self._output = contextlib.ExitStack()
            jax.profiler.start_trace(self._output.enter_context(local_output(self._folder)))
            self._running = True
        elif self._running and step >= self._stop:
            jax.block_until_ready(pending)
            self._end()

    def _end(self) -> None:
        if self._running:
            self._running = False
            with self._output:
                jax.profiler.stop_trace()
            print(f"trace: {self._folder}", flush=True)
