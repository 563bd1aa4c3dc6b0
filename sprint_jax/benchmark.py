"""Times the networks, beside diffusers' if asked to, and writes JSON lines.

    python -m sprint_jax.benchmark train --size tiny --against diffusers
    python -m sprint_jax.benchmark sample --size 600m --dtype bfloat16 --against diffusers
    python -m sprint_jax.benchmark parity --size mid --against diffusers

sample times text encoder, transformer, decoder, and the whole from prompts to pictures. train times the
forward pass, the JVP, forward and backward, and the sCM branch (JVP, forward and backward) of a
transformer. parity compares outputs only. Weights are random unless --model is given, inputs always;
blocks have their weights apart (`unstack_blocks`) unless --stacked is given. Arms take turns in every
round; see `sprint_jax.benchmarking.timing`. Ratios are times of others over ours. On Linux start it with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as the launch scripts do.
"""

import argparse
import json
import os
import platform
import re
from collections.abc import Callable, Iterator

import jax

from .benchmarking import inference_parts
from .benchmarking import torch_reference as reference
from .benchmarking.timing import first_call, paired_rounds, summarize
from .benchmarking.workloads import (
    NETWORK,
    STUDENTS,
    compiled,
    network_calls,
    network_inputs,
    random_params,
)
from .core import cli
from .core.errors import UserError
from .models.blocks import stack, unstack_blocks
from .models.sana import SanaTransformer

OURS = "sprint_jax"
# Relative L2 between two orders of the same sums.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be timed."""
    flags = _parser().parse_args(argv)
    if flags.threads:
        _use_cores(flags.threads)
    if flags.against:
        reference.import_torch().set_num_threads(len(os.sched_getaffinity(0)))
    if flags.command == "sample":
        _check_parts(flags)
    with open(flags.out or os.devnull, "a", encoding="utf-8") as file:
        for line in report(flags, argv):
            # One by one: a run that is stopped keeps what it has measured.
            file.write(json.dumps(line) + "\n")
            file.flush()
            if "workload" in line:
                print(table_row(line), flush=True)


def report(flags: argparse.Namespace, argv: list[str]) -> Iterator[dict]:
    """All lines of the command."""
    if flags.command == "sample" and "whole" in flags.parts:
        # In processes of its own, before this one takes the device and its memory.
        seconds = inference_parts.first_picture(flags.model, flags.dtype, flags.image)
        yield {"workload": "first picture", "seconds": seconds, "relative_error": {}}
    yield header(argv)
    yield from sample_lines(flags) if flags.command == "sample" else network_lines(flags)


