"""One page that is connected: one request in flight, the newest one waiting."""

import asyncio
import concurrent.futures
import time
from collections.abc import Awaitable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..core.schema import Kind
from . import frames
from .counters import Counters
from .engine import Drawn, Job
from .guard import Bucket
from .pictures import SMALL, read_picture, to_page
from .requests import IDS, Offer, Refused, check_request
from .worker import Worker

RATE, BURST = 60.0, 120.0  # frames of a connection in a second, and at once
FAULTS = 100  # refused frames, after which a connection is closed
BEAT = 10.0  # seconds after which a page is told that its picture is still to come
IDLE = 900.0  # seconds without a frame; a page connects again when it has one


class Session:
    """A connection and its requests.

    The newest request waits until the answer to the one before it is sent, so that a client has at most one
    job in the worker's line, and one that does not read costs nothing.

    Args:
      address: of the client.
      decoders: threads that read pictures of clients, few, so that these take neither all memory nor the
        threads that others need.

    Attributes:
      address: as given.
      busy: whether a request waits or is being answered.
    """

    def __init__(
        self,
        socket: WebSocket,
        address: str,
        offer: Offer,
        worker: Worker,
        counters: Counters,
        decoders: concurrent.futures.Executor,
    ):
        self._socket, self._offer, self._worker, self._counters = socket, offer, worker, counters
        self.address, self._decoders = address, decoders
        self._kinds: dict[str, Kind] = {"id": IDS} | offer.kinds()
        self._newest: tuple[int, Job] | None = None
        self._came = asyncio.Event()
        self._answering = False
        self.closing = False

    @property
    def busy(self) -> bool:
        return self._answering or self._newest is not None

    async def run(self) -> None:
        """Serves the connection until it ends, whoever ends it."""
        tasks = [asyncio.create_task(each) for each in (self._read(), self._answer())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            self._newest = None
        for error in ended:
            if isinstance(error, Exception) and not isinstance(error, WebSocketDisconnect):
                raise error

    async def _read(self) -> None:
        bucket, faults = Bucket(RATE, BURST), 0
        while True:
            try:
                async with asyncio.timeout(IDLE):
                    message = await self._socket.receive()
            except TimeoutError:
                return await self._socket.close(1000, "idle")
            if message["type"] == "websocket.disconnect":
                return
            header: Any = None
            try:
                if not bucket.take():
                    raise Refused("rate", f"more than {RATE:g} requests in a second")
                if message.get("bytes") is None:
                    raise Refused("frame", "a frame of text: ours are binary")
                header, body = frames.unpack(message["bytes"])
                await self._take(header, body)
            except Refused as refused:
                await self._refuse(header, refused)
                faults += 1
                if faults >= FAULTS:
                    return await self._socket.close(1008, "too many refused requests")

    async def _take(self, header: Any, body: bytes) -> None:
        values = check_request(header, self._kinds)
        if "id" not in values:
            raise Refused("value", "id is missing: a whole number")
        control = None
        if body:
            if not self._offer.control:
                raise Refused("image", "this server takes no control image")
            size = self._offer.size(values)
            how = read_picture, body, *size
            control = await asyncio.get_running_loop().run_in_executor(self._decoders, *how)
        if self.closing:
            raise Refused("closing", "the server is ending", 503)
        job = self._offer.job(values, control=control)
        before, self._newest = self._newest, (values["id"], job)
        self._came.set()
        if before is not None:
            self._counters.dropped += 1
            await self._send({"id": before[0], "dropped": True})

    async def _answer(self) -> None:
        while True:
            await self._came.wait()
            self._came.clear()
            number, job = self._newest
            self._newest, self._answering = None, True
            try:
                await self._draw(number, job)
            finally:
                self._answering = False

    async def _draw(self, number: int, job: Job) -> None:
        try:
            begin = time.perf_counter()
            drawn = await self._patiently(number, self._worker.picture(job))
            kind, body = await encode(drawn)
        except Refused as refused:
            return await self._refuse({"id": number}, refused)
        ms = drawn.ms | {"total": 1000 * (time.perf_counter() - begin)}
        ms = {phase: round(value, 2) for phase, value in ms.items()}
        await self._send({"id": number, "picture": kind, "seed": job.seed, "ms": ms}, body)
        self._counters.picture(ms)

    async def _patiently(self, number: int, picture: Awaitable[Drawn]) -> Drawn:
        """The picture; until it is there, the page hears now and then that the connection lives."""
        task = asyncio.ensure_future(picture)
        try:
            while not (await asyncio.wait([task], timeout=BEAT))[0]:
                await self._send({"id": number, "waiting": True})
            return await task
        finally:
            task.cancel()

    async def _refuse(self, header: Any, refused: Refused) -> None:
        self._counters.refused[refused.code] += 1
        number = header.get("id") if isinstance(header, dict) else None
        number = number if IDS.holds(number) else None
        await self._send({"id": number, "error": {"code": refused.code, "message": str(refused)}})

    async def _send(self, header: dict[str, Any], body: bytes = b"") -> None:
        await self._socket.send_bytes(frames.pack(header, body))


async def encode(drawn: Drawn) -> tuple[str, bytes]:
    """Media type and bytes of a picture for a page; a large one is not encoded on the event loop."""
    if drawn.pixels.size // 3 <= SMALL:
        return to_page(drawn.pixels)
    return await run_in_threadpool(to_page, drawn.pixels)
