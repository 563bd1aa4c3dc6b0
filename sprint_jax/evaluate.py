"""Measures how well a student or a teacher of the digits world draws what prompts ask for.

    python -m sprint_jax.evaluate --model runs/student --teacher runs/teacher --out report.json

A teacher is sampled with classifier-free guidance in 20 steps of DPM-Solver++, and for comparison
in 50, 2 and 1 steps of Euler's method; a student in 1, 2, 3 and 4 steps. Prompts are held out, and
the same for all; picture i starts from the same noise everywhere. Writes the numbers to report.json
and a sheet of pictures beside it, report.png.
"""

import argparse
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .checkpoints.workdir import read_workdir_config
from .core import cli
from .core.errors import UserError
from .core.files import without_nan, write_json_atomic
from .core.pixels import to_bytes
from .core.progress import Progress
from .core.sheet import Cell, draw_sheet
from .digits.report import (
    FRECHET_MINIMUM,
    Yardsticks,
    judge_goals,
    make_yardsticks,
    measure,
    measure_real,
    number,
)
from .digits.scenes import draw_images, get_world
from .pipeline import SprintPipeline

SHEET_ROWS = 12


class Run(NamedTuple):
    """One way of drawing.

    ``full`` runs draw all pictures and those for diversity, others a quarter of the former.
    """

    name: str
    pipe: SprintPipeline
    steps: int
    solver: str | None = None
    full: bool = True

    @property
    def calls(self) -> int:
        """Network evaluations of one picture; guidance of a teacher doubles them."""
        return self.steps * (1 if self.pipe.is_student else 2)


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be measured."""
    flags = _parser().parse_args(argv)
    out = _check(flags)
    world = _world(flags)
    student, teacher = _pipelines(flags)
    first = student or teacher
    guidance = first.guidance if flags.guidance is None else flags.guidance
    sticks = make_yardsticks(world, flags.count, flags.seed)
    runs = teacher_runs(teacher) + student_runs(student)
    results, pictures = draw_and_measure(sticks, runs, guidance, flags.seed, flags.batch)
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
        "goals": judge_goals(results),
    }
    write_json_atomic(out, without_nan(report))
    sheet = out.with_suffix(".png")
    write_sheet(sheet, sticks, flags.seed, pictures)
    print_table(report)
    print(f"numbers: {out}\npictures: {sheet}")


def draw_and_measure(
    sticks: Yardsticks, runs: list[Run], guidance: float, seed: int, batch_size: int
) -> tuple[list[dict[str, Any]], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Draws and judges all runs, showing progress.

    Returns:
      One result for each run; and for each full run its first pictures, uint8 [R, H, W, 3], with
      bool [R], whether they are right.
    """
    total = sum(run.calls * len(prompts) for run in runs for prompts in _shares(run, sticks))
    print(
        f"{sticks.world}: {len(runs)} runs; steps shown are {total} network evaluations", flush=True
    )
    results, pictures, done = [], {}, 0
    with Progress(total) as progress:
        for run in runs:
            began, drawn = time.perf_counter(), []
            for prompts in _shares(run, sticks):
                how = dict(steps=run.steps, solver=run.solver, guidance=guidance, seed=seed)
                drawn.append([])
                for batch in run.pipe.draw(prompts, **how, batch_size=batch_size):
                    drawn[-1].append(batch)
                    done += len(batch) * run.calls
                    progress.update(done)
            seconds = time.perf_counter() - began
            images = [np.concatenate(batches) for batches in drawn]
            result, right = measure(sticks, *images)
            about = dict(name=run.name, solver=run.solver or "consistency", steps=run.steps)
            results.append(about | dict(pictures=len(images[0]), seconds=seconds) | result)
            if run.full:
                pictures[run.name] = images[0][:SHEET_ROWS], right[:SHEET_ROWS]
    return results, pictures


