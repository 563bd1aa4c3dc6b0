"""Batches made ahead of their use, by a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

ON_DEVICE = 2  # batches beside those that wait


def prefetch(
    batches: Callable[[int], Any],
    start: int,
    depth: int = 2,
    place: Callable[[Any], Any] = lambda batch: batch,
) -> Iterator[tuple[int, Any]]:
    """Yields ``(i, place(batches(i)))`` for i = start, start + 1, ... with a thread that works ahead.

    The thread starts with the first ``next`` and ends when the iterator is closed or no longer used. An error
    in ``batches`` or ``place`` is raised here, after the batches before it.

    Args:
      batches: a function of the batch number that may be called from a thread.
      depth: how many placed batches may wait, at least 1, while one more may be ready on the host; with the
        one in use and the one before it, `ON_DEVICE` more are on the devices.
      place: puts a batch where it is used, on devices for example, from the same thread.
    """
    waiting: queue.Queue = queue.Queue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        i = start
        try:
            while True:
                batch = batches(i)
                room.acquire()
                if stop.is_set():
                    return
                waiting.put((i, place(batch), None))
                i += 1
        except BaseException as error:  # whatever it is, it belongs to the consumer
            waiting.put((i, None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            i, batch, error = waiting.get()
            if error is not None:
                raise error
            room.release()
            yield i, batch
    finally:
        stop.set()
        room.release()  # the thread may be waiting for it
        thread.join()