def header(argv: list[str]) -> dict:
    """What the numbers were taken on."""
    return {
        "command": " ".join(["python -m sprint_jax.benchmark", *argv]),
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


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
    for name in flags.only:
        call, seconds = compiled(network_calls(model)[name], params, inputs)
        line = {"workload": name, "size": flags.size, "image": flags.image, "batch": flags.batch}
        others = {arm: each[name] for arm, each in theirs.items() if name in each}

        def error(ours, theirs):
            return network_error(fields, ours, theirs, eager)

        yield measured(
            line, call, seconds, others, error, TOLERANCE["float32"], timed and flags.rounds
        )


def sample_lines(flags: argparse.Namespace) -> Iterator[dict]:
    """One line per part, batch size and step count of ``sample``."""
    setup = inference_parts.Setup(
        folder=flags.model,
        size=flags.size,
        dtype=flags.dtype,
        device=inference_parts.torch_device() if flags.against else "cpu",
        image=flags.image,
        against=bool(flags.against),
        torch_compile=not flags.no_compile,
        stacked=flags.stacked,
    )
    for part in inference_parts.parts(setup, flags.parts, flags.batch, flags.steps):
        line = {"workload": part.name, "size": flags.model or flags.size, "dtype": flags.dtype}
        line |= {"image": flags.image, "batch": part.batch}
        tolerance = TOLERANCE[flags.dtype]
        line = measured(
            line, part.ours, part.cold_s, part.theirs, part.error, tolerance, flags.rounds
        )
        if OURS in line["ms"]:
            line["pictures_per_s"] = float(f"{1e3 * part.batch / line['ms'][OURS][1]:.4g}")
        yield line | {"peak_gb": inference_parts.peak_memory()}


def measured(line, ours, seconds, others, error, tolerance, rounds) -> dict:
    """A line with what was measured.

    Args:
      line: what it is about.
      ours, others: calls; {arm: call}. seconds: that ours took to compile.
      error: ``error(ours, theirs)`` of two results; None compares nothing.
      tolerance: the largest error that is timed.
      rounds: None to compare only.

    Raises:
      UserError: a result differs from ours by more than rounding.
    """
    line |= {"cold_s": {OURS: round(seconds, 2)}, "relative_error": {}}
    for arm, call in others.items():
        line["cold_s"][arm] = round(first_call(call), 2)
        if error is None:
            continue
        found = error(ours(), call())
        line["relative_error"][arm] = float(f"{found:.2g}")
        if not found < tolerance:
            raise UserError(
                f"{line['workload']} of {arm} differs from ours by {found:.2g}: not timed"
            )
    return line | summarize(paired_rounds({OURS: ours} | others, rounds), OURS) if rounds else line


def network_error(fields: dict, ours, theirs, arms: reference.TransformerArms) -> float:
    """Relative error of what a workload returned: an output, two of a JVP, or a loss and its gradient."""
    if isinstance(ours, jax.Array):
        return reference.relative_error(ours, reference.to_numpy(theirs))
    if isinstance(theirs, tuple):
        pairs = zip(ours, map(reference.to_numpy, theirs), strict=True)
        return max(reference.relative_error(*pair) for pair in pairs)
    loss, gradient = ours
    blocks = stack(gradient["transformer_blocks"])
    gradient = gradient | {"transformer_blocks": blocks}
    error = reference.gradient_error(fields, gradient, arms.gradient())
    return max(error, reference.relative_error(loss, reference.to_numpy(theirs)))


def table_row(line: dict) -> str:
    """A line for people: what each arm took, and its time over ours."""
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


def _parser() -> cli.Parser:
    parser = cli.make_parser("benchmark", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{sample,train,parity}")
    sample = commands.add_parser("sample", help="time parts of inference")
    train = commands.add_parser("train", help="time the network")
    parity = commands.add_parser("parity", help="compare the network")
    for command in (sample, train, parity):
        add = command.add_argument
        add("--against", choices=("diffusers",), help="compare with diffusers, same weights")
        add("--size", choices=tuple(STUDENTS), default="tiny", help="of the network (default tiny)")
        add("--threads", type=_count, metavar="T", help="cores to use (default: all there are)")
        add("--stacked", action="store_true", help="blocks' weights on one axis, blocks in a scan")
        add("--out", metavar="FILE", help="JSON lines are added to this file")
    for command in (sample, train):
        add = command.add_argument
        add("--rounds", type=_count, default=25, metavar="N", help="turns of each arm (default 25)")
        add("--no-compile", action="store_true", help="leave torch.compile out")
    for command in (train, parity):
        add = command.add_argument
        add("--image", type=_image, default=(512, 512), metavar="HxW", help="default 512x512")
        add("--batch", type=_count, default=1, metavar="B", help="pictures at once (default 1)")
        add("--only", type=_names(NETWORK), default=NETWORK, help=f"some of {','.join(NETWORK)}")
    add = sample.add_argument
    add("--model", metavar="DIR", help="a pipeline folder instead of random weights")
    add("--image", type=_image, default=(1024, 1024), metavar="HxW", help="default 1024x1024")
    add("--batch", type=_counts, default=(1, 10), metavar="B,...", help="pictures at once (1,10)")
    add("--steps", type=_counts, default=(1, 2, 4), metavar="S,...", help="of the whole (1,2,4)")
    add("--dtype", choices=tuple(TOLERANCE), default="float32", help="default float32")
    names = inference_parts.PARTS
    add(
        "--parts",
        type=_names(names),
        help=f"some of {','.join(names)}; text and whole need --model",
    )
    return parser


def _check_parts(flags: argparse.Namespace) -> None:
    possible = inference_parts.PARTS if flags.model else inference_parts.OF_SIZE
    flags.parts = flags.parts or possible
    missing = [name for name in flags.parts if name not in possible]
    if missing:
        raise UserError(f"--parts {missing[0]} needs --model, a pipeline folder", exit_code=2)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return int(text)


def _image(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' must be HEIGHTxWIDTH, such as 512x512")
    return int(match[1]), int(match[2])


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(each) for each in text.split(","))


def _names(known: tuple[str, ...]) -> Callable:
    def parse(text: str) -> tuple[str, ...]:
        unknown = sorted(set(text.split(",")) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"'{unknown[0]}' is not one of {', '.join(known)}")
        return tuple(text.split(","))

    return parse


def _use_cores(count: int) -> None:
    """Leaves this process ``count`` cores; XLA counts them when it starts."""
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise UserError(f"--threads {count}: this process has {len(cores)} cores", exit_code=2)
    os.sched_setaffinity(0, cores[:count])


if __name__ == "__main__":
    cli.run_command(main)
