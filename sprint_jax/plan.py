"""Says before a launch whether a run fits and how fast it can be: compiles it, runs nothing.

    python -m sprint_jax.plan --config configs/sprint.py:600m --topology v5e:16x16 --out plan.json
    python -m sprint_jax.plan --config configs/sprint.py:1600m --topology v6e:8x8 --sweep batch,fsdp,remat

The true updates of the config's stage, optimizer and EMA included, are compiled for a topology that need not
exist here (TPU: libtpu's compiler, extra 'plan'), or for the devices of this machine ('local'). No data and no
weights are read. Reported per device: memory by kind, FLOPs, memory traffic, bytes of collectives by kind and
mesh axis, and the least time of a step: every instruction at the peak of what limits it, transfers hidden
behind arithmetic. A real step takes longer.

--out writes all of it as JSON, and a picture of memory by kind beside it. --sweep searches batch, fsdp and
remat. docs/planning.md says what each number means and how it was checked.
"""

import sys

import jax

from .core import cli
from .core.errors import UserError
from .core.files import check_writable, write_json_atomic
from .core.storage import as_path, local_output
from .planning.layout import image_flops, plan_layout
from .planning.report import picture, sweep_table, table
from .planning.search import SUMMARY, best, check_keys, sweep
from .planning.topology import open_topology


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be planned."""
    parser = cli.make_parser("plan", __doc__)
    cli.add_config(parser)
    parser.add_argument(
        "--topology", required=True, metavar="KIND:SHAPE", help="v5e:16x16, v5p:4x4x4 ... or local"
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        help="so many of these, joined by the data centre's network",
    )
    parser.add_argument("--sweep", metavar="KEYS", help="some of batch,fsdp,remat")
    parser.add_argument(
        "--full",
        action="store_true",
        help="compile to machine code too (ten times as long), to know its size",
    )
    parser.add_argument("--out", metavar="FILE.json", help="a .png is written beside it")
    flags, c = cli.parse_with_config(parser, argv)
    keys = check_keys(flags.sweep) if flags.sweep else ()
    out = flags.out and as_path(flags.out)
    if out and out.suffix != ".json":
        raise UserError(f"--out {out} must end in .json", exit_code=2)
    if out:
        check_writable(out.parent)
    topology = open_topology(flags.topology, flags.slices)
    flops = image_flops(c, topology)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if keys:
        tried = sweep(
            c,
            topology,
            keys,
            lambda layout: plan_layout(layout, topology, flops, flags.full),
            say,
        )
        plan = best(tried) | {"sweep": [{key: each[key] for key in SUMMARY} for each in tried]}
        print(sweep_table(plan["sweep"]), end="\n\n")
    else:
        say(f"compiling for {len(topology.devices)} x {topology.chip_name}")
        plan = plan_layout(c, topology, flops, flags.full)
    plan |= {
        "config": flags.config,
        "overrides": cli.split_overrides(argv)[0],
        "jax": jax.__version__,
    }
    print(table(plan))
    if out:
        with local_output(out.parent, (out.name,)) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(folder / out.name, plan)
            picture(plan, folder / out.with_suffix(".png").name)
        print(f"wrote {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run_command(main)
