"""The log of a run: metrics.jsonl, TensorBoard, sample pictures, curves and a progress line.

metrics.jsonl is the record: one JSON object per logged step, key ``step`` first. Curves are made from it,
and TensorBoard's files are written beside it. Metrics are named ``group/name`` (``loss/scm``,
``time/step_seconds``), with one panel of the curves for each group.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ..checkpoints.workdir import read_metrics
from ..core.errors import UserError
from ..core.files import write_atomic
from ..core.progress import Progress
from ..core.storage import AnyPath, Mirror, as_path, in_bucket
from .curves import draw_curves
from .diagnostics import verdict

SYNC_SECONDS = 5.0
PUSH_SECONDS = 60.0  # to a bucket; with every checkpoint as well


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the system says of a full or read-only disk into a `UserError` that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


class MetricLog(contextlib.AbstractContextManager):
    """Writes the metrics, pictures and curves of one run; does nothing on processes other than 0.

    Use as a context manager or call `close`.

    Args:
      workdir: the run's directory; made if missing. Files for a bucket are written to a local folder, and go
        there whole every minute and before every checkpoint.
      resume_step: the step that was restored, or None for a fresh start. Later steps will come again: their
        lines are dropped, as is a torn last line, and TensorBoard hides its own.
      progress: shows the losses of the lines that were deferred.

    Raises:
      UserError: when a file cannot be written; so do all methods.
    """

    def __init__(
        self, workdir: str | AnyPath, *, resume_step: int | None, progress: Progress | None = None
    ):
        self._mirror = None
        self.workdir = as_path(workdir)
        self._active = jax.process_index() == 0
        self._progress = progress
        self._deferred: tuple[int, dict[str, Any]] | None = None
        if not self._active:
            return
        # Imported here, because tensorboardX imports torch where there is one.
        from .board import Board

        kept = -1 if resume_step is None else resume_step
        records = read_metrics(self.workdir / "metrics.jsonl")
        records = [record for record in records if record["step"] <= kept]
        if in_bucket(self.workdir):  # where nothing can be appended to
            self._mirror = Mirror(self.workdir)
            self.workdir = self._mirror.local
        self.path = self.workdir / "metrics.jsonl"
        with _writing(self.workdir):
            (self.workdir / "samples").mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, b"".join(map(_line, records)))
            self._file = self.path.open("ab")
            # File names hold the time in whole seconds: a quick restart would overwrite the first.
            suffix = f".{os.getpid()}.{time.monotonic_ns()}"
            self._board = Board(self.workdir / "tensorboard", kept + 1, suffix)
        self._synced = time.monotonic()

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line.

        Values are Python, numpy or jax scalars (a jax scalar is waited for). NaN and infinities become null,
        since JSON has no such numbers. The system has the line at once, so that it outlives a killed process;
        it is forced to disk every few seconds.
        """
        if not self._active:
            return
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        with _writing(self.path):
            self._file.write(_line({"step": int(step)} | dict.fromkeys(values) | finite))
            self._file.flush()
            self._board.scalars(int(step), finite)
        if time.monotonic() - self._synced > (PUSH_SECONDS if self._mirror else SYNC_SECONDS):
            self.sync()

    def defer(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes a line whose values may still be on a device; `flush` writes it.

        Nothing waits here: the values start on their way to the host once they are computed.
        """
        if not self._active:
            return
        self.flush()
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._deferred = (step, dict(metrics))

    def flush(self) -> None:
        """Writes the deferred line, if there is one, and waits for its values if need be."""
        if self._deferred is None:
            return
        (step, metrics), self._deferred = self._deferred, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.write(step, values)
        if self._progress is not None:
            shown = {name: value for name, value in values.items() if name.startswith("loss/")}
            self._progress.update(step, shown)

    def sync(self) -> None:
        """Forces the lines so far to disk or into the bucket, so that they outlive a failure of the machine."""
        self.flush()
        if self._active:
            with _writing(self.workdir):
                os.fsync(self._file.fileno())
                self._board.flush()
                if self._mirror:
                    self._mirror.push()
            self._synced = time.monotonic()

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture as samples/STEP_NAME.png (step in 8 digits) and to TensorBoard.

        Args:
          name: slashes become dashes in the file name.
          pixels: [H, W, 3] or [H, W], uint8.

        Raises:
          ValueError: for another dtype or shape.
        """
        if not self._active:
            return
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2:
            raise ValueError(f"{name}: need uint8 [H, W, 3], got {pixels.dtype} {pixels.shape}")
        path = self.workdir / "samples" / f"{step:08d}_{name.replace('/', '-')}.png"
        with _writing(path):
            Image.fromarray(pixels).save(path)
            self._board.image(int(step), name, pixels)

    def curves(self) -> None:
        """Draws curves.png from metrics.jsonl: one panel per metric group."""
        self.flush()
        if self._active:
            draw_curves(self.path, self.workdir / "curves.png")

    def verdict(self) -> None:
        """Draws curves.png, and prints what the losses on images did, by the last lines of metrics.jsonl."""
        self.curves()
        if self._active:
            for line in verdict(read_metrics(self.path)[-10:]):
                print(line, flush=True)

    def close(self) -> None:
        """Writes what is deferred and closes the files."""
        if not self._active:
            return
        try:
            self.sync()
        finally:  # what is deferred may belong to a device that failed
            self._file.close()
            self._board.close()
            if self._mirror:
                self._mirror.close()
            self._active = False
