"""What a run tells: metrics.jsonl, TensorBoard, sample pictures, curves and a progress line.

metrics.jsonl is the record: one JSON object per logged step, key ``step`` first. The rest is made
from it or beside it. Metric names are ``group/name`` (``loss/scm``, ``grad/norm``,
``time/step_seconds``), and curves are grouped by what stands before the slash.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ..checkpoints.workdir import read_metrics
from ..core.errors import UserError
from ..core.files import write_atomic
from ..core.progress import Progress
from .curves import draw_curves

SYNC_SECONDS = 5.0


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


class MetricLog:
    """Metrics, pictures and curves of one run; does nothing on processes other than 0.

    Use as a context manager or call `close`.

    Args:
      workdir: the run's directory; made if missing.
      resume_step: the step that was restored: logged steps after it will come again and are dropped
        (as is a torn last line), here and in TensorBoard, so that each appears once. None for a
        fresh start, which drops all of them.
      progress: shows the losses of the lines that were deferred.

    Raises:
      UserError: when a file cannot be written.
    """

    def __init__(
        self, workdir: str | Path, *, resume_step: int | None, progress: Progress | None = None
    ):
        self.workdir = Path(workdir)
        self.path = self.workdir / "metrics.jsonl"
        self._active = jax.process_index() == 0
        self._progress = progress
        self._deferred: tuple[int, dict[str, Any]] | None = None
        if not self._active:
            return
        # Imported here, because tensorboardX imports torch where there is one.
        from .board import Board

        kept = -1 if resume_step is None else resume_step
        try:
            (self.workdir / "samples").mkdir(parents=True, exist_ok=True)
            records = [record for record in read_metrics(self.path) if record["step"] <= kept]
            write_atomic(self.path, b"".join(map(_line, records)))
            self._file = self.path.open("ab")
            # File names hold the time in whole seconds: a quick restart would overwrite the first.
            self._board = Board(
                self.workdir / "tensorboard", kept + 1, f".{os.getpid()}.{time.monotonic_ns()}"
            )
        except OSError as error:
            raise UserError(f"cannot write in workdir {self.workdir}: {error}") from error
        self._synced = time.monotonic()

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line for ``step``; a second call for the same step would be a second line.

        Values are Python, numpy or jax scalars (a jax scalar is waited for). JSON has no numbers
        that are not finite, so NaN and infinities become null: any parser reads the file, and null
        shows as a gap.
        The line is handed to the system at once, which is enough to outlive a killed process, and
        forced to disk every few seconds.

        Raises:
          UserError: when the file cannot be written, for example because the disk is full.
        """
        if not self._active:
            return
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        record = {"step": int(step)} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        try:
            self._file.write(_line(record))
            self._file.flush()
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._board.scalars(int(step), finite)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

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
        """Writes the deferred line, if there is one, and waits for its values if need be.

        Raises:
          UserError: when the file cannot be written.
        """
        if self._deferred is None:
            return
        (step, metrics), self._deferred = self._deferred, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.write(step, values)
        if self._progress is not None:
            shown = {name: value for name, value in values.items() if name.startswith("loss/")}
            self._progress.update(step, shown)

    def sync(self) -> None:
        """Forces the lines so far to disk, so that they outlive a failure of the machine."""
        self.flush()
        if self._active:
            try:
                os.fsync(self._file.fileno())
                self._board.flush()
            except OSError as error:
                raise UserError(f"cannot write in {self.workdir}: {error.strerror}") from error
            self._synced = time.monotonic()

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture as samples/STEP_NAME.png (step in 8 digits) and to TensorBoard.

        Args:
          step: the step it belongs to.
          name: slashes become dashes in the file name.
          pixels: [H, W, 3] or [H, W], uint8.

        Raises:
          ValueError: for another dtype or shape.
          UserError: when the file cannot be written.
        """
        if not self._active:
            return
        pixels = np.asarray(pixels)
        gray = pixels.ndim == 2
        if pixels.dtype != np.uint8 or not (gray or (pixels.ndim == 3 and pixels.shape[2] == 3)):
            raise ValueError(f"{name}: need uint8 [H, W, 3], got {pixels.dtype} {pixels.shape}")
        path = self.workdir / "samples" / f"{step:08d}_{name.replace('/', '-')}.png"
        try:
            Image.fromarray(pixels).save(path)
            self._board.image(int(step), name, pixels)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def curves(self) -> None:
        """Draws curves.png from metrics.jsonl: one panel per metric group."""
        self.flush()
        if self._active:
            draw_curves(self.path, self.workdir / "curves.png")

    def close(self) -> None:
        if not self._active:
            return
        try:
            self.sync()
        finally:  # what is deferred may belong to a device that failed
            self._file.close()
            self._board.close()
            self._active = False
