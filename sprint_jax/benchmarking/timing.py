"""Timing of two or more ways to do one thing, on a machine that others may use too.

Arms take turns within every round (A, B, A, B, ...), since speeds of one machine differ by half from
one hour to the next, and ratios are taken round by round. A round during which other processes took
more than a share of our cores is dropped and counted.
"""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

WARM_CALLS = 3
FOREIGN_LIMIT = 0.12
# Linux counts processor time in hundredths of a second: a turn this long keeps the share of others
# exact to a few percent.
TURN_SECONDS = 0.2


class Round(NamedTuple):
    """One turn of every arm.

    Attributes:
      ms: {arm: milliseconds per call}.
      foreign: share of our cores that others had meanwhile; None where it is not recorded.
    """

    ms: dict[str, float]
    foreign: float | None


def processor_times(stat: Path = Path("/proc/stat")) -> np.ndarray | None:
    """Returns seconds that this process's cores were busy, passed, and worked for it: [3], or None.

    A core is busy for other processes, or the host of a virtual machine, too. Children that have ended, such as
    those that load data, count as this process.
    """
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = [line.split() for line in lines if line.startswith("cpu")]
    # The first eight columns: time of guests is in two of them.
    counts = np.array([row[1:9] for row in rows if row[0] in ours], float)
    busy = counts.sum() - counts[:, 3:5].sum()  # idle, waiting for a disk
    rate = os.sysconf("SC_CLK_TCK")
    return np.array([busy / rate, counts.sum() / rate, sum(os.times()[:4])])


def foreign_share(before: np.ndarray | None, after: np.ndarray | None) -> float | None:
    """Returns the share of our cores that others took between two `processor_times`; None without them."""
    if before is None or after is None:
        return None
    busy, passed, own = after - before
    return max(0.0, (busy - own) / passed) if passed > 0 else 0.0


def header(command: str, **more: Any) -> dict[str, Any]:
    """Returns the first line of a benchmark: its command, and what the numbers were taken on."""
    return {
        "command": command,
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "keeps_programs": bool(jax.config.jax_compilation_cache_dir),
    } | more


class Waiting(NamedTuple):
    """A call that waits for its result; ``start()`` does not, and ``wait`` takes what it returned."""

    start: Callable[[], object]
    wait: Callable[[object], object]

    def __call__(self) -> object:
        return self.wait(self.start())


def compiled(
    function: Callable, *arguments: Any, options: dict[str, Any] | None = None
) -> tuple[Waiting, float]:
    """Compiles a function for its arguments; a compiled program cannot compile again.

    Args:
      options: of XLA, by the names of its flags without dashes.

    Returns:
      a call without arguments that waits for its result; seconds that tracing and compiling took.
    """
    began = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile(compiler_options=options)
    seconds = time.perf_counter() - began
    return waiting(program, *arguments), seconds


def waiting(function: Callable, *arguments: Any, **keywords: Any) -> Waiting:
    """Returns a call of ``function`` that waits for its result."""
    return Waiting(functools.partial(function, *arguments, **keywords), jax.block_until_ready)


def first_call(call: Callable[[], object]) -> float:
    """Returns the seconds that a call takes the first time, compilation and all."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def paired_rounds(
    arms: dict[str, Callable[[], object]],
    rounds: int,
    *,
    turn: float = TURN_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    load: Callable[[], np.ndarray | None] = processor_times,
) -> list[Round]:
    """Times arms in turns; a turn is one call that does not count and then enough that do.

    Args:
      arms: calls that return when their work is done.
      rounds: how many turns each arm gets.
      turn: seconds of one, at least a call.
      clock: gives seconds; load: see `processor_times`.
    """
    calls = {}
    for name, call in arms.items():
        for _ in range(WARM_CALLS):
            began = clock()
            call()
            seconds = clock() - began
        calls[name] = max(1, round(turn / max(seconds, 1e-6)))
    taken = []
    for _ in range(rounds):
        before, ms = load(), {}
        for name, call in arms.items():
            call()
            began = clock()
            for _ in range(calls[name]):
                call()
            ms[name] = 1e3 * (clock() - began) / calls[name]
        taken.append(Round(ms, foreign_share(before, load())))
    return taken


def pipelined(call: Waiting, count: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns milliseconds per call of ``count`` calls that follow one another without waiting."""
    call()
    began = clock()
    for _ in range(count):
        out = call.start()
    call.wait(out)
    return 1e3 * (clock() - began) / count


def summarize(rounds: list[Round], base: str, limit: float = FOREIGN_LIMIT) -> dict:
    """Returns milliseconds of each arm, and those of other arms over ``base``'s, round by round.

    Returns:
      'rounds' kept, 'dropped', 'foreign' [minimum, median, maximum] of all rounds or 'not recorded',
      'ms' {arm: [minimum, median, maximum]} and 'ratio' {other arm: the same}, above 1 where ``base`` is
      faster. Without a clean round the last two are empty.
    """
    clean = [each for each in rounds if each.foreign is None or each.foreign <= limit]
    loads = [each.foreign for each in rounds if each.foreign is not None]
    summary = {
        "rounds": len(clean),
        "dropped": len(rounds) - len(clean),
        "foreign": spread(loads) if loads else "not recorded",
        "ms": {},
        "ratio": {},
    }
    for name in clean[0].ms if clean else ():
        summary["ms"][name] = spread(each.ms[name] for each in clean)
        if name != base:
            summary["ratio"][name] = spread(each.ms[name] / each.ms[base] for each in clean)
    return summary


def spread(values: Iterable[float]) -> list[float]:
    """Returns [minimum, median, maximum], to four digits."""
    values = list(values)
    return [float(f"{f(values):.4g}") for f in (min, statistics.median, max)]
