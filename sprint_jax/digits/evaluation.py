"""The evaluation of digits models: pictures of every step count and solver, as numbers and as a sheet."""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.files import without_nan, write_json_atomic
from ..core.pixels import to_bytes
from ..core.progress import Progress
from ..core.sheet import Cell, draw_sheet, save_picture
from ..core.storage import AnyPath
from .report import (
    FRECHET_MINIMUM,
    Yardsticks,
    judge_goals,
    make_yardsticks,
    measure,
    measure_real,
    number,
)
from .scenes import draw_images
from .sketches import measure_control

SHEET_SIZE = 12  # prompts of the sheet of pictures


class Run(NamedTuple):
    """A model with its steps and solver.

    ``full`` runs draw the pictures of all prompts and those for diversity, others a quarter of the prompts.
    """

    name: str
    pipe: Any  # a SprintPipeline
    steps: int
    solver: str | None = None
    full: bool = True

    @property
    def calls(self) -> int:
        """Network evaluations of one picture; a teacher's guidance doubles them."""
        return self.steps * (1 if self.pipe.is_student else 2)


def judge_models(
    out: AnyPath, world: str, student: Any, teacher: Any, base: Any, count: int, about: dict
) -> None:
    """Judges a student, a teacher or both, writes the report and a sheet of pictures, and prints numbers.

    Args:
      out: the report's .json file; the sheet is the .png beside it.
      student, teacher: pipelines, or None.
      base: a `pipeline.Request`, as of `draw_and_measure`.
      count: prompts.
      about: what else the report says.
    """
    sticks = make_yardsticks(world, count, base.seed)
    runs = teacher_runs(teacher) + student_runs(student)
    results, pictures = draw_and_measure(sticks, runs, base)
    report = about | {
        "world": world,
        "guidance": base.guidance,
        "seed": base.seed,
        "real": measure_real(sticks, base.seed),
        "runs": results,
        "sketches": measure_sketches(sticks, runs, base),
        "goals": judge_goals(results),
    }
    write_json_atomic(out, without_nan(report))
    sheet = out.with_suffix(".png")
    write_sheet(sheet, sticks, base.seed, pictures)
    print_table(report)
    print(f"numbers: {out}\npictures: {sheet}")


