"""TensorBoard files, written at once.

tensorboardX's `SummaryWriter` writes from a thread of its own. A full disk ends that thread without a word;
then its queue fills, and the training waits for ever.
"""

import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class Board:
    """One event file in a folder, which is made if missing; raises OSError when it cannot be written.

    Args:
      purge_step: TensorBoard hides events of earlier files from this step on: they come again.
      suffix: of the file's name.
    """

    def __init__(self, folder: Path, purge_step: int, suffix: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), filename_suffix=suffix)
        self._write(Event(step=purge_step, file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes the numbers of one step, by name."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture [H, W, 3] or [H, W], uint8."""
        layout = "HW" if pixels.ndim == 2 else "HWC"
        self._write(Event(step=step, summary=summary.image(name, pixels, dataformats=layout)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def flush(self) -> None:
        """Hands over to the system what was written."""
        self._events.flush()

    def close(self) -> None:
        self._events.close()
