"""Progress of long work: a bar on a terminal, else plain lines with rate and ETA."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

import jax
from tqdm import tqdm


def format_duration(seconds: float) -> str:
    """Returns hours, minutes and seconds, such as 1:41:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress(contextlib.AbstractContextManager):
    """A tqdm bar on a terminal, else a plain line every ``interval`` seconds; silent but on process 0.

    Plain lines look like ``step 1200/20000  loss/scm 0.93  3.1 steps/s  ETA 1:41:03``. The rate leaves out
    the first update, which compiles.

    Args:
      total: step at which the run ends.
      start: step it starts from (the restored one).
      unit: the word for what is counted.
      interval: seconds between plain lines.
      stream: default stderr.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        unit: str = "step",
        interval: float = 20.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._active = jax.process_index() == 0
        self._total, self._unit = total, unit
        self._interval, self._clock = interval, clock
        self._origin: tuple[int, float] | None = None
        self._printed = -math.inf
        self._bar = None
        if self._active and self._stream.isatty():
            self._bar = tqdm(total=total, initial=start, file=self._stream, unit=unit)

    def __exit__(self, *exception) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that ``step`` updates are done, with a few numbers (of the host: others are waited for)."""
        if not self._active:
            return
        now = self._clock()
        if self._origin is None:
            self._origin = (step, now)
        shown = {name: f"{float(value):.4g}" for name, value in (metrics or {}).items()}
        if self._bar is not None:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        if now - self._printed < self._interval and step < self._total:
            return
        self._printed = now
        words = [f"{self._unit} {step}/{self._total}"]
        words += [f"{name} {text}" for name, text in shown.items()]
        first_step, first_time = self._origin
        if step > first_step and now > first_time:
            rate = (step - first_step) / (now - first_time)
            left = format_duration((self._total - step) / rate)
            words += [f"{rate:.3g} {self._unit}s/s", f"ETA {left}"]
        print("  ".join(words), file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
