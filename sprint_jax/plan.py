"""Says before a launch whether a run fits and how fast it can be: compiles it, runs nothing.

    python -m sprint_jax.plan --config configs/sprint.py:600m --topology v5e:16x16 --out plan.json
    python -m sprint_jax.plan --config configs/sprint.py:1600m --topology v6e:8x8 --sweep batch,fsdp,remat
    python -m sprint_jax.plan --config configs/sprint.py:600m --topology h100:8 --config.mesh.fsdp=8
    python -m sprint_jax.plan --sample --model 600m --topology h200:1 --steps 1,2,4 --batch 1,10

The true updates of the config's stage, optimizer and EMA included, are compiled for a topology that need not
exist here (TPU: libtpu's compiler, extra 'plan'; GPU: CUDA's, extra 'plan-cuda'), or for the devices of this
machine ('local'). No data and no weights are read. Reported per device: memory by kind, FLOPs, memory traffic,
kernels, bytes of collectives by kind and mesh axis, and the least time of a step: every instruction at the peak
of what limits it, transfers hidden behind arithmetic. A real step takes longer.

With --sample it is the pipeline of a model that is compiled, for one device: text encoder, transformer, decoder
and the whole from prompt to picture.

--out writes all of it as JSON, and a picture beside it. --sweep searches batch, fsdp and remat.
docs/planning.md says what each number means and how it was checked.
"""

import argparse
import sys

import jax

from .core import cli
from .core.config import Config
from .core.errors import UserError
from .core.files import check_writable, write_json_atomic
from .core.storage import as_path, local_output
from .models.sana import SIZES
from .planning.inference import Run, plan_sampling
from .planning.layout import image_flops, plan_layout
from .planning.report import picture, sample_picture, sample_table, sweep_table, table
from .planning.search import SUMMARY, best, check_keys, sweep
from .planning.topology import open_topology


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be planned."""
    is_training = "--sample" not in argv
    parser = _parser(is_training)
    if is_training:
        flags, c = cli.parse_with_config(parser, argv)
    else:
        flags = parser.parse_args(argv)
    out = flags.out and as_path(flags.out)
    if out and out.suffix != ".json":
        raise UserError(f"--out {out} must end in .json", exit_code=2)
    if out:
        check_writable(out.parent)
    if is_training:
        plan, draw = _training(flags, c), picture
        plan |= {"config": flags.config, "overrides": cli.split_overrides(argv)[0]}
        print(table(plan))
    else:
        plan, draw = _sampling(flags), sample_picture
        print(sample_table(plan))
    if out:
        with local_output(out.parent, (out.name,)) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(folder / out.name, plan | {"jax": jax.__version__})
            draw(plan, folder / out.with_suffix(".png").name)
        print(f"wrote {out} and {out.with_suffix('.png')}")


def _parser(is_training: bool) -> cli.Parser:
    parser = cli.make_parser("plan", __doc__)
    cli.add_config(parser, required=is_training)
    add = parser.add_argument
    where = "v5e:16x16, v5p:4x4x4, h100:8, h200:2x8 (hosts x cards) ... or local"
    add("--topology", required=True, metavar="KIND:SHAPE", help=where)
    joined = "so many of these, joined by the data centre's network"
    add("--slices", type=int, default=1, help=joined)
    add("--sweep", metavar="KEYS", help="some of batch,fsdp,remat")
    slow = "compile to machine code too (ten times as long), to know its size"
    add("--full", action="store_true", help=slow)
    add("--out", metavar="FILE.json", help="a .png is written beside it")
    add("--sample", action="store_true", help="plan inference; the flags below are for it")
    named = f"{', '.join(SIZES)}, or where a pipeline or a workdir lies"
    add("--model", required=not is_training, metavar="NAME|DIR", help=named)
    add("--steps", type=cli.parse_counts, metavar="S,...", help="(1,2,4)")
    add("--batch", type=cli.parse_counts, metavar="B,...", help="(1,10)")
    add("--image", metavar="HxW", help="default 1024x1024")
    add("--dtype", choices=("bfloat16", "float32"), help="default bfloat16")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sampling(flags: argparse.Namespace) -> dict:
    """The plan of a model's pipeline."""
    if flags.config or flags.sweep:
        raise UserError("--config and --sweep are for plans of a training, not --sample", 2)
    image = cli.parse_size(flags.image or "1024x1024", "--image")
    batches, steps = sorted({*(flags.batch or (1, 10))}), sorted({*(flags.steps or (1, 2, 4))})
    runs = [Run(count, batch, image) for batch in batches for count in steps]
    topology = open_topology(flags.topology, flags.slices)
    return plan_sampling(flags.model, flags.dtype or "bfloat16", topology, runs, flags.full, _say)


def _training(flags: argparse.Namespace, c: Config) -> dict:
    """The plan of a training, or the best of a sweep."""
    for name in ("model", "steps", "batch", "image", "dtype"):
        if getattr(flags, name) is not None:
            raise UserError(
                f"--{name} is for plans of inference: add --sample, or take --config.KEY", 2
            )
    keys = check_keys(flags.sweep) if flags.sweep else ()
    topology = open_topology(flags.topology, flags.slices)
    flops = image_flops(c, topology)
    if not keys:
        _say(f"compiling for {len(topology.devices)} x {topology.chip_name}")
        return plan_layout(c, topology, flops, flags.full)
    tried = sweep(
        c, topology, keys, lambda layout: plan_layout(layout, topology, flops, flags.full), _say
    )
    plan = best(tried) | {"sweep": [{key: each[key] for key in SUMMARY} for each in tried]}
    print(sweep_table(plan["sweep"]), end="\n\n")
    return plan


if __name__ == "__main__":
    cli.run_command(main)
