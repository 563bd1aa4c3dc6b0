"""A server's life: the socket, the programs, the port that opens, the signals that end it."""

import asyncio
import contextlib
import re
import secrets
import socket
import time
from collections.abc import Sequence
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ..core.errors import UserError
from ..core.files import read_text
from ..core.progress import Progress
from ..core.storage import as_path
from ..pipeline import SprintPipeline
from .app import BODY, Service
from .counters import Counters
from .engine import Engine
from .guard import is_loopback
from .requests import EXAMPLES, STYLES, Offer
from .worker import Worker

PATIENCE = 10.0  # seconds for the head of a request to come, and for an answer to be taken
DRAIN = 30.0  # seconds in which those who wait are answered when the server ends
SOCKETS = 4  # connections for each client that is allowed, before any of them is read
LINE = 256  # jobs that wait, at most; or two for each client that is allowed


class _Patient(asyncio.Protocol):
    """Ends a connection whose client does not take what is sent, within `PATIENCE` seconds."""

    _untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # to hear of every byte that must wait

    def pause_writing(self):
        super().pause_writing()
        if self._untaken is None:
            self._untaken = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self._taken()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._taken()

    def _taken(self):
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None


class HttpProtocol(_Patient, H11Protocol):
    """uvicorn's, with an end to the wait for a head, or a body that is answered already, and to connections."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > self.limit_concurrency:
            return transport.abort()
        self._wait()

    def data_received(self, data):
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._stop_waiting()

    def handle_websocket_upgrade(self, event):
        body = {b"content-length", b"transfer-encoding"} & {name for name, _ in self.headers}
        if event.method != b"GET" or body:
            return self.send_400_response("A WebSocket begins with GET and no body.")
        super().handle_websocket_upgrade(event)
        if not self.transport.get_protocol().handshake_initiated:
            self.transport.abort()  # the head is none to websockets, which would wait for a better one

    def _wait(self):
        """Starts the clock where nobody but the client can go on; each byte ends uvicorn's own."""
        state, cycle = self.conn.their_state, self.cycle
        answered = cycle is not None and cycle.response_complete
        theirs = state is h11.IDLE or (state is h11.SEND_BODY and answered)
        if not theirs or self.transport.is_closing():
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(PATIENCE, self.transport.abort)

    def _stop_waiting(self):
        if self._late is not None:
            self._late.cancel()
            self._late = None


class SocketProtocol(_Patient, WebSocketsSansIOProtocol):
    """uvicorn's, which ends when its client reads no more."""


class Server(uvicorn.Server):
    """uvicorn's server; a signal ends it when those who wait are answered, a second one at once."""

    def __init__(self, config: uvicorn.Config, service: Service, address: str):
        super().__init__(config)
        self._service, self._address = service, address
        self._signals, self._end = 0, 0.0

    def handle_exit(self, sig, frame):
        self._signals += 1

    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(f"open {self._address}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if self._signals and not self._end:
            self._end = now + DRAIN
            self._service.close()
            with contextlib.suppress(BrokenPipeError):  # whoever read the output may be gone
                print("ending: those who wait are answered", flush=True)
        if self._end and (not self._service.busy or now > self._end or self._signals > 1):
            return True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, which nobody can connect to yet.

    Raises:
      UserError: there is no such address here, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            bound = stack.enter_context(socket.socket(family))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            stack.pop_all()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}") from error
    return bound


def make_token(host: str, names: Sequence[str], file: str | None) -> str | None:
    """The token that clients must show: of a file, or a new one; None where only this machine can ask.

    Raises:
      UserError: the file cannot be read, or holds none.
    """
    if file is None:
        here = is_loopback(host) and all(map(is_loopback, names))
        return None if here else secrets.token_urlsafe(24)
    try:
        token = read_text(as_path(file), 1 << 20).strip()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"--token {file}: {reason}") from error
    if not re.fullmatch(r"[\w-]{16,200}", token, re.ASCII):
        raise UserError(f"--token {file} must hold 16 to 200 letters, digits, - and _, and no more")
    return token


def run(
    pipe: SprintPipeline,
    bound: socket.socket,
    *,
    conditions: Any = None,
    sizes: Sequence[tuple[int, int]] = (),
    steps: Sequence[int] = (),
    batch: int = 8,
    clients: int = 64,
    names: Sequence[str] = (),
    token: str | None = None,
) -> None:
    """Compiles everything, opens the port, and serves until a signal.

    Args:
      bound: of `bind`.
      conditions: finds the lines of photos for a control branch, see `Engine`.
      sizes: (height, width) in pixels that may be asked for, the usual one first; default that of training.
      steps: likewise; default 1 to 4 of a student, 20 of a teacher.
      batch: pictures in one call, a power of two.
      clients: pages that may be connected at once.
      names: of this host, besides addresses and localhost.
      token: that clients must show.

    Raises:
      UserError: the pipeline has no such size or number of steps.
    """
    engine, counters = Engine(pipe, batch, conditions), Counters()
    usual = pipe.check_steps()
    steps = tuple(steps) or (usual, *(each for each in (1, 2, 3, 4) if pipe.is_student))
    offer = Offer(
        sizes=tuple(dict.fromkeys(sizes)) or (tuple(pipe.size),),
        steps=tuple(dict.fromkeys(steps)),
        guidance=pipe.guidance,
        styles=tuple(name for name, style in STYLES.items() if engine.knows(style.format(""))),
        prompt=next((text for text in EXAMPLES if engine.knows(text)), ""),
        control=engine.controlled,
        photos=engine.controlled and conditions is not None,
        brush=max(13 / 1024, 1.6 / min(pipe.size)),  # of published branches, and of digits
    )
    programs, begin = engine.programs(offer.sizes, offer.steps), time.monotonic()
    with Progress(len(programs), unit="program", interval=5.0) as progress:
        for done in engine.compile(programs):
            progress.update(done)
    print(f"{len(programs)} programs ready in {time.monotonic() - begin:.0f} s", flush=True)
    worker = Worker(engine.draw, batch, longest_line(clients), counters)
    service = Service(offer, worker, counters, clients)
    make_server(service, bound, names, token).run([bound])
    worker.stop()


def longest_line(clients: int) -> int:
    """Jobs that wait, at most: one of each page, and as many or more of the images API."""
    return max(LINE, 2 * clients)


def make_server(
    service: Service, bound: socket.socket, names: Sequence[str] = (), token: str | None = None
) -> Server:
    """A server whose ``run([bound])`` opens the port; arguments as of `run`."""
    host, port = bound.getsockname()[:2]
    config = uvicorn.Config(
        service.app(names, token),
        loop="asyncio",
        http=HttpProtocol,
        ws=SocketProtocol,
        ws_max_size=BODY,
        ws_per_message_deflate=False,
        lifespan="off",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=SOCKETS * service.clients,
        timeout_graceful_shutdown=5,
    )
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}/" + (f"#token={token}" if token else "")
    return Server(config, service, address)
