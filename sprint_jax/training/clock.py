"""A clock of the training loop: shares of the wall clock for data, steps, logs and checkpoints.

    clock = Clock(step=0, images=64)
    with clock("data_wait"):
        batch = next(feed)
    ...
    metrics |= clock.lap(step=20)

It measures the host, while a device works on by itself: the time that the host waits for a step's numbers
counts as ``step``. A share of ``data_wait`` near 0 says that batches were always ready.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

PARTS = ("data_wait", "step", "log", "checkpoint")


class Clock:
    """Adds up seconds per part since the last `lap`.

    Args:
      step: the step that is done when the clock starts.
      images: samples of one step, over all hosts.
      now: seconds, monotonic.
    """

    def __init__(self, step: int, images: int, now: Callable[[], float] = time.perf_counter):
        self._images, self._now = images, now
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._step = step
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._began = self._now()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts the time of a ``with`` block as that of ``part``, one of `PARTS`; blocks do not nest."""
        began = self._now()
        try:
            yield
        finally:
            self._spent[part] += self._now() - began

    def lap(self, step: int) -> dict[str, float]:
        """Returns metrics of the time since the last call, or since the clock was made, and starts anew.

        Args:
          step: the step that is done now, later than that of the last call.

        Returns:
          ``time/PART``: fractions of the wall clock, less than 1 in sum; ``time/step_seconds`` and
          ``time/images_per_second``.
        """
        wall, steps = self._now() - self._began, step - self._step
        metrics = {f"time/{part}": spent / wall for part, spent in self._spent.items()}
        metrics |= {
            "time/step_seconds": wall / steps,
            "time/images_per_second": self._images * steps / wall,
        }
        self._restart(step)
        return metrics
