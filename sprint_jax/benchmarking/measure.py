"""The lines of `sprint_jax.benchmark`: networks and parts of inference, compared with others and timed."""

import argparse
from collections.abc import Iterator

import jax

from ..core.errors import UserError
from ..models.blocks import stack, unstack_blocks
from ..models.sana import SanaTransformer
from . import inference_parts
from . import torch_reference as reference
from .timing import compiled, first_call, header, paired_rounds, summarize
from .workloads import STUDENTS, network_calls, network_inputs, random_params

OURS = "sprint_jax"
# Relative L2 between two orders of the same sums.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def lines(flags: argparse.Namespace, command: str) -> Iterator[dict]:
    """Yields all lines of the command: what it runs on, then one for each thing that is measured.

    Raises:
      UserError: a result differs from ours by more than rounding.
    """
    if flags.command == "sample" and "whole" in flags.parts:
        # In processes of its own, before this one takes the device and its memory.
        seconds = inference_parts.first_picture(flags.model, flags.dtype, flags.image)
        yield {"workload": "first picture", "seconds": seconds, "relative_error": {}}
    yield header(command)
    yield from sample_lines(flags) if flags.command == "sample" else network_lines(flags)


def network_lines(flags: argparse.Namespace) -> Iterator[dict]:
    """One line per workload of ``train`` or ``parity``."""
    fields, timed = STUDENTS[flags.size], flags.command == "train"
    model = SanaTransformer(**fields)
    inputs = network_inputs(fields, flags.batch, *flags.image)
    theirs = {}
    if flags.against:
        module, params = reference.make_transformer(fields)
        eager = reference.TransformerArms(module, inputs)
        theirs[reference.EAGER] = eager.workloads(flags.only)
        if timed and not flags.no_compile:
            theirs[reference.COMPILED] = eager.compiled().workloads(flags.only)
    else:
        params = random_params(model, inputs)
    inputs = jax.device_put(inputs)
    if not flags.stacked:
        params = jax.jit(unstack_blocks)(params)

    def error(ours, theirs):
        return network_error(fields, ours, theirs, eager)

    for name in flags.only:
        call, seconds = compiled(network_calls(model)[name], params, inputs)
        line = {"workload": name, "size": flags.size, "image": flags.image, "batch": flags.batch}
        others = {arm: each[name] for arm, each in theirs.items() if name in each}
        rounds = flags.rounds if timed else None
        yield measured(line, call, seconds, others, error, TOLERANCE["float32"], rounds)


def sample_lines(flags: argparse.Namespace) -> Iterator[dict]:
    """One line per part, batch size and step count of ``sample``."""
    tolerance = TOLERANCE[flags.dtype]
    for part in inference_parts.parts(flags):
        line = {"workload": part.name, "size": flags.model or flags.size, "dtype": flags.dtype}
        line |= {"image": flags.image, "batch": part.batch}
        arms = part.ours, part.cold_s, part.theirs
        line = measured(line, *arms, part.error, tolerance, flags.rounds)
        if OURS in line["ms"]:
            line["pictures_per_s"] = float(f"{1e3 * part.batch / line['ms'][OURS][1]:.4g}")
        yield line | {"peak_gb": inference_parts.peak_memory()}


def measured(line: dict, ours, seconds: float, others: dict, error, tolerance, rounds) -> dict:
    """Returns a line with what was measured.

    Args:
      line: what it is about.
      ours, others: calls; {arm: call}. seconds: that ours took to compile.
      error: ``error(ours, theirs)`` of two results; None compares nothing.
      tolerance: the largest error that is timed.
      rounds: None to compare only.
    """
    line |= {"cold_s": {OURS: round(seconds, 2)}, "relative_error": {}}
    for arm, call in others.items():
        line["cold_s"][arm] = round(first_call(call), 2)
        if error is None:
            continue
        found = error(ours(), call())
        line["relative_error"][arm] = float(f"{found:.2g}")
        if not found < tolerance:
            name = line["workload"]
            raise UserError(f"{name} of {arm} differs from ours by {found:.2g}: not timed")
    return line | summarize(paired_rounds({OURS: ours} | others, rounds), OURS) if rounds else line


def network_error(fields: dict, ours, theirs, arms: reference.TransformerArms) -> float:
    """Relative error of a workload's result: an output, two of a JVP, or a loss and its gradient."""
    if isinstance(ours, jax.Array):
        return reference.relative_error(ours, theirs)
    if isinstance(theirs, tuple):
        return max(map(reference.relative_error, ours, theirs))
    loss, gradient = ours
    gradient = gradient | {"transformer_blocks": stack(gradient["transformer_blocks"])}
    error = reference.gradient_error(fields, gradient, arms.gradient())
    return max(error, reference.relative_error(loss, theirs))


def table_row(line: dict) -> str:
    """A line for people: milliseconds of each arm, and its time over ours."""
    cells = [f"{line['workload']:<9}"]
    cells += [f"{name} {seconds} s" for name, seconds in line.get("seconds", {}).items()]
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
