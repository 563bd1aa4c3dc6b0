"""Several processes as one run: their flags, and how they join; only with ``--distributed``."""

import argparse
import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import jax

from ..core.errors import UserError
from ..core.schema import check, number
from .peers import Peers

# The flags that place a process, and the variables that stand in for them.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PLACE = {"coordinator": COORDINATOR, "process_count": COUNT, "process_index": INDEX}
TIMEOUTS = ("join_timeout", "peer_timeout", "stall_timeout", "start_timeout")
# Variables by which a launcher says that it started several processes: a number, or names of hosts.
LAUNCHERS = (COUNT, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
LAUNCHERS += ("MEGASCALE_NUM_SLICES", "TPU_WORKER_HOSTNAMES")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a command that can run as several processes."""
    group = parser.add_argument_group("several processes")
    alone = "this process is one of several; without it none is ever waited for"
    group.add_argument("--distributed", action="store_true", help=alone)
    asked = "without it JAX asks SLURM, Open MPI or the TPU"
    for name, kind, default, metavar, text in (
        ("coordinator", str, None, "HOST:PORT", f"of process 0 (or {COORDINATOR}); {asked}"),
        ("process_count", int, None, "N", f"processes in all (or {COUNT})"),
        ("process_index", int, None, "I", f"this process, from 0 (or {INDEX})"),
        ("join_timeout", float, 300.0, "SECONDS", "how long to wait until all have joined"),
        ("peer_timeout", float, 30.0, "SECONDS", "a process that is silent for so long is gone"),
        ("stall_timeout", float, 1800.0, "SECONDS", "a run without a step for so long is stuck"),
        ("start_timeout", float, 7200.0, "SECONDS", "the same for each phase of its start"),
    ):
        group.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)


def find_place(flags: argparse.Namespace, environment: Mapping[str, str]) -> tuple | None:
    """Finds the place that flags and environment give this process.

    Returns:
      (``host:port`` of process 0, number of processes, number of this one); Nones where JAX finds out
      (SLURM, Open MPI, TPU, Kubernetes); or None for a run of one process.

    Raises:
      UserError: with exit code 2, for several tasks without ``--distributed``, flags that need it,
        half an address, or numbers that are out of range.
    """
    check(vars(flags), dict.fromkeys(TIMEOUTS, number(above=0)), "--", exit_code=2)
    given = {name: getattr(flags, name) for name in PLACE if getattr(flags, name) is not None}
    if not flags.distributed:
        for name in given:
            raise UserError(f"--{name} needs --distributed", exit_code=2)
        for name in LAUNCHERS:
            value = environment.get(name, "")
            if "," in value or (value.isdigit() and int(value) > 1):
                raise UserError(
                    f"{name}={value} says that several processes were started, but --distributed is not "
                    "given: each would be a run of its own in the same folder; add it, or start one process",
                    exit_code=2,
                )
        return None
    values = {name: given.get(name, environment.get(PLACE[name])) for name in PLACE}
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if len(missing) == len(PLACE):
        return None, None, None
    if missing:
        raise UserError(f"--distributed lacks {', '.join(missing)}", exit_code=2)
    address, count, index = map(str, values.values())
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise UserError(f"coordinator address {address!r} must be HOST:PORT", exit_code=2)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"process_index={index} is not one of process_count={count}", exit_code=2)
    return address, int(count), int(index)


@contextlib.contextmanager
def joined(flags: argparse.Namespace) -> Iterator[Peers | None]:
    """Joins the other processes around the work of a command, and watches them; yields None if alone.

    Raises:
      UserError: see `find_place`; or JAX cannot start, for instance since the port is taken.
    """
    place = find_place(flags, os.environ)
    if place is None:
        yield None
        return
    # The client has no public name; Orbax takes it from there as well.
    state = jax._src.distributed.global_state
    _initialize(state, place, flags)
    timeouts = flags.peer_timeout, flags.stall_timeout, flags.start_timeout
    peers = Peers(state.client, state.process_id, state.num_processes, *timeouts)
    peers.watch()
    try:
        yield peers
    except SystemExit:  # A stop that all processes agreed on.
        peers.finish()
        raise
    except BaseException as error:
        peers.fail(error)
        raise
    peers.finish()


def _initialize(state, place: tuple, flags: argparse.Namespace) -> None:
    # JAX's own answer to SIGTERM; ours is `interrupt.Stop`.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX aborts a process that waits, or whose peers are silent, for longer than it is told here. The
    # thread and `Peers` end it before, with one line.
    here = threading.Event()
    waiting = state, here, flags.join_timeout
    threading.Thread(target=_limit_wait, args=waiting, daemon=True).start()
    try:
        jax.distributed.initialize(
            *place,
            cluster_detection_method="deactivate" if place[0] else None,
            initialization_timeout=max(1, int(flags.join_timeout)),
            heartbeat_timeout_seconds=int(2 * flags.peer_timeout) + 20,
        )
    except (ValueError, RuntimeError) as error:
        needs = "" if place[0] else f"; JAX found no cluster to ask, give --{', --'.join(PLACE)}"
        raise UserError(f"--distributed: {error}{needs}", exit_code=1 if place[0] else 2) from error
    finally:
        here.set()


def _limit_wait(state, here: threading.Event, timeout: float) -> None:
    """Ends a process that waits too long. JAX does not tell who is missing; asking for process 0 is ours."""
    deadline, who = time.monotonic() + timeout, "process 0 is missing: nothing answers"
    while not here.wait(1.0):
        host, _, port = (state.coordinator_address or "unknown:0").rpartition(":")
        if "missing" in who:
            with contextlib.suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
                who = "process 0 came, so another one did not"
        if time.monotonic() > deadline:
            me = f"process {state.process_id} waited {timeout:g} s (--join_timeout) for all to join"
            print(f"error: {me} at {host}:{port}; {who}", file=sys.stderr, flush=True)
            os._exit(1)
