"""What a run tells: metrics.jsonl, TensorBoard, sample pictures, curves and a progress line.

metrics.jsonl is the record: one JSON object per logged step, key ``step`` first. The rest is made
from it or beside it. Metric names are ``group/name`` (``loss/scm``, ``grad/norm``,
``time/step_seconds``), and curves are grouped by what stands before the slash.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..core.errors import UserError
from ..core.files import write_atomic
from .board import Board

SYNC_SECONDS = 5.0


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl in file order; torn lines are left out."""
    path = Path(path)
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # Also bytes that are not UTF-8: a crash may leave a block of zeros.
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


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
        self, workdir: str | Path, *, resume_step: int | None, progress: "Progress | None" = None
    ):
        self.workdir = Path(workdir)
        self.path = self.workdir / "metrics.jsonl"
        self._active = jax.process_index() == 0
        self._progress = progress
        self._deferred: tuple[int, dict[str, Any]] | None = None
        if not self._active:
            return
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


def _panel(axes, group: str, series: dict[str, tuple[list[int], list[float]]]) -> None:
    """Draws the metrics of one group; a moving average over the noise of long series."""
    everything = np.concatenate([values for _, values in series.values()])
    finite = everything[np.isfinite(everything)]
    if finite.size and finite.min() > 0 and finite.max() > 50 * finite.min():
        axes.set_yscale("log")
    for index, (name, (steps, values)) in enumerate(sorted(series.items())):
        color = f"C{index % 10}"
        dash = ("-", "--", ":", "-.")[index // 10 % 4]
        label = name.removeprefix(f"{group}/")
        window = len(values) // 50
        if window < 2:
            axes.plot(steps, values, color=color, linestyle=dash, label=label, marker=".", ms=3)
            continue
        axes.plot(steps, values, color=color, linestyle=dash, alpha=0.25, linewidth=0.8)
        # Means over whole windows; a window with nothing finite stays a gap.
        rows = len(values) // window
        block = np.asarray(values[: rows * window]).reshape(rows, window)
        known = np.isfinite(block).sum(1)
        mean = np.where(known > 0, np.nansum(block, 1) / np.maximum(known, 1), np.nan)
        centers = np.asarray(steps[: rows * window]).reshape(rows, window).mean(1)
        axes.plot(centers, mean, color=color, linestyle=dash, label=label)
    axes.set_title(group)
    axes.set_xlabel("step (generator updates)")
    axes.set_ylabel(group)
    axes.grid(alpha=0.3)
    # Beside the panel: a dozen names would hide the lines.
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def draw_curves(metrics_path: str | Path, out_path: str | Path) -> bool:
    """Draws all metrics of a metrics.jsonl over steps into a PNG, one panel per group.

    Nulls (NaN) are gaps; a group whose values are positive and span more than a factor of 50 gets a
    logarithmic axis.

    Returns:
      Whether there was anything to draw.
    """
    # Imported here because it takes a second that a short command need not pay. Figure without
    # pyplot has no global state and renders with Agg.
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in read_metrics(metrics_path):
        for name, value in record.items():
            if name == "step" or not (value is None or isinstance(value, int | float)):
                continue
            group = name.split("/")[0] if "/" in name else "other"
            steps, values = groups.setdefault(group, {}).setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(math.nan if value is None else float(value))
    if not groups:
        return False
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(7.5 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (group, series) in zip(panels, sorted(groups.items()), strict=False):
        _panel(axes, group, series)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    out_path = Path(out_path)
    temporary = out_path.with_name(f".{out_path.name}")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(out_path)
    except OSError as error:
        raise UserError(f"cannot write {out_path}: {error.strerror}") from error
    return True


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
    """Progress over steps: a tqdm bar on a terminal, else a plain line every ``interval`` seconds.

    Plain lines look like ``step 1200/20000  loss/scm 0.93  3.1 steps/s  ETA 1:41:03``, with another
    ``unit`` in the step's place where that is what is counted. The rate
    leaves out the first update, which compiles. Silent on processes other than 0.

    Args:
      total: step at which the run ends.
      start: step it starts from (the restored one).
      interval: seconds between plain lines.
      stream: where it goes; default stderr.
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
        self._total, self._interval, self._clock = total, interval, clock
        self._unit = unit
        self._origin: tuple[int, float] | None = None
        self._printed = -math.inf
        self._bar = None
        if self._active and self._stream.isatty():
            self._bar = tqdm(total=total, initial=start, file=self._stream, unit=unit)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Says that ``step`` updates are done; ``metrics`` are the few numbers to show.

        Cheap enough for every step as long as metrics are numbers, not arrays still on a device.
        """
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
        words = [
            f"{self._unit} {step}/{self._total}",
            *(f"{name} {text}" for name, text in shown.items()),
        ]
        first_step, first_time = self._origin
        if step > first_step and now > first_time:
            rate = (step - first_step) / (now - first_time)
            words += [
                f"{rate:.3g} {self._unit}s/s",
                f"ETA {_duration((self._total - step) / rate)}",
            ]
        print("  ".join(words), file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
