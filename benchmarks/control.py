"""Sketches in the digits world: how a teacher with a control branch, and the students of it, follow them.

    python benchmarks/control.py --trunk runs/teacher --teacher runs/control-teacher \\
        --student runs/control-student --branch runs/control-branch

Runs `evaluate` on each folder once (report_COUNT.json in it); trained by the lines of configs/controlnet.py,
``student`` with trunk and branch, ``branch`` on a student that stays as it is. Writes
benchmarks/results/control.jsonl and benchmarks/pictures/control.png: sketches of the digit that the prompt
names, and of another one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sprint_jax.benchmarking.scripts import digits_report, run_minutes, write_lines
from sprint_jax.checkpoints.workdir import read_workdir_config
from sprint_jax.core.pixels import to_bytes
from sprint_jax.core.sheet import Cell, draw_sheet, save_picture
from sprint_jax.digits.judge import Judge
from sprint_jax.digits.report import number
from sprint_jax.digits.scenes import draw_images
from sprint_jax.digits.sketches import draw_sketches
from sprint_jax.pipeline import Request, SprintPipeline

HERE = Path(__file__).parent
# What is drawn and what is asked for: four that agree, six that do not.
DRAWN = (3, 5, 7, 8, 8, 3, 1, 7, 0, 2)
ASKED = (3, 5, 7, 8, 3, 8, 7, 1, 6, 5)
PAIRS = [(f"a {d}", f"a red {a} on blue") for d, a in zip(DRAWN, ASKED, strict=True)]


def lines_of(name: str, folder: Path, count: int) -> list[dict[str, Any]]:
    """The time of a training; then a line for each number of steps, kind of sketch and scale."""
    report, lines = digits_report(folder, count), []
    updates = read_workdir_config(folder).steps
    lines.append({"network": name, "updates": updates, "minutes": run_minutes(folder)})
    for run, rows in report["sketches"].items():
        for row in rows:
            lines.append({"network": name, "steps": int(run.split()[-1])} | row)
            lines[-1]["accuracy"] = row["accuracy"]["overall"]
    return lines


def goals(lines: list[dict[str, Any]], trunk: float) -> list[dict[str, Any]]:
    """What was asked for, and what is found."""

    def get(network: str, steps: int, sketch: str = "right") -> dict[str, Any]:
        wanted = {"network": network, "steps": steps, "sketch": sketch, "scale": 1.0}
        return next(line for line in lines if wanted.items() <= line.items())

    teacher = get("teacher", 20)
    found = [
        ("teacher, IoU with the right sketch, at least", 0.75, teacher["iou"]["iou"]),
        (
            "teacher, IoU where sketches are shuffled, at most",
            0.35,
            get("teacher", 20, "shuffled")["iou"]["iou"],
        ),
        (
            "teacher, accuracy, at least the trunk's less 0.03",
            trunk - 0.03,
            teacher["accuracy"]["accuracy"],
        ),
    ]
    for network in ("student", "branch"):
        for steps in (1, 2):
            share = get(network, steps)["iou"]["iou"] / teacher["iou"]["iou"]
            found.append(
                (f"{network} in {steps}, share of the teacher's IoU, at least", 0.95, share)
            )
    return [{"goal": goal, "limit": limit, "found": value} for goal, limit, value in found]


def draw(path: Path, folders: dict[str, Path]) -> None:
    """Draws a pair a column: the sketch, then each network at three scales."""
    world = read_workdir_config(folders["teacher"]).data.world
    drawn, asked = map(list, zip(*PAIRS, strict=True))
    sketches = draw_sketches(to_bytes(draw_images(world, drawn, "test", 0)))
    maps, judge = np.repeat(sketches[..., None], 3, -1), Judge.fit(world)
    rows, names = [[Cell(picture) for picture in maps]], ["sketch"]
    for name, folder in folders.items():
        pipe, steps = SprintPipeline.from_pretrained(folder), 20 if name == "teacher" else 1
        for scale in (0.0, 0.5, 1.0):
            request = Request(steps=steps, control=maps, control_scale=scale)
            images = np.concatenate(list(pipe.draw(asked, request)))
            right = judge.right(images / 127.5 - 1, asked)
            rows.append(
                [Cell(image, right=bool(ok)) for image, ok in zip(images, right, strict=True)]
            )
            names.append(f"{name}, {steps}, scale {scale:g}")
    titles = [f"{prompt}, over {sketch}" for sketch, prompt in PAIRS]
    save_picture(path, draw_sheet(rows, titles=titles, names=names))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("trunk", "teacher", "student", "branch"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000, help="prompts (default 1000)")
    flags = parser.parse_args(argv)
    folders = {name: getattr(flags, name) for name in ("teacher", "student", "branch")}
    lines = [
        line for name, folder in folders.items() for line in lines_of(name, folder, flags.count)
    ]
    trunk = number(digits_report(flags.trunk, flags.count)["runs"][0], "accuracy")[0]
    asked = goals(lines, trunk)
    for goal in asked:
        print("{goal} {limit:.3f}: {found:.3f}".format(**goal))
    command = {"command": "python benchmarks/control.py " + " ".join(argv)}
    write_lines(HERE / "results" / "control.jsonl", [command, *asked, *lines])
    draw(HERE / "pictures" / "control.png", folders)


if __name__ == "__main__":
    main(sys.argv[1:])
