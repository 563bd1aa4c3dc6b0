"""Servers of the page and the images API in this process, with a model that is a function of few words."""

import contextlib
import dataclasses
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

from sprint_jax.core.errors import UserError
from sprint_jax.serving import frames, server
from sprint_jax.serving.app import Service
from sprint_jax.serving.counters import Counters
from sprint_jax.serving.engine import Drawn, Job
from sprint_jax.serving.requests import Offer
from sprint_jax.serving.worker import Worker

OFFER = Offer(((8, 8), (8, 16)), (2, 1, 4), 3.0, ("none", "on blue"), "a red 3 on blue")
SKETCHES = dataclasses.replace(
    OFFER, control=True, photos=True, brush=0.05, sizes=((64, 64), (64, 128))
)


def picture(job: Job) -> np.ndarray:
    """What `draw` makes of a job: its sketch, its photo turned dark to bright, or pixels of its own."""
    if job.control is not None:
        return job.control if job.control_kind == "sketch" else 255 - job.control
    digest = hashlib.sha256(repr(job).encode()).digest()
    pixels = np.resize(np.frombuffer(digest, np.uint8), (*job.size, 3))
    return np.ascontiguousarray(pixels)


def draw(jobs: Sequence[Job]) -> list[Drawn | UserError]:
    """A model in place of `Engine.draw`: knows all words but one."""
    assert len({job.program for job in jobs}) == 1
    return [
        UserError("word 'gray' is unknown")
        if "gray" in job.prompt
        else Drawn(picture(job), {"text": 1.0, "denoise": 2.0, "decode": 0.5})
        for job in jobs
    ]


class Held:
    """A model that waits in each call until it is let go; ``batches`` are the jobs of its calls."""

    def __init__(self):
        self.batches: list[list[Job]] = []
        self.go = threading.Semaphore(0)

    def __call__(self, jobs: Sequence[Job]) -> list[Drawn | UserError]:
        self.batches.append(list(jobs))
        assert self.go.acquire(timeout=30)
        return draw(jobs)


class Running:
    """A server that runs; ``address`` is HOST:PORT."""

    def __init__(self, server: server.Server, service: Service, counters: Counters, address: str):
        self.server, self.service, self.counters, self.address = server, service, counters, address

    def socket(self, **how: Any) -> ClientConnection:
        """A page's connection."""
        return connect(f"ws://{self.address}/draw", compression=None, proxy=None, **how)


@contextlib.contextmanager
def running(
    model=draw,
    *,
    most: int = 4,
    clients: int = 16,
    token: str | None = None,
    offer: Offer = OFFER,
    port: int = 0,
) -> Iterator[Running]:
    """Runs a server on the loopback; it must end in the end."""
    counters = Counters()
    worker = Worker(model, most, server.longest_line(clients), counters)
    service = Service(offer, worker, counters, clients)
    bound = server.bind("127.0.0.1", port)
    made = server.make_server(service, bound, ["Draw.Example"], token)
    thread = threading.Thread(target=made.run, args=[[bound]])
    address = "{}:{}".format(*bound.getsockname())
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not made.started:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.005)
        yield Running(made, service, counters, address)
    finally:
        made.handle_exit(15, None)
        thread.join(30)
        worker.stop()
        assert not thread.is_alive()


@contextlib.contextmanager
def process(port: int) -> Iterator[subprocess.Popen]:
    """The same server in a process of its own, which is killed in the end."""
    with subprocess.Popen([sys.executable, __file__, str(port)], stdout=subprocess.PIPE) as made:
        try:
            assert made.stdout.readline()
            yield made
        finally:
            made.kill()


def send(connection: ClientConnection, number: int, **values: Any) -> None:
    """Sends a request as a page does."""
    connection.send(frames.pack({"id": number, "prompt": "a 3", **values}))


def receive(connection: ClientConnection, timeout: float = 20) -> tuple[dict, bytes]:
    """The next frame: its header and bytes."""
    return frames.unpack(connection.recv(timeout))


def exchange(
    address: str, request: bytes, timeout: float = 20
) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes to a server; the status, headers and body of its answer, up to the end of the connection."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout) as client:
        client.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(65536):
                answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]) if first else 0, headers, body


def get(address: str, path: str, *more: str, host: str | None = None) -> tuple[int, dict, bytes]:
    """GET of a path, with more lines of headers."""
    lines = [f"GET {path} HTTP/1.1", f"Host: {host or address}", "Connection: close", *more]
    return exchange(address, "\r\n".join([*lines, "", ""]).encode())


def post(address: str, values: Any, *more: str) -> tuple[int, dict, bytes]:
    """POST of an images request, JSON or bytes, with more lines of headers."""
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    lines = ["POST /v1/images HTTP/1.1", f"Host: {address}", "Connection: close"]
    lines += [f"Content-Length: {len(body)}", *more]
    return exchange(address, "\r\n".join([*lines, "", ""]).encode() + body)


if __name__ == "__main__":
    with running(port=int(sys.argv[1])) as one:
        print(one.address, flush=True)
        threading.Event().wait()
