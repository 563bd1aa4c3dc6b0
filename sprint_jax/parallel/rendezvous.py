"""A roll call over TCP before JAX connects the processes of a run.

JAX's own client ends a process by ``abort()`` when not all have come in time, and does not say who is
missing. So process 0 first listens at the coordinator's port, the others report there, and all of
them get the same answer: the hosts by process number, or one line that says what is wrong.
"""

import json
import socket
import time
from collections.abc import Iterator

from ..core.errors import UserError

REPORT_SECONDS = 5.0  # how long a connection may take to say who it is
GRACE_SECONDS = 15.0  # how much longer the others wait for the answer than process 0 for them


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of ``host:port``; UserError (usage) for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator address {address!r} must be HOST:PORT", exit_code=2)
    return host.strip("[]"), int(port)


def roll_call(address: str, count: int, index: int, timeout: float) -> list[str]:
    """Waits until all ``count`` processes have reported; every one of them calls it.

    Args:
      address: ``host:port`` of process 0; the port is free again when this returns.
      index: this process, 0 to ``count - 1``.
      timeout: seconds to wait for the last of them.

    Returns:
      Host names by process number.

    Raises:
      UserError: on every process that can be reached: who is missing after ``timeout`` seconds, which
        number was given twice, which count differs, or that process 0 cannot be reached.
    """
    host, port = split_address(address)
    if index == 0:
        return _lead(address, port, count, time.monotonic() + timeout, timeout)
    return _report(address, host, port, count, index, timeout)


def explain_roll(count: int, reports: dict[int, str], address: str, timeout: float) -> str:
    """The line for processes that did not come."""
    missing = [str(number) for number in range(count) if number not in reports]
    here = ", ".join(f"{number} on {host}" for number, host in sorted(reports.items()))
    return (
        f"{len(missing)} of {count} processes did not join at {address} within {timeout:g} s: "
        f"process {', '.join(missing)} missing (here: {here}); "
        "see their logs, or wait longer with --join_timeout"
    )


def _listen(port: int, address: str) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {address}: {error.strerror}; "
            "choose another port of this host"
        ) from error


def _read_line(connection: socket.socket) -> dict:
    with connection.makefile("r", encoding="utf-8") as lines:
        value = json.loads(lines.readline(65536))
    return value if isinstance(value, dict) else {}


def _arrivals(server: socket.socket, deadline: float) -> Iterator[tuple[socket.socket, dict]]:
    """Connections that said who they are, until the deadline."""
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return
        try:
            connection.settimeout(min(REPORT_SECONDS, max(left, 0.1)))
            yield connection, _read_line(connection)
        except (OSError, ValueError):  # a stranger at the port: a health check, a port scan
            connection.close()


def _lead(address: str, port: int, count: int, deadline: float, timeout: float) -> list[str]:
    reports = {0: socket.gethostname()}
    connections: list[socket.socket] = []
    error = ""
    with _listen(port, address) as server:
        arrivals = _arrivals(server, deadline)
        while len(reports) < count and not error:
            connection, report = next(arrivals, (None, {}))
            if connection is None:
                error = explain_roll(count, reports, address, timeout)
                break
            number, host = report.get("index"), str(report.get("host"))
            connections.append(connection)
            if report.get("count") != count:
                told = report.get("count")
                error = (
                    f"process {number} on {host} was told of {told} processes, process 0 of {count}"
                )
            elif number in reports:
                error = (
                    f"two processes call themselves {number}, on {reports[number]} and on {host}"
                )
            elif number not in range(count):
                error = f"process {number} on {host} is not one of {count} processes"
            else:
                reports[number] = host
    answer = {"error": error, "hosts": [reports.get(number, "") for number in range(count)]}
    for connection in connections:
        with connection:
            try:
                connection.sendall((json.dumps(answer) + "\n").encode())
            except OSError:
                continue  # It left meanwhile; JAX's connection, which comes next, will miss it.
    if error:
        raise UserError(error)
    return answer["hosts"]


def _report(
    address: str, host: str, port: int, count: int, index: int, timeout: float
) -> list[str]:
    deadline = time.monotonic() + timeout
    me = {"index": index, "count": count, "host": socket.gethostname()}
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 10.0)) as connection:
                connection.settimeout(left + GRACE_SECONDS)
                connection.sendall((json.dumps(me) + "\n").encode())
                answer = _read_line(connection)
        except (OSError, ValueError) as error:
            # Process 0 may start later, its name may not be known yet, or it is just ending.
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            time.sleep(min(0.3, max(left, 0)))
            continue
        if answer.get("error"):
            raise UserError(answer["error"])
        return answer["hosts"]
    raise UserError(
        f"process {index} of {count} could not join: process 0 is missing, "
        f"no answer at {address} within {timeout:g} s ({reason}); "
        "is it started, and is the port open? --join_timeout waits longer"
    )
