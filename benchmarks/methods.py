"""The table {method} x {steps} on one digits teacher, of the students that `configs/methods.py` trained.

    python benchmarks/methods.py --runs runs/methods --teacher runs/teacher

Evaluates the teacher and every finished run once (report_COUNT.json in each folder). Writes
benchmarks/results/methods.jsonl, a line for each method with means and standard errors over seeds, and
benchmarks/pictures/methods.png: the same prompts from the same noise in one step, a row for each method.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import jax

from sprint_jax.benchmarking.scripts import (
    digits_report,
    finished_runs,
    numbers,
    run_minutes,
    spread,
    students_parser,
    write_lines,
)
from sprint_jax.checkpoints.workdir import read_metrics, read_workdir_config
from sprint_jax.core.config import Config
from sprint_jax.digits.evaluation import SHEET_SIZE, write_sheet
from sprint_jax.digits.report import make_yardsticks, number
from sprint_jax.pipeline import Request, SprintPipeline
from sprint_jax.planning.counts import analyze, total
from sprint_jax.training import setup
from sprint_jax.training.stages import lower_updates

HERE = Path(__file__).parent
# Means of the last lines of a log.
LOGGED = ("critic/auc", "share/images", "cosine/images", "fake_gap/t7", "twin_gap/t7")


def forwards(c: Config) -> float:
    """FLOPs of all updates of a step, in those of the student's forward pass on a batch."""
    mesh = setup.mesh_from(c, devices=jax.devices()[:1])
    nets, state, batch, frozen = setup.abstract_run(c, mesh)
    x, text, mask = batch["latents"], batch["text"], batch["mask"]
    time = jax.ShapeDtypeStruct(x.shape[:1], x.dtype)
    forward = jax.jit(lambda params, *inputs: nets.model.apply({"params": params}, *inputs))
    programs = lower_updates(c, nets, state, batch, frozen)
    programs += [forward.lower(state.params, x, time, text, mask, time)]
    *updates, one = [total(analyze(each.as_text(dialect="hlo")), "flops") for each in programs]
    return sum(updates) / one


def logged(folder: Path) -> dict[str, float]:
    """Of a run: minutes of its loop, compilation left out, and means of `LOGGED` over the last ten lines."""
    records = read_metrics(folder / "metrics.jsonl")
    late = {k: [r[k] for r in records[-10:] if r.get(k) is not None] for k in LOGGED}
    means = {name: statistics.mean(values) for name, values in late.items() if values}
    return {"minutes": run_minutes(folder)} | means


def line_of(method: str, folders: list[Path], count: int) -> dict[str, Any]:
    c = read_workdir_config(folders[0])
    reports = [digits_report(folder, count)["runs"] for folder in folders]
    logs = [logged(folder) for folder in folders]
    return {
        "method": method,
        "seeds": len(folders),
        "updates": c.steps,
        "forwards": round(forwards(c), 2),
        "steps": {str(runs[0]["steps"]): numbers(runs) for runs in zip(*reports, strict=True)},
        "logged": {name: spread([log.get(name) for log in logs]) for name in logs[0]},
    }


def draw(path: Path, models: dict[str, Path], world: str, count: int) -> None:
    """Draws one-step pictures, a row for each method."""
    sticks = make_yardsticks(world, count, 0)
    prompts, pictures = sticks.prompts[:SHEET_SIZE], {}
    for name, folder in models.items():
        (images,) = SprintPipeline.from_pretrained(folder).draw(prompts, Request(steps=1))
        right = sticks.judge.right(images / 127.5 - 1, prompts)
        pictures[name] = images, right
    write_sheet(path, sticks, 0, pictures)


def main(argv: list[str]) -> None:
    flags = students_parser(__doc__).parse_args(argv)
    methods = {name: [*runs.values()] for name, runs in finished_runs(flags.runs).items()}
    teacher = digits_report(flags.teacher, flags.count)["runs"][0]
    lines = [{"command": "python benchmarks/methods.py " + " ".join(argv)}]
    lines += [
        {"teacher": number(teacher, "accuracy")[0], "diversity": number(teacher, "diversity")[0]}
    ]
    for method, folders in methods.items():
        lines.append(line_of(method, folders, flags.count))
        print(json.dumps(lines[-1]), flush=True)
    write_lines(HERE / "results" / "methods.jsonl", lines)
    world = read_workdir_config(flags.teacher).data.world
    firsts = {method: folders[0] for method, folders in methods.items()}
    draw(HERE / "pictures" / "methods.png", firsts, world, flags.count)


if __name__ == "__main__":
    main(sys.argv[1:])
