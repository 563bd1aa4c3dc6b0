"""How several processes become one run; nothing here happens without ``--distributed``."""

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping

import jax

from ..core.errors import UserError
from .peers import ROOT, Peers, Place, catch_abort
from .rendezvous import roll_call, split_address


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a command that can run as several processes."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="this process is one of several; without it none is ever waited for",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0 (or JAX_COORDINATOR_ADDRESS); without it JAX asks SLURM, Open MPI or the TPU",
    )
    group.add_argument(
        "--process_count", type=int, metavar="N", help="processes in all (or JAX_NUM_PROCESSES)"
    )
    group.add_argument(
        "--process_index", type=int, metavar="I", help="this process, from 0 (or JAX_PROCESS_ID)"
    )
    group.add_argument(
        "--join_timeout", type=float, default=300.0, metavar="SECONDS", help="wait for all to come"
    )
    group.add_argument(
        "--peer_timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="a process that gives no sign of life for so long is gone",
    )
    group.add_argument(
        "--stall_timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="a run whose steps stand still for so long is stuck",
    )


def several_tasks(environment: Mapping[str, str]) -> str | None:
    """The variable by which a launcher says that it started several processes, as ``NAME=value``."""
    names = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    for name in (*names, "MEGASCALE_NUM_SLICES"):
        value = environment.get(name, "")
        if value.isdigit() and int(value) > 1:
            return f"{name}={value}"
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return f"TPU_WORKER_HOSTNAMES={hosts}" if "," in hosts else None


def find_place(flags: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    """Where flags and environment put this process; None for a run of one process.

    Raises:
      UserError: with exit code 2, for several tasks without ``--distributed``, flags that need it,
        half an address, or numbers that are out of range.
    """
    names = ("coordinator", "process_count", "process_index")
    if not flags.distributed:
        given = [f"--{name}" for name in names if getattr(flags, name) is not None]
        if given:
            raise UserError(f"{given[0]} needs --distributed", exit_code=2)
        if (tasks := several_tasks(environment)) is not None:
            raise UserError(
                f"{tasks} says that several processes were started, but --distributed is not given: each "
                "would be a run of its own in the same --workdir; add it, or start one process",
                exit_code=2,
            )
        return None

    def number(flag: int | None, name: str) -> int | None:
        if flag is not None or name not in environment:
            return flag
        if not environment[name].isdigit():
            raise UserError(f"{name}={environment[name]} is not a number", exit_code=2)
        return int(environment[name])

    place = Place(
        flags.coordinator or environment.get("JAX_COORDINATOR_ADDRESS"),
        number(flags.process_count, "JAX_NUM_PROCESSES"),
        number(flags.process_index, "JAX_PROCESS_ID"),
    )
    missing = [f"--{name}" for name, value in zip(names, place, strict=True) if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"--distributed lacks {', '.join(missing)}", exit_code=2)
    if not missing:
        split_address(place.address)
        if not 0 <= place.index < place.count:
            raise UserError(
                f"--process_index={place.index} is not one of {place.count} processes", exit_code=2
            )
    return place


def _initialize(place: Place, join_timeout: float) -> tuple[Place, list[str]]:
    """`jax.distributed.initialize`, after a roll call where the address is known."""
    # JAX's own answer to SIGTERM; ours is `interrupt.Stop`.
    jax.config.update("jax_enable_preemption_service", False)
    hosts: list[str] = []
    if place.address is not None:
        hosts = roll_call(place.address, place.count, place.index, join_timeout)

    def too_late(number: int) -> None:
        print(
            f"error: {place.address or 'the coordinator that JAX found'}: not all processes joined within "
            f"{join_timeout:g} s; see the logs of the others, or wait longer with --join_timeout",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    catch_abort(too_late)
    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            cluster_detection_method=None if place.address is None else "deactivate",
            initialization_timeout=max(1, int(join_timeout)),
        )
    except (ValueError, RuntimeError) as error:
        if place.address is not None:
            raise UserError(f"--distributed: {' '.join(str(error).split())}") from error
        raise UserError(
            "--distributed needs --coordinator, --process_count and --process_index: JAX found no SLURM, "
            f"Open MPI, TPU or Kubernetes job to ask ({' '.join(str(error).split())})",
            exit_code=2,
        ) from error
    # The store and the address have no public name; Orbax takes them from there as well.
    state = jax._src.distributed.global_state
    return Place(state.coordinator_address, state.num_processes, state.process_id), hosts


@contextlib.contextmanager
def joined(flags: argparse.Namespace) -> Iterator[Peers | None]:
    """Around the work of a command: joins the other processes if ``--distributed`` says so.

    Args:
      flags: those of `add_flags`.

    Yields:
      The watched peers, or None for a run of one process.

    Raises:
      UserError: see `find_place` and `roll_call`.
    """
    place = find_place(flags, os.environ)
    if place is None:
        yield None
        return
    place, hosts = _initialize(place, flags.join_timeout)
    client = jax._src.distributed.global_state.client
    hosts = hosts or _exchange_hosts(client, place, flags.join_timeout)
    peers = Peers(client, place, hosts, flags.peer_timeout, flags.stall_timeout)
    catch_abort(peers.on_abort)
    try:
        yield peers
    except SystemExit:  # A stop that all processes agreed on.
        peers.finish()
        raise
    except BaseException as error:
        peers.fail(error)
        raise
    else:
        peers.finish()


def _exchange_hosts(client, place: Place, timeout: float) -> list[str]:
    client.key_value_set(f"{ROOT}/host/{place.index}", socket.gethostname())
    keys = [f"{ROOT}/host/{index}" for index in range(place.count)]
    return [client.blocking_key_value_get(key, int(timeout * 1000)) for key in keys]
