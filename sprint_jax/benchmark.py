"""Times the networks, beside diffusers' if asked to, and writes JSON lines.

    python -m sprint_jax.benchmark train --size tiny --against diffusers --rounds 25
    python -m sprint_jax.benchmark parity --size mid

train times the forward pass, the JVP, forward and backward, and the sCM branch (JVP, forward and
backward) of a transformer. parity compares outputs only. Weights and inputs are random; blocks have
their weights apart (`unstack_blocks`) unless --stacked is given. Arms take turns in every round; see
`sprint_jax.timing`. Ratios are times of others over ours. On Linux start it with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as the launch scripts do.
"""

import argparse
import json
import os
import platform
import re
from collections.abc import Iterator

import jax

from . import cli
from .errors import UserError
from .interop import reference
from .models.sana import SanaTransformer, stack, unstack_blocks
from .timing import first_call, paired_rounds, summarize
from .workloads import NETWORK, STUDENTS, compiled, network_calls, network_inputs

OURS = "sprint_jax"
TOLERANCE = 1e-4  # between two orders of the same float32 sums


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be timed."""
    flags = _parser().parse_args(argv)
    if flags.threads:
        _use_cores(flags.threads)
    if flags.against:
        reference.import_torch().set_num_threads(len(os.sched_getaffinity(0)))
    lines = [header(argv)]
    for line in network_lines(flags, timed=flags.command == "train"):
        lines.append(line)
        print(table_row(line), flush=True)
    if flags.out:
        with open(flags.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


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


def network_lines(flags: argparse.Namespace, timed: bool) -> Iterator[dict]:
    """One line per workload of ``train`` or ``parity``.

    Raises:
      UserError: an output differs from diffusers' by more than rounding.
    """
    fields = STUDENTS[flags.size]
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
        line |= {"cold_s": {OURS: round(seconds, 2)}, "relative_error": {}}
        calls = {OURS: call} | {arm: each[name] for arm, each in theirs.items() if name in each}
        for arm in list(calls)[1:]:
            line["cold_s"][arm] = round(first_call(calls[arm]), 2)
            error = network_error(fields, call(), calls[arm](), eager)
            line["relative_error"][arm] = float(f"{error:.2g}")
            if not error < TOLERANCE:
                raise UserError(f"{name} of {arm} differs from ours by {error:.2g}: not timed")
        if timed:
            line |= summarize(paired_rounds(calls, flags.rounds), OURS)
        yield line


def random_params(model: SanaTransformer, inputs: dict) -> dict:
    """Parameters that are nowhere zero, as those of layers that start at zero would be."""
    arrays = (inputs[key] for key in ("x", "t", "text", "mask", "guidance"))
    keys = jax.random.split(jax.random.key(0))
    params = jax.jit(model.init)(keys[0], *arrays)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(keys[1], len(leaves))
    noise = [0.02 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.map(jax.numpy.add, params, jax.tree.unflatten(tree, noise))


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,parity}")
    for command, about in (("train", "time the network"), ("parity", "compare the network")):
        add = commands.add_parser(command, help=about).add_argument
        add("--against", choices=("diffusers",), help="compare with diffusers, same weights")
        add("--size", choices=tuple(STUDENTS), default="tiny", help="of the network (default tiny)")
        add("--image", type=_image, default=(512, 512), metavar="HxW", help="default 512x512")
        add("--batch", type=_count, default=1, metavar="B", help="pictures at once (default 1)")
        add("--only", type=_names, default=NETWORK, help=f"some of {','.join(NETWORK)}")
        add("--threads", type=_count, metavar="T", help="cores to use (default: all there are)")
        add("--stacked", action="store_true", help="blocks' weights on one axis, blocks in a scan")
        add("--out", metavar="FILE", help="JSON lines are added to this file")
        if command == "train":
            add("--rounds", type=_count, default=25, metavar="N", help="turns of each arm (25)")
            add("--no-compile", action="store_true", help="leave torch.compile out")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return int(text)


def _image(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' must be HEIGHTxWIDTH, such as 512x512")
    return int(match[1]), int(match[2])


def _names(text: str) -> tuple[str, ...]:
    unknown = sorted(set(text.split(",")) - set(NETWORK))
    if unknown:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is not one of {', '.join(NETWORK)}")
    return tuple(text.split(","))


def _use_cores(count: int) -> None:
    """Leaves this process ``count`` cores; XLA counts them when it starts."""
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise UserError(f"--threads {count}: this process has {len(cores)} cores", exit_code=2)
    os.sched_setaffinity(0, cores[:count])


if __name__ == "__main__":
    cli.run_command(main)