def teacher_runs(pipe: SprintPipeline | None) -> list[Run]:
    """The ways a teacher draws; the first is the one that a student is compared with."""
    if pipe is None:
        return []
    return [
        Run("teacher 20", pipe, 20, "dpm"),
        Run("flow Euler 50", pipe, 50, "flow_euler", full=False),
        Run("TrigFlow Euler 50", pipe, 50, "trigflow_euler", full=False),
        Run("TrigFlow Euler 2", pipe, 2, "trigflow_euler", full=False),
        Run("TrigFlow Euler 1", pipe, 1, "trigflow_euler", full=False),
    ]


def student_runs(pipe: SprintPipeline | None) -> list[Run]:
    """The ways a student draws."""
    return [] if pipe is None else [Run(f"student {n}", pipe, n) for n in (1, 2, 3, 4)]


def _shares(run: Run, sticks: Yardsticks) -> list[list[str]]:
    """The prompts of a run: those of accuracy, and for full runs those of diversity."""
    if run.full:
        return [sticks.prompts, sticks.grouped]
    count = len(sticks.prompts)
    return [sticks.prompts[: min(count, max(FRECHET_MINIMUM, count // 4))]]


def write_sheet(path: Path, sticks: Yardsticks, seed: int, pictures: dict) -> None:
    """Rows are prompts; columns a real picture and one for each run, with ticks for right ones."""
    prompts = sticks.prompts[:SHEET_ROWS]
    real = draw_images(sticks.world, prompts, "test", seed)
    columns = {"real": (to_bytes(real), sticks.judge.right(real, prompts))} | pictures
    rows = [
        [
            Cell(images[row], prompt if name == "real" else "", bool(right[row]))
            for name, (images, right) in columns.items()
        ]
        for row, prompt in enumerate(prompts)
    ]
    try:
        draw_sheet(rows, titles=list(columns)).save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def print_table(report: dict[str, Any]) -> None:
    """The report's main numbers, one line for each run, and the goals."""
    print(f"{'':18}{'pictures':>9}{'right':>16}{'Frechet':>16}{'diversity':>15}{'seconds':>9}")
    for run in report["runs"]:
        cells = [_plus_minus(*number(run, key)) for key in ("accuracy", "frechet", "diversity")]
        right, distance, variety = cells
        print(
            f"{run['name']:18}{run['pictures']:>9}{right:>16}{distance:>16}{variety:>15}"
            f"{run['seconds']:>9.1f}"
        )
    print(f"{'real, held out':18}{'':9}{_plus_minus(*number(report['real'], 'accuracy')):>16}")
    for goal in report["goals"]:
        said = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        value = _plus_minus(goal["value"], goal["standard_error"])
        print(
            f"{goal['run']}: {goal['number']} {value}, {goal['sense']} {goal['limit']:.3f}: {said}"
        )


def _plus_minus(value: float, error: float) -> str:
    return "-" if not np.isfinite(value) else f"{value:.3f} ± {error:.3f}"


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


def _check(flags: argparse.Namespace) -> Path:
    """The path of the report, once everything that needs no network is known to be in order."""
    if flags.metrics != "digits":
        raise UserError(f"--metrics {flags.metrics}: this version has digits only", exit_code=2)
    if flags.count < SHEET_ROWS or flags.batch < 1 or flags.seed < 0:
        raise UserError(
            f"--count must be at least {SHEET_ROWS}, --batch 1 and --seed 0", exit_code=2
        )
    out = Path(flags.out)
    if out.suffix != ".json":
        raise UserError(f"--out {out} must end in .json", exit_code=2)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the directory {out.parent} does not exist")
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
    return {"path": folder, "stage": pipe.stage, "step": pipe.meta["step"]}


def _pipelines(flags: argparse.Namespace) -> tuple[SprintPipeline | None, SprintPipeline | None]:
    """(student, teacher); None for what is not given."""
    model = SprintPipeline.from_pretrained(flags.model, params=flags.params)
    if flags.teacher is None:
        return (model, None) if model.is_student else (None, model)
    if not model.is_student:
        raise UserError(f"--model {flags.model} is a teacher itself: leave out --teacher")
    teacher = SprintPipeline.from_pretrained(flags.teacher)
    if teacher.is_student:
        raise UserError(f"--teacher {flags.teacher} is a student: name the workdir of its teacher")
    return model, teacher


if __name__ == "__main__":
    cli.run_command(main)
