"""The thread that runs the model, and the line of jobs before it."""

import asyncio
import collections
import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from ..core.errors import UserError
from .counters import Counters
from .engine import Drawn, Job
from .requests import Refused


class Ticket:
    """A job in the line, and the future of its picture."""

    def __init__(self, job: Job):
        self.job, self.since = job, time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self.picture: asyncio.Future[Drawn] = self._loop.create_future()

    def answer(self, answer: Drawn | Exception) -> None:
        """Settles the future, from another thread; one that was given up stays so."""
        with contextlib.suppress(
            RuntimeError
        ):  # the loop is closed: a second signal ended the server
            self._loop.call_soon_threadsafe(self._settle, answer)

    def _settle(self, answer: Drawn | Exception) -> None:
        if self.picture.done():
            return
        if isinstance(answer, Exception):
            self.picture.set_exception(answer)
        else:
            self.picture.set_result(answer)


class Worker:
    """Draws jobs in the order of their coming; those of one program that wait together are one call.

    Whoever has at most one job in the line (`session.Session` sees to that) is served once before anybody is
    served twice.

    Args:
      draw: of `Engine`.
      most: jobs of one call.
      longest: jobs in the line, at most.
      counters: are told of every call.

    Attributes:
      longest: as given.
    """

    def __init__(
        self,
        draw: Callable[[Sequence[Job]], list[Drawn | UserError]],
        most: int,
        longest: int,
        counters: Counters,
    ):
        self._draw, self._most, self.longest, self._counters = draw, most, longest, counters
        self._line: collections.deque[Ticket] = collections.deque()
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the line."""
        return len(self._line)

    async def picture(self, job: Job) -> Drawn:
        """The picture of a job; ``ms`` has the time in the line, too, as ``queue``.

        Whoever is cancelled leaves the line.

        Raises:
          Refused: the line is full, or the prompt cannot be drawn.
        """
        with self._changed:
            if len(self._line) >= self.longest:
                raise Refused("busy", "too many requests wait: try again in a moment", 503)
            ticket = Ticket(job)
            self._line.append(ticket)
            self._changed.notify()
        try:
            return await ticket.picture
        except UserError as error:
            raise Refused("prompt", str(error)) from error
        except asyncio.CancelledError:
            with self._changed:
                if ticket in self._line:
                    self._line.remove(ticket)
            raise

    def stop(self) -> None:
        """Ends the thread after the call that it is in."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._over)
                if self._over:
                    return
                batch = self._take()
            if batch:
                self._serve(batch)

    def _take(self) -> list[Ticket]:
        """The first in the line and the next of its program; whoever gave up is left out."""
        waiting = [ticket for ticket in self._line if not ticket.picture.done()]
        same = [each for each in waiting if each.job.program == waiting[0].job.program]
        batch = same[: self._most]
        self._line = collections.deque(each for each in waiting if each not in batch)
        return batch

    def _serve(self, batch: list[Ticket]) -> None:
        begin = time.perf_counter()
        try:
            answers = self._draw([ticket.job for ticket in batch])
        except Exception:  # a fault of the model must not end the server
            traceback.print_exc(file=sys.stderr)
            if len(batch) > 1:  # nor hurt those who happened to wait beside its cause
                for ticket in batch:
                    self._serve([ticket])
                return
            self._counters.failures += 1
            answers = [Refused("failed", "the model failed; the server's log says why", 500)]
        self._counters.batch(len(batch))
        for ticket, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Drawn):
                queue = 1000 * (begin - ticket.since)
                answer = Drawn(answer.pixels, {"queue": queue} | answer.ms)
            ticket.answer(answer)
