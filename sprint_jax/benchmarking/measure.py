"""The lines of `sprint_jax.benchmark`: parts of inference and training, compared with others and timed."""

import argparse
import resource
import sys
from collections.abc import Iterator

import jax

from ..core.errors import UserError
from .parts import Part, parts
from .timing import first_call, header, paired_rounds, summarize

OURS = "sprint_jax"
# Relative L2 between two orders of the same sums.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def lines(flags: argparse.Namespace, command: str) -> Iterator[dict]:
    """Yields all lines of the command: what it runs on, then one for each part.

    Raises:
      UserError: a result differs from ours by more than rounding.
    """
    yield header(command)
    for part in parts(flags):
        line = {"workload": part.name, "size": flags.name, "dtype": flags.dtype}
        line |= {"image": flags.image, "batch": part.batch}
        line |= measure(part, TOLERANCE[flags.dtype], flags.rounds)
        if line.get("ms"):
            line["pictures_per_s"] = float(f"{1e3 * part.batch / line['ms'][OURS][1]:.4g}")
        yield line | {"peak_gb": peak_memory()}


def measure(part: Part, tolerance: float, rounds: int | None) -> dict:
    """Compares the results of a part, then times it.

    Args:
      tolerance: the largest error that is timed.
      rounds: None to compare only.
    """
    line = {"cold_s": {OURS: round(part.cold_s, 2)}, "relative_error": {}}
    for arm, call in part.theirs.items():
        line["cold_s"][arm] = round(first_call(call), 2)
        if part.error is None:
            continue
        found = part.error(part.ours(), call())
        line["relative_error"][arm] = float(f"{found:.2g}")
        if not found < tolerance:
            raise UserError(f"{part.name} of {arm} differs from ours by {found:.2g}: not timed")
    if rounds is None:
        return line
    return line | summarize(paired_rounds({OURS: part.ours} | part.theirs, rounds), OURS)


def peak_memory() -> dict[str, float]:
    """Returns the most memory so far, GB: {'device': of the accelerator} or {'process': of this process}."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return {"device": round(statistics["peak_bytes_in_use"] / 1e9, 3)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB; bytes on macOS
    return {"process": round(peak / (1e9 if sys.platform == "darwin" else 1e6), 3)}


def table_row(line: dict) -> str:
    """Returns a line for people: milliseconds of each arm, and its time over ours."""
    cells = [f"{line['workload']:<9}"]
    for arm, ms in line.get("ms", {}).items():
        cell = f"{arm} {ms[1]:.5g} ms"
        if arm in line["ratio"]:
            low, median, high = line["ratio"][arm]
            cell += f" = {median:.2f} x [{low:.2f}, {high:.2f}]"
        cells.append(cell)
    if "ms" in line:
        cells.append(f"{line['rounds']} rounds, {line['dropped']} dropped")
    errors = [f"{arm} {error:.1e}" for arm, error in line["relative_error"].items()]
    return "  ".join(cells + (["relative error " + ", ".join(errors)] if errors else []))
