"""Ablation of a digits teacher's time scale and QK norm, as in the paper's Fig. 3.

    python benchmarks/ablation.py --root runs/ablation

One teacher is trained with times 0..1000 and without QK norm. From each of five seeds `prepare_teacher` makes
four of it, all fine-tuned for as long, and each is distilled for 200 steps of 32 by the consistency loss alone;
`teacher_check` judges those of the first seed. Writes benchmarks/results/ablation.jsonl and
benchmarks/pictures/ablation.png; benchmarks/claims.py says what differs. Finished steps are not repeated.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from jax import numpy as jnp
from matplotlib.figure import Figure

from sprint_jax.benchmarking.scripts import (
    config_words,
    digits_report,
    evaluated_students,
    numbers,
    run_command,
    write_lines,
)
from sprint_jax.checkpoints.weights import find_weights
from sprint_jax.checkpoints.workdir import read_metrics, read_workdir_config
from sprint_jax.models.sana import from_fields
from sprint_jax.teacher import measure, surgery
from sprint_jax.training import setup

HERE = Path(__file__).parent
BINS = 8
STEPS = 200  # of a distillation
ARMS = {  # name: (timestep_scale, QK norm)
    "dense_qk": (0.001, True),
    "dense_noqk": (0.001, False),
    "t1000_qk": (1.0, True),
    "t1000_noqk": (1.0, False),
}
TUNE = {"steps": 180, "optimizer.decay_steps": 180, "optimizer.learning_rate": 5e-4}
TUNE |= {"optimizer.warmup_steps": 20, "log.sample_every": 10000}


def make(root: Path, seeds: int, data: Path, count: int) -> None:
    """Trains, prepares, checks, distils and evaluates."""
    data_words = {"data.dir": data, "log.sample_every": 10000}
    teacher = ["--config", "configs/digits.py:teacher,small"]
    student = ["--config", "configs/digits.py:student,small,sprint"]
    base = data_words | {"model.timestep_scale": 1.0, "model.qk_norm": False}
    run_command("train", *teacher, *config_words(base), "--workdir", root / "base")
    tune = [*teacher, *config_words(data_words | TUNE), "--model", root / "base"]
    run_command("prepare_teacher", *tune, "--workdir", root / "kept_qk", "--keep_time_embedding")
    for seed, (name, (scale, qk_norm)) in itertools.product(range(seeds), ARMS.items()):
        prepared = root / f"{name}-{seed}"
        model = {"model.timestep_scale": scale, "model.qk_norm": qk_norm, "seed": seed}
        run_command("prepare_teacher", *tune, *config_words(model), "--workdir", prepared)
        report = root / f"{name}-0_check"
        if seed == 0 and not (report / "report.json").is_file():
            words = ["--model", prepared, "--out", report]
            run_command("teacher_check", *words, allowed=(0, 4))
        short = {"steps": STEPS, "optimizer.decay_steps": STEPS, "ladd.weight": 0.0}
        short |= {"log.every": 5, "teacher": prepared, "data.batch_size": 32} | model
        folder = root / "students" / prepared.name
        run_command("train", *student, *config_words(data_words | short), "--workdir", folder)
        digits_report(folder, count)


def losses_after_surgery(root: Path) -> dict:
    """Mean flow losses on 256 held-out records: of the base, after surgery by both ways, and tuned."""
    source = find_weights(str(root / "base"))
    base, _ = source.load(None)
    target = source.fields | {"timestep_scale": 0.001, "qk_norm": True}
    c = read_workdir_config(root / "base")
    held = {name: jnp.asarray(a) for name, a in setup.held_out(c, 256).items()}
    null = (jnp.zeros_like(held["text"][0]), held["mask"][0])  # not looked at
    halves = [{name: a[i::2] for name, a in held.items()} for i in (0, 1)]
    setting = measure.Setting(halves, *null, guidance=1.0, sigma_d=c.sigma_d, shift=c.flow.shift)

    def loss(fields, params):
        return measure.flow_losses(from_fields(fields), params, setting, lambda: None)["mean"]

    line = {"what": "flow loss", "base": loss(source.fields, base)}
    for name, fit in (("fitted", True), ("kept", False)):
        params, _ = surgery.operate(source.fields, base, target, fit_time=fit)
        line[name] = loss(target, params)
    for name, folder in (("fitted", "dense_qk-0"), ("kept", "kept_qk")):
        tuned, _ = find_weights(str(root / folder)).load(None)
        line[f"{name}, fine-tuned"] = loss(target, tuned)
    return line


def summarize(root: Path, count: int) -> list[dict]:
    """One line for each arm: what was said beforehand, and what the second half of distillation was like."""
    lines, students = [], evaluated_students(root, count)
    for name, (scale, qk_norm) in ARMS.items():
        report = json.loads((root / f"{name}-0_check" / "report.json").read_text())
        logs = [read_metrics(folder / "metrics.jsonl") for folder in students[name].values()]
        late = [record for log in logs for record in log[len(log) // 2 :]]

        def by_bin(key, late=late):
            columns = [[m[f"{key}/t{i}"] for m in late] for i in range(BINS)]
            return [float(np.mean([x for x in c if x is not None] or [np.nan])) for c in columns]

        gradients = np.asarray([m["grad/student"] for m in late], np.float64)
        reports = [digits_report(folder, count)["runs"] for folder in students[name].values()]
        lines.append(
            {
                "arm": name,
                "timestep_scale": scale,
                "qk_norm": qk_norm,
                "ready": report["ready"],
                "failed": [each["name"] for each in report["checks"] if not each["passed"]],
                "check": {each["name"]: each["value"] for each in report["checks"]},
                "before": {
                    key: report["measured"]["after"]["tangent"][key] for key in ("size", "gradient")
                },
                "seeds": len(logs),
                "tangent_norm": by_bin("tangent_norm"),
                "error": by_bin("error"),
                "teacher_gap": by_bin("teacher_gap"),
                "gradient_median": float(np.median(gradients)),
                "gradient_largest": float(gradients.max()),
                "by_steps": {
                    str(runs[0]["steps"]): numbers(runs) for runs in zip(*reports, strict=True)
                },
                "skipped": sum(log[-1]["health/skipped"] for log in logs),
            }
        )
    return lines


def draw(lines: list[dict], root: Path, path: Path) -> None:
    """Before distillation: tangent and gradient by time; in it: tangent by time, gradient by step."""
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    middles = (np.arange(BINS) + 0.5) / BINS * np.pi / 2
    for line in lines:
        colour = "tab:blue" if line["timestep_scale"] < 1 else "tab:red"
        style = dict(color=colour, linestyle="-" if line["qk_norm"] else "--", label=line["arm"])
        axes[0].plot(middles, line["before"]["size"], **style)
        axes[1].plot(middles, line["before"]["gradient"], **style)
        axes[2].plot(middles, line["tangent_norm"], **style)
        metrics = read_metrics(root / "students" / f"{line['arm']}-0" / "metrics.jsonl")
        axes[3].plot([m["step"] for m in metrics], [m["grad/student"] for m in metrics], **style)
    titles = (
        ("teacher_check: tangent / (sigma_d F)", "angle t"),
        ("teacher_check: gradient, unweighted", "angle t"),
        ("distillation: tangent norm", "angle t"),
        ("distillation: gradient norm", "step"),
    )
    for panel, (title, label) in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(label)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="data.dir of all runs (default: in the root)")
    parser.add_argument("--count", type=int, default=1000, help="prompts (default 1000)")
    flags = parser.parse_args(argv)
    make(flags.root, flags.seeds, flags.data or flags.root / "data", flags.count)
    lines = summarize(flags.root, flags.count)
    command = {"command": " ".join(["python benchmarks/ablation.py", *argv])}
    every = [command, losses_after_surgery(flags.root), *lines]
    write_lines(HERE / "results" / "ablation.jsonl", every)
    draw(lines, flags.root, HERE / "pictures" / "ablation.png")


if __name__ == "__main__":
    main(sys.argv[1:])
