"""Measures how well a student or a teacher of the digits world draws what prompts ask for.

    python -m sprint_jax.evaluate --model runs/student --teacher runs/teacher --out report.json

A teacher is sampled with classifier-free guidance in 20 steps of DPM-Solver++, and for comparison
in 50, 2 and 1 steps of Euler's method; a student in 1, 2, 3 and 4 steps. Prompts are held out, and
the same for all; picture i starts from the same noise everywhere. A network with a control branch is also
given sketches: right, shuffled and empty ones at scales 0, 0.5 and 1. Writes the numbers to report.json
and a sheet of pictures beside it, report.png.
"""

import argparse
import shlex
from typing import Any

import jax.numpy as jnp

from .checkpoints.workdir import read_workdir_config
from .core import cli
from .core.errors import UserError
from .core.files import check_writable, without_nan, write_json_atomic
from .core.ranges import COUNT, GUIDANCE, SEED
from .core.schema import check, optional, whole
from .core.storage import AnyPath, as_path, in_bucket
from .digits.evaluation import (
    SHEET_SIZE,
    draw_and_measure,
    measure_sketches,
    print_table,
    student_runs,
    teacher_runs,
    write_sheet,
)
from .digits.report import (
    judge_goals,
    make_yardsticks,
    measure_real,
)
from .digits.worlds import get_world
from .pipeline import Request, SprintPipeline


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be measured."""
    flags = _parser().parse_args(argv)
    out = _check(flags)
    cli.use_compilation_cache()
    world = _world(flags)
    student, teacher = _pipelines(flags)
    first = student or teacher
    guidance = first.guidance if flags.guidance is None else flags.guidance
    sticks = make_yardsticks(world, flags.count, flags.seed)
    runs = teacher_runs(teacher) + student_runs(student)
    base = Request(guidance=guidance, seed=flags.seed, batch_size=flags.batch)
    results, pictures = draw_and_measure(sticks, runs, base)
    report = {
        "command": "python -m sprint_jax.evaluate " + shlex.join(argv),
        "world": world,
        "guidance": guidance,
        "seed": flags.seed,
        "params": flags.params,
        "model": _origin(flags.model, first),
        "teacher": _origin(flags.teacher, teacher) if flags.teacher else None,
        "real": measure_real(sticks, flags.seed),
        "runs": results,
        "sketches": measure_sketches(sticks, runs, base),
        "goals": judge_goals(results),
    }
    write_json_atomic(out, without_nan(report))
    sheet = out.with_suffix(".png")
    write_sheet(sheet, sticks, flags.seed, pictures)
    print_table(report)
    print(f"numbers: {out}\npictures: {sheet}")


def _parser() -> cli.Parser:
    parser = cli.make_parser("evaluate", __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="workdir of a student or a teacher")
    add("--teacher", metavar="DIR", help="workdir to compare a student with")
    add("--metrics", default="digits", metavar="LIST", help="digits (the only ones so far)")
    add("--out", required=True, metavar="FILE.json", help="the report")
    add("--count", type=int, default=1000, metavar="N", help="prompts (default 1000)")
    add("--batch", type=int, default=250, metavar="N", help="pictures at once (default 250)")
    add("--guidance", type=float, metavar="G", help="CFG scale (default: as in training)")
    add("--seed", type=int, default=0, metavar="S", help="of prompts and noise (default 0)")
    add("--params", choices=("ema", "raw"), default="ema", help="which weights (default ema)")
    return parser


def _check(flags: argparse.Namespace) -> AnyPath:
    """The path of the report, once everything that needs no network is known to be in order."""
    if flags.metrics != "digits":
        raise UserError(f"--metrics {flags.metrics}: this version has digits only", exit_code=2)
    kinds = {"count": whole(SHEET_SIZE, 10**6), "guidance": optional(GUIDANCE)}
    kinds |= {"batch": COUNT, "seed": SEED}
    check(vars(flags), kinds, "--", exit_code=2)
    out = as_path(flags.out)
    if out.suffix != ".json":
        raise UserError(f"--out {out} must end in .json", exit_code=2)
    if not in_bucket(out) and not out.parent.is_dir():
        raise UserError(f"--out {out}: the directory {out.parent} does not exist")
    check_writable(out.parent)
    return out


def _world(flags: argparse.Namespace) -> str:
    """The world of the workdirs, which must be the same."""
    worlds = [
        read_workdir_config(folder).data.world for folder in (flags.model, flags.teacher) if folder
    ]
    if len(set(worlds)) > 1:
        raise UserError(f"--model is of the world {worlds[0]!r}, but --teacher of {worlds[1]!r}")
    get_world(worlds[0])
    return worlds[0]


def _origin(folder: str, pipe: SprintPipeline) -> dict[str, Any]:
    return {
        "path": folder,
        "stage": "distill" if pipe.is_student else "flow",
        "step": pipe.meta["step"],
    }


def _pipelines(flags: argparse.Namespace) -> tuple[SprintPipeline | None, SprintPipeline | None]:
    """(student, teacher); None for what is not given."""
    # In float32 on every device: its numbers are compared with others.
    model = SprintPipeline.from_pretrained(flags.model, jnp.float32, flags.params)
    if flags.teacher is None:
        return (model, None) if model.is_student else (None, model)
    if not model.is_student:
        raise UserError(f"--model {flags.model} is a teacher itself: leave out --teacher")
    teacher = SprintPipeline.from_pretrained(flags.teacher, jnp.float32)
    if teacher.is_student:
        raise UserError(f"--teacher {flags.teacher} is a student: name the workdir of its teacher")
    return model, teacher


if __name__ == "__main__":
    cli.run_command(main)
