"""The routes of a server: the page and its WebSocket, the images API, health and metrics."""

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import hashlib
import importlib.resources
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from ..core.schema import TEXT, Kind, one_of, optional, whole
from .counters import Counters
from .engine import Drawn
from .frames import parse_json
from .guard import PROTOCOL, Guard, is_loopback, refusal
from .pictures import DECODERS, read_picture, to_png
from .requests import Offer, Refused, check_request
from .session import Session
from .worker import Worker

BODY = 2**23  # bytes of a request's body
BODY_TIME = 10.0  # seconds in which it comes
PICTURES = 8  # of one request
# Keys that clients of the images API send, and that choose nothing here.
UNUSED = dict.fromkeys(("model", "user", "quality", "background", "moderation"), optional(TEXT))


class Service:
    """The application and its state.

    Args:
      offer: what can be asked for.
      worker: draws it.
      clients: pages that may be connected at once.

    Attributes:
      clients: as given.
      closing: whether new requests are refused, since the server ends.
    """

    def __init__(self, offer: Offer, worker: Worker, counters: Counters, clients: int):
        self._offer, self._worker, self._counters = offer, worker, counters
        self.clients, self._sessions = clients, set()
        self._requests: collections.Counter[str] = collections.Counter()  # pictures, by address
        self._kinds: dict[str, Kind] = offer.kinds() | UNUSED
        self._kinds |= {"n": whole(1, PICTURES), "response_format": one_of("b64_json", "png")}
        self._kinds |= {"output_format": one_of("png")}
        if offer.control:
            self._kinds |= {"control": TEXT}
        self._decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, "pictures")
        self.closing = False

    def app(self, names: Sequence[str], token: str | None) -> Guard:
        """The ASGI application behind its guard; see `Guard`."""
        routes = [
            Route("/", self._html("page.html")),
            Route("/api", self._html("api.html")),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/offer", self._describe),
            WebSocketRoute("/draw", self._page),
        ]
        for path in ("/v1/images", "/v1/images/generations"):
            routes.append(Route(path, self._images, methods=["POST"]))
        handlers = {HTTPException: _http_error, Refused: self._refused, Exception: self._failed}
        app = Starlette(routes=routes, exception_handlers=handlers)
        return Guard(app, names, token, self._counters)

    @property
    def busy(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self._requests) or any(session.busy for session in self._sessions)

    @property
    def waiting(self) -> int:
        """Jobs in the line before the model."""
        return self._worker.waiting

    def close(self) -> None:
        """Refuses new requests from now on; those that wait are answered."""
        self.closing = True
        for session in self._sessions:
            session.closing = True

    def _html(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        text = (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")
        script, style = (_hashes(tag, text) for tag in ("script", "style"))
        policy = (
            "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
            f"form-action 'none'; frame-ancestors 'none'; script-src {script}; style-src {style}"
        )

        async def answer(request: Request) -> Response:
            return HTMLResponse(text, headers={"content-security-policy": policy})

        return answer

    async def _health(self, request: Request) -> Response:
        if self.closing:
            return JSONResponse({"status": "closing"}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        text = self._counters.text(len(self._sessions), self.waiting)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _describe(self, request: Request) -> Response:
        return JSONResponse(self._offer.describe())

    async def _page(self, socket: WebSocket) -> None:
        address = socket.client.host if socket.client else ""
        most = self.clients if is_loopback(address) else max(4, self.clients // 4)
        what = "the server is ending" if self.closing else ""
        if len(self._sessions) >= self.clients:
            what = what or "too many people are here"
        elif sum(each.address == address for each in self._sessions) >= most:
            what = what or "too many pages of this address are open"
        if what:
            return await socket.send_denial_response(refusal(Refused("busy", what, 503)))
        session = Session(
            socket, address, self._offer, self._worker, self._counters, self._decoders
        )
        self._sessions.add(session)
        try:
            await socket.accept(PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None)
            await session.run()
        finally:
            self._sessions.discard(session)

    async def _images(self, request: Request) -> Response:
        values = check_request(parse_json(await _body(request)), self._kinds)
        if self.closing:
            raise Refused("closing", "the server is ending", 503)
        given = {key: value for key, value in values.items() if key not in UNUSED}
        count, form = given.pop("n", 1), given.pop("response_format", None)
        given.pop("output_format", None)
        given.setdefault("seed", secrets.randbelow(2**32))
        if form is None:
            form = "png" if request.headers.get("accept") == "image/png" else "b64_json"
        if form == "png" and count > 1:
            raise Refused("value", "n must be 1 where the answer is one PNG")
        with self._places(request.client.host if request.client else "", count):
            files, jobs = await self._draw(request, given, count)
        if form == "png":
            return Response(files[0], media_type="image/png", headers={"x-seed": str(jobs[0].seed)})
        data = [
            {"b64_json": base64.b64encode(file).decode(), "seed": job.seed, "index": job.index}
            for file, job in zip(files, jobs, strict=True)
        ]
        return JSONResponse({"created": int(time.time()), "data": data})

    @contextlib.contextmanager
    def _places(self, address: str, count: int) -> Iterator[None]:
        """Holds places for the pictures of an API request; never those that pages need in the line."""
        most = self._worker.longest - self.clients
        own = most if is_loopback(address) else max(PICTURES, most // 4)
        if self._requests.total() + count > most or self._requests[address] + count > own:
            raise Refused("busy", "too many requests wait: try again in a moment", 503)
        self._requests[address] += count
        try:
            yield
        finally:
            self._requests[address] -= count
            self._requests = +self._requests  # without addresses that have none

    async def _draw(self, request: Request, given: dict, count: int) -> tuple[list[bytes], list]:
        """PNGs of an API request and their jobs."""
        control = given.pop("control", None)
        if control is not None:
            how = _control, control, self._offer.size(given)
            control = await asyncio.get_running_loop().run_in_executor(self._decoders, *how)
        jobs = [self._offer.job(given, index, control) for index in range(count)]
        begin = time.perf_counter()
        drawn = await _all(request, *map(self._worker.picture, jobs))
        files = [
            await run_in_threadpool(_png, each, job) for each, job in zip(drawn, jobs, strict=True)
        ]
        total = 1000 * (time.perf_counter() - begin)
        for each in drawn:
            self._counters.picture(each.ms | {"total": total})
        return files, jobs

    async def _refused(self, request: Request, refused: Exception) -> Response:
        self._counters.refused[refused.code] += 1
        return refusal(refused)

    async def _failed(self, request: Request, error: Exception) -> Response:
        return refusal(Refused("failed", "the server failed; its log says why", 500))


def _hashes(tag: str, text: str) -> str:
    """The sources of a content security policy for the inline scripts or styles of a page."""
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()) for part in parts)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests) or "'none'"


async def _http_error(request: Request, error: Exception) -> Response:
    codes = {404: "path", 405: "method"}
    return refusal(Refused(codes.get(error.status_code, "http"), error.detail, error.status_code))


async def _all(request: Request, *pictures: Awaitable[Drawn]) -> list[Drawn]:
    """All pictures, or the first refusal, of which one is that the client went away; then all are given up."""
    tasks = [asyncio.ensure_future(each) for each in (_gone(request), *pictures)]
    try:
        drawn = asyncio.gather(*tasks[1:])
        await asyncio.wait([tasks[0], drawn], return_when=asyncio.FIRST_COMPLETED)
        if not drawn.done():
            raise Refused("gone", "the client went away")
        return await drawn
    finally:
        for task in tasks:
            task.cancel()


async def _gone(request: Request) -> None:
    """Waits until the client of a request that is read goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _control(text: str, size: tuple[int, int]) -> np.ndarray:
    """The control image of a request: base64, or a data URL."""
    try:
        head = re.match(r"data:image/\w{1,20};base64,", text)
        data = base64.b64decode(text[head.end() :] if head else text, validate=True)
    except ValueError as error:
        raise Refused("image", "control is a picture in base64") from error
    return read_picture(data, *size)


def _png(drawn: Drawn, job: Any) -> bytes:
    notes = {"prompt": job.prompt, "seed": job.seed, "index": job.index}
    notes |= {"steps": job.steps, "guidance": job.guidance}
    notes |= {} if job.control is None else {"control_scale": job.control_scale}
    return to_png(drawn.pixels, notes)


async def _body(request: Request) -> bytes:
    """The body of a request; what is too long is read to its end, so that its sender reads the answer.

    Raises:
      Refused: it is too long, or does not come.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIME):
            async for part in request.stream():
                size += len(part)
                if size <= BODY:
                    parts.append(part)
                elif size > 8 * BODY:
                    break
    except TimeoutError as error:
        raise Refused("slow", f"no whole request in {BODY_TIME:g} seconds", 408) from error
    except ClientDisconnect as error:
        raise Refused("gone", "the client went away") from error
    if size > BODY:
        raise Refused("large", f"a request of more than {BODY} bytes", 413)
    return b"".join(parts)