def draw_and_measure(
    sticks: Yardsticks, runs: list[Run], base: Any
) -> tuple[list[dict[str, Any]], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Draws and judges all runs, showing progress.

    Args:
      base: a `pipeline.Request` with guidance, seed and batch_size; each run sets steps and solver.

    Returns:
      One result for each run; and for each full run its first pictures, uint8 [R, H, W, 3], with
      bool [R], whether they are right.
    """
    total = sum(run.calls * len(prompts) for run in runs for prompts in _shares(run, sticks))
    print(f"{sticks.world}: {len(runs)} runs, {total} network evaluations", flush=True)
    results, pictures, done = [], {}, 0
    with Progress(total) as progress:
        for run in runs:
            began, drawn = time.perf_counter(), []
            for prompts in _shares(run, sticks):
                drawn.append([])
                request = dataclasses.replace(base, steps=run.steps, solver=run.solver)
                for batch in run.pipe.draw(prompts, request):
                    drawn[-1].append(batch)
                    done += len(batch) * run.calls
                    progress.update(done)
            seconds = time.perf_counter() - began
            images = [np.concatenate(batches) for batches in drawn]
            result, right = measure(sticks, *images)
            about = dict(name=run.name, solver=run.solver or "consistency", steps=run.steps)
            about |= dict(pictures=len(images[0]), seconds=seconds)
            results.append(about | result)
            if run.full:
                pictures[run.name] = images[0][:SHEET_SIZE], right[:SHEET_SIZE]
    return results, pictures


def measure_sketches(sticks: Yardsticks, runs: list[Run], base: Any) -> dict[str, Any]:
    """How networks with a control branch follow sketches: {name of the run: `sketches.measure_control`}.

    Of full runs in 1, 2 or 20 steps, whose pictures are those of a quarter of the prompts.
    """
    found = {}
    for run in runs:
        if "control" not in run.pipe.params or not run.full or run.steps not in (1, 2, 20):
            continue

        def draw(prompts, maps, scale, run=run):
            how = dict(steps=run.steps, solver=run.solver, control=maps, control_scale=scale)
            return np.concatenate([*run.pipe.draw(prompts, dataclasses.replace(base, **how))])

        (prompts,) = _shares(run._replace(full=False), sticks)
        found[run.name] = measure_control(draw, sticks.judge, prompts, seed=base.seed)
    return found


def teacher_runs(pipe: Any) -> list[Run]:
    """Returns the runs of a teacher; a student is compared with the first."""
    if pipe is None:
        return []
    return [
        Run("teacher 20", pipe, 20, "dpm"),
        Run("flow Euler 50", pipe, 50, "flow_euler", full=False),
        Run("TrigFlow Euler 50", pipe, 50, "trigflow_euler", full=False),
        Run("TrigFlow Euler 2", pipe, 2, "trigflow_euler", full=False),
        Run("TrigFlow Euler 1", pipe, 1, "trigflow_euler", full=False),
    ]


def student_runs(pipe: Any) -> list[Run]:
    """Returns the runs of a student."""
    return [] if pipe is None else [Run(f"student {n}", pipe, n) for n in (1, 2, 3, 4)]


def _shares(run: Run, sticks: Yardsticks) -> list[list[str]]:
    """Returns the prompts of a run: those of accuracy, and for full runs those of diversity."""
    if run.full:
        return [sticks.prompts, sticks.grouped]
    count = len(sticks.prompts)
    return [sticks.prompts[: min(count, max(FRECHET_MINIMUM, count // 4))]]


def write_sheet(path: Path, sticks: Yardsticks, seed: int, pictures: dict) -> None:
    """Draws a prompt a column; rows are a real picture and one of each run, with ticks for right ones."""
    prompts = sticks.prompts[:SHEET_SIZE]
    real = draw_images(sticks.world, prompts, "test", seed)
    drawn = {"real": (to_bytes(real), sticks.judge.right(real, prompts))} | pictures
    rows = [
        [Cell(image, right=bool(right)) for image, right in zip(*columns, strict=True)]
        for columns in drawn.values()
    ]
    save_picture(path, draw_sheet(rows, titles=prompts, names=list(drawn)))


def print_table(report: dict[str, Any]) -> None:
    """Prints the report's main numbers, one line for each run, and the goals."""
    print(f"{'':18}{'pictures':>9}{'right':>16}{'Frechet':>16}{'diversity':>15}{'seconds':>9}")
    for run in report["runs"]:
        cells = [_plus_minus(*number(run, key)) for key in ("accuracy", "frechet", "diversity")]
        right, distance, variety = cells
        print(
            f"{run['name']:18}{run['pictures']:>9}{right:>16}{distance:>16}{variety:>15}"
            f"{run['seconds']:>9.1f}"
        )
    print(f"{'real, held out':18}{'':9}{_plus_minus(*number(report['real'], 'accuracy')):>16}")
    for name, rows in report.get("sketches", {}).items():
        for row in rows:
            followed, overall = _plus_minus(*row["iou"].values()), row["accuracy"]["overall"]
            right = _plus_minus(overall["accuracy"], overall["standard_error"])
            about = f"{row['sketch']} sketch at scale {row['scale']:g}"
            print(f"{name}, {about}: IoU with the right one {followed}, right {right}")
    for goal in report["goals"]:
        said = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        value = _plus_minus(goal["value"], goal["standard_error"])
        margin = _plus_minus(goal["value"] - goal["limit"], goal["margin_error"])
        asked = f"{goal['sense']} {goal['limit']:.3f} (difference {margin})"
        print(f"{goal['run']}: {goal['number']} {value}, {asked}: {said}")


def _plus_minus(value: float, error: float) -> str:
    return "-" if not np.isfinite(value) else f"{value:.3f} ± {error:.3f}"
