"""The lines of `sprint_jax.benchmark`: parts of inference and training, compared with others and timed."""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax

from ..core.errors import UserError
from .parts import Part, parts
from .timing import TURN_SECONDS, first_call, header, paired_rounds, pipelined, summarize

OURS = "sprint_jax"
# Relative L2 between two orders of the same sums.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# No clock of an accelerator is as coarse as Linux's of processor time.
TURN_ON_ACCELERATORS = 0.05


def lines(flags: argparse.Namespace, command: str) -> Iterator[dict]:
    """Yields all lines of the command: what it runs on, then one for each part.

    Raises:
      UserError: a result differs from ours by more than rounding.
    """
    # In processes of their own, before this one takes the device's memory.
    first = first_picture(flags) if "first" in flags.parts else None
    yield header(command)
    if first:
        yield first
    for part in parts(flags):
        line = {"workload": part.name, "size": flags.name, "dtype": flags.dtype}
        line |= {"image": flags.image, "batch": part.batch}
        line |= measure(part, flags.tolerance or TOLERANCE[flags.dtype], flags.rounds, flags.queue)
        if line.get("ms"):
            line["pictures_per_s"] = float(f"{1e3 * part.batch / line['ms'][OURS][1]:.4g}")
        yield line | {"peak_gb": peak_memory()} | clocks()


def first_picture(flags: argparse.Namespace) -> dict:
    """Times the command `sample` from its start to its first picture, with no compiled program kept, and again.

    Returns:
      a line whose ``first_s`` are seconds of the whole process: 'cold' compiles, 'warm' finds its programs.

    Raises:
      UserError: the command fails.
    """
    steps, (height, width) = flags.steps[0], flags.image
    words = ["--model", str(flags.model), "--prompt", "a photo of a bird", "--steps", str(steps)]
    words += ["--size", f"{height}x{width}", "--dtype", flags.dtype]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
        kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for name in ("cold", "warm"):
            began = time.perf_counter()
            command = [
                sys.executable,
                "-m",
                "sprint_jax.sample",
                *words,
                "--out",
                f"{folder}/{name}",
            ]
            ended = subprocess.run(command, env=os.environ | kept, capture_output=True, text=True)
            if ended.returncode:
                raise UserError(
                    f"sample --model {flags.model} fails: {ended.stderr.strip()[-400:]}"
                )
            seconds[name] = round(time.perf_counter() - began, 2)
    line = {"workload": f"first, {steps} steps", "size": flags.name, "dtype": flags.dtype}
    return line | {"image": flags.image, "batch": 1, "first_s": seconds, "relative_error": {}}


def measure(part: Part, tolerance: float, rounds: int | None, queue: int = 0) -> dict:
    """Compares the results of a part, then times it.

    Args:
      tolerance: the largest error that is timed.
      rounds: None to compare only.
      queue: calls in a row that do not wait for one another, in the result's 'pipelined_ms'; 0 for none.

    Returns:
      What `timing.summarize` does, 'cold_s' and 'relative_error' by arm, and in 'failed' what compiled arms of
      others ended with, which are not timed.
    """
    line = {"cold_s": {OURS: round(part.cold_s, 2)}, "relative_error": {}}
    arms = {OURS: part.ours}
    for arm, call in part.theirs.items():
        try:
            line["cold_s"][arm] = round(first_call(call), 2)
        except Exception as error:
            if "compiled" not in arm:
                raise
            # A compiler of others that fails costs its arm, not the comparison.
            line.setdefault("failed", {})[arm] = " ".join(str(error).split())[:300]
            continue
        arms[arm] = call
        if part.error is None:
            continue
        found = part.error(part.ours(), call())
        line["relative_error"][arm] = float(f"{found:.2g}")
        if not found < tolerance:
            raise UserError(f"{part.name} of {arm} differs from ours by {found:.2g}: not timed")
    if rounds is None:
        return line
    turn = TURN_SECONDS if jax.default_backend() == "cpu" else TURN_ON_ACCELERATORS
    line |= summarize(paired_rounds(arms, rounds, turn=turn), OURS)
    if queue:
        taken = {arm: pipelined(call, queue) for arm, call in arms.items()}
        line["pipelined_ms"] = {arm: float(f"{ms:.4g}") for arm, ms in taken.items()}
    return line


def clocks() -> dict[str, dict]:
    """Returns {'clocks': of the GPUs, as nvidia-smi tells them}; nothing where there is none."""
    if not shutil.which("nvidia-smi"):
        return {}
    names = "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    rows = [[cell.strip() for cell in row.split(",")] for row in said.splitlines()]
    return {"clocks": {name: [row[i] for row in rows] for i, name in enumerate(names)}}


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
    cells += [f"{name} {seconds} s" for name, seconds in line.get("first_s", {}).items()]
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
