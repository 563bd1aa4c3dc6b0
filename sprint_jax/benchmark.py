"""Times the networks, beside diffusers' if asked to, and prints JSON lines, or a table with --out.

    python -m sprint_jax.benchmark train --size tiny --against diffusers
    python -m sprint_jax.benchmark sample --size 600m --dtype bfloat16 --against diffusers
    python -m sprint_jax.benchmark parity --size mid --against diffusers

sample times text encoder, transformer, decoder, the whole from prompts to pictures, the whole along a sketch
that is new or remembered (by a branch as training begins it), and the command `sample` from its start to its
first picture, without and with compiled programs kept from before. train times the forward pass, the JVP,
forward and backward, and the sCM branch (JVP, forward and backward) of a transformer. parity compares
outputs only. --out FILE adds the lines to a file, and prints a table in their place. Weights are random unless
--model is given, inputs always; blocks have their weights apart (`unstack_blocks`) unless --stacked is given.
Arms take turns in every round; see `sprint_jax.benchmarking.timing`. Ratios are times of others over ours. On
Linux start it with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as the launch scripts do.
"""

import argparse
import json
import os
from collections.abc import Callable

from .benchmarking import measure
from .benchmarking import torch_reference as reference
from .benchmarking.parts import OF_PIPELINES, PARTS
from .benchmarking.workloads import NETWORK, STUDENTS
from .core import cli
from .core.errors import UserError
from .core.files import append, check_writable
from .core.storage import as_path, local_copy, make_folder


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be timed."""
    flags = _parser().parse_args(argv)
    flags.image = cli.parse_size(flags.image, "--image")
    flags.mode = None if flags.no_compile else flags.mode
    if flags.threads:
        _use_cores(flags.threads)
    if flags.against:
        reference.import_torch().set_num_threads(len(os.sched_getaffinity(0)))
    possible = [part for part in PARTS if flags.model or part not in OF_PIPELINES]
    flags.parts = flags.parts or possible
    if missing := set(flags.parts) - set(possible):
        raise UserError(f"--parts {min(missing)} needs --model, a pipeline folder", exit_code=2)
    if flags.command != "sample":
        flags.workloads = {name: name for name in flags.only}
    flags.name = flags.model or flags.size
    flags.model = flags.model and str(local_copy(flags.model))
    if flags.out:
        out = as_path(flags.out)
        check_writable(out.parent)
        make_folder(out.parent)
        append(out, "")
    command = " ".join(["python -m sprint_jax.benchmark", *argv])
    for line in measure.lines(flags, command):
        # One by one: a run that is stopped keeps what it has measured.
        if not flags.out:
            print(json.dumps(line), flush=True)
            continue
        append(out, json.dumps(line) + "\n")
        if "workload" in line:
            print(measure.table_row(line), flush=True)


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
        add("--out", metavar="FILE", help="add the JSON lines to this file; print a table")
        add(
            "--batch",
            type=cli.parse_counts,
            metavar="B,...",
            help="pictures at once (1; sample: 1,10)",
        )
    for command in (sample, train):
        add = command.add_argument
        add("--rounds", type=_count, default=25, metavar="N", help="turns of each arm (default 25)")
        add("--no-compile", action="store_true", help="leave torch.compile out")
        add("--mode", default="max-autotune", metavar="M", help="of torch.compile on a GPU")
        add("--queue", type=_count, metavar="N", help="time N calls that do not wait, too")
        add("--tolerance", type=float, metavar="E", help="the largest error that is timed")
    for command in (train, parity):
        add = command.add_argument
        add("--image", default="512x512", metavar="HxW", help="default 512x512")
        add("--only", type=_names(NETWORK), default=NETWORK, help=f"some of {','.join(NETWORK)}")
        command.set_defaults(batch=(1,), model=None, dtype="float32", parts=("transformer",))
    parity.set_defaults(rounds=None, no_compile=True, mode=None, queue=None, tolerance=None)
    sample.set_defaults(batch=(1, 10), workloads={"transformer": "forward"})
    add = sample.add_argument
    add("--model", metavar="DIR", help="the parts of this pipeline, as it runs them")
    add("--image", default="1024x1024", metavar="HxW", help="default 1024x1024")
    add(
        "--steps",
        type=cli.parse_counts,
        default=(1, 2, 4),
        metavar="S,...",
        help="of the whole (1,2,4)",
    )
    add("--dtype", choices=tuple(measure.TOLERANCE), default="float32", help="default float32")
    some = f"some of {','.join(PARTS)}; {' and '.join(sorted(OF_PIPELINES))} need --model"
    add("--parts", type=_names(PARTS), help=some)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return int(text)


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
