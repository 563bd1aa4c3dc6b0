"""The door: who may ask, how often and how much. Wraps the application."""

import collections
import hmac
import ipaddress
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response

from .counters import Counters
from .requests import Refused

# Requests of one address in a second, and at once. A page sends its pictures' requests over one connection.
RATE, BURST = 50.0, 128.0
ADDRESSES = 4096  # whose rate is remembered, the last ones
TOKEN = (
    "token."  # before a token among a WebSocket's subprotocols, since browsers send no other header
)
PROTOCOL = "sprint"
# What anybody may see: nothing of it depends on who asks.
PUBLIC = ("/", "/api", "/health", "/favicon.ico")
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Bucket:
    """So many at once, and so many in each second after that.

    Args:
      clock: seconds, monotonic.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._at = burst, clock()

    def take(self) -> bool:
        """Whether one more is within the limits."""
        now = self._clock()
        self._left = min(self._burst, self._left + self._rate * (now - self._at))
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def split_host(text: str) -> str:
    """The name in a Host header or an Origin's authority, without the port, in lower case."""
    name, _, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    return (name if name and port.isdecimal() else text).strip("[]").lower()


def is_loopback(host: str) -> bool:
    """Whether this name or address leads to this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """An ASGI application that lets in what is allowed, and answers everything else itself.

    Host must be an address, localhost or one of ``names``: a page of another name whose DNS leads here is none
    of ours. Origin, where a browser sends one, must be the host. Beyond the loopback a token is needed.

    Args:
      app: what is behind the door.
      names: of hosts, besides addresses and localhost.
      token: what clients must show, or None.
      counters: of refusals.
    """

    def __init__(self, app: Any, names: Iterable[str], token: str | None, counters: Counters):
        self._app, self._token, self._counters = app, token, counters
        self._names = {"localhost", *(name.lower() for name in names)}
        self._buckets: collections.OrderedDict[str, Bucket] = collections.OrderedDict()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        try:
            self.check(HTTPConnection(scope))
        except Refused as refused:
            self._counters.refused[refused.code] += 1
            return await _refuse(refused, scope, receive, send)

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *extra]}
            await send(message)

        await self._app(scope, receive, send_guarded)

    def check(self, asked: HTTPConnection) -> None:
        """Refuses a request or a handshake for its host, origin, rate or token."""
        hosts = asked.headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(split_host(hosts[0])):
            raise Refused("host", "this server is not known by that name (--name adds one)", 421)
        for origin in asked.headers.getlist("origin"):
            scheme, _, authority = origin.lower().partition("://")
            if scheme not in ("http", "https") or authority != hosts[0].lower():
                raise Refused("origin", "this page is of another origin", 403)
        address = asked.client.host if asked.client else ""
        if not self._bucket(address).take():
            raise Refused("rate", "too many requests from this address", 429)
        if self._token and asked.scope["path"] not in PUBLIC and not self._has_token(asked):
            raise Refused("token", "a token is needed: it stands in the server's log", 401)

    def _is_ours(self, name: str) -> bool:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True

    def _bucket(self, address: str) -> Bucket:
        bucket = self._buckets.setdefault(address, Bucket(RATE, BURST))
        self._buckets.move_to_end(address)
        while len(self._buckets) > ADDRESSES:
            self._buckets.popitem(last=False)
        return bucket

    def _has_token(self, asked: HTTPConnection) -> bool:
        shown = asked.headers.get("authorization", "").removeprefix("Bearer ")
        for protocol in asked.scope.get("subprotocols", ()):
            if protocol.startswith(TOKEN):
                shown = protocol.removeprefix(TOKEN)
        # websockets keeps bytes that are not ASCII as halves of characters, which plain UTF-8 refuses.
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self._token.encode())


def refusal(refused: Refused) -> Response:
    """The HTTP answer to what is refused, in the form of the images API; the connection ends with it."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    error = {"message": str(refused), "type": kind, "param": None, "code": refused.code}
    headers = {**HEADERS, "connection": "close"}
    if refused.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["retry-after"] = "1"
    return JSONResponse({"error": error}, status_code=refused.status, headers=headers)


async def _refuse(refused: Refused, scope, receive, send) -> None:
    response = refusal(refused)
    if scope["type"] == "http":
        return await response(scope, receive, send)
    await receive()  # the handshake, which is answered like a request
    headers = [pair for pair in response.raw_headers if pair[0] != b"connection"]
    await send(
        {
            "type": "websocket.http.response.start",
            "status": response.status_code,
            "headers": headers,
        }
    )
    await send({"type": "websocket.http.response.body", "body": response.body})
