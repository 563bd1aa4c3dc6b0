"""The paper's ablations asked again on digits: what holds, by differences between students of one seed.

    python benchmarks/claims.py --runs runs/paper --teacher runs/small-teacher --ablation runs/ablation

The students are those of `configs/methods.py`, sweep ``paper``, each evaluated once, and those of
benchmarks/ablation.py. A claim says that one arm is better than another in some numbers of steps. It is
confirmed where the mean of the differences, seed by seed, lies on its side by more than the 97.5 % quantile of
Student's t times its standard error, contradicted where on the other side, and else not seen. Of verdicts where
nothing is to be seen, 5 % are false. Writes benchmarks/results/claims.jsonl and benchmarks/pictures/claims.png,
and says what is there before all seeds are.
"""

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sprint_jax.benchmarking.scripts import (
    digits_report,
    evaluated_students,
    finished_runs,
    finite,
    numbers,
    spread,
    students_parser,
    write_lines,
)
from sprint_jax.digits.report import number

HERE = Path(__file__).parent
STEPS = (1, 2, 4)
# Of measures, which way is better. The paper's own is FID.
MEASURES = {"accuracy": 1, "frechet": -1, "kid": -1, "diversity": 1}
# (where the paper says it, what it says, the better arm, the other)
CLAIMS = (
    ("Table 3", "sCM and LADD are better than sCM alone (FID 8.11, 8.93)", "both", "scm_alone"),
    ("Table 3", "sCM and LADD are better than LADD alone (8.11, 12.20)", "both", "ladd_alone"),
    ("Table 3", "sCM alone is better than LADD alone (8.93, 12.20)", "scm_alone", "ladd_alone"),
    ("Table 4", "a student that is told the guidance is better (8.72, 9.23)", "both", "untold"),
    ("Table 5", "LADD's weight 0.5 is better than 1 (8.43, 8.81)", "both", "ladd_whole"),
    ("Table 5", "LADD's weight 0.5 is better than 0.1 (8.43, 8.90)", "both", "ladd_tenth"),
    ("Table 6", "half of the fakes from pure noise are better than none (8.32, 9.44)", "both", "pure_0"),
    ("Table 6", "70 % from pure noise are better than half (8.11, 8.32)", "pure_70", "both"),
    ("Fig. 3", "a teacher of times 0..1 is better than one of 0..1000", "dense_qk", "t1000_qk"),
    ("Fig. 3", "a teacher with QK norm is better", "dense_qk", "dense_noqk"),
)  # fmt: skip
# 97.5 % quantiles of Student's t by degrees of freedom.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
COLOURS = {"confirmed": "tab:green", "contradicted": "tab:red", "not seen": "0.5", "unknown": "0.8"}
TICKS = (-20, -5, -2, 0, 2, 5, 20, 80)


def compare(better: dict[int, list], other: dict[int, list], steps: int) -> dict[str, Any]:
    """Differences of two arms in every measure, over the seeds that both have it of; positive is better.

    Args:
      better, other: {seed: runs of a report}.
    """
    seeds, found = sorted(better.keys() & other.keys()), {}
    for measure, sign in MEASURES.items():
        pairs = [[at(arm[seed], steps, measure) for arm in (better, other)] for seed in seeds]
        mean, error, count = spread([sign * (a - b) for a, b in pairs if finite(a) and finite(b)])
        found[measure] = {"mean": mean, "standard_error": error, "seeds": count}
        found[measure]["verdict"] = judge(mean, error, count)
    return {"seeds": len(seeds)} | found


def at(runs: list[dict], steps: int, measure: str) -> float:
    """A number of the run in so many steps."""
    return number(next(run for run in runs if run["steps"] == steps), measure)[0]


def judge(mean: float | None, error: float | None, seeds: int) -> str:
    """Confirmed, contradicted or not seen; unknown of less than two seeds."""
    if error is None:
        return "unknown"
    if abs(mean) <= limit(error, seeds):
        return "not seen"
    return "confirmed" if mean > 0 else "contradicted"


def limit(error: float, seeds: int) -> float:
    """Half of the 95 % interval of a mean over so many seeds."""
    return QUANTILES[max(1, min(seeds - 1, max(QUANTILES)))] * error


def teacher_line(runs: list[dict]) -> dict[str, Any]:
    """Table 1: the teacher by Euler's method as a flow and as TrigFlow, on the same noise; and in 20 steps."""
    by_name = {run["name"]: run for run in runs}
    line = {"what": "teacher"}
    for name in ("teacher 20", "flow Euler 50", "TrigFlow Euler 50"):
        line[name] = {key: number(by_name[name], key) for key in ("accuracy", "frechet")}
        line[name]["pictures"] = by_name[name]["accuracy"]["overall"]["count"]
    return line


def draw(path: Path, claims: list[dict[str, Any]]) -> None:
    """Draws differences in accuracy and their intervals: a row for each claim, a panel for each step count."""
    figure = Figure(figsize=(13, 0.35 * len(CLAIMS) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(STEPS), sharey=True)
    for steps, panel in zip(STEPS, panels, strict=True):
        rows = [claim for claim in claims if claim["steps"] == steps]
        for place, claim in enumerate(rows):
            value = claim["accuracy"]
            if value["mean"] is None:
                continue
            error = 100 * limit(value["standard_error"] or 0.0, value["seeds"])
            how = dict(fmt="o", color=COLOURS[value["verdict"]], capsize=3)
            panel.errorbar(100 * value["mean"], -place, xerr=error, **how)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set_title(f"{steps} step{'s' * (steps > 1)}", fontsize=9)
        panel.set_xlabel("points of accuracy better, 95 % interval", fontsize=8)
        panel.set_xscale("symlog", linthresh=5)
        panel.set_xticks(TICKS, [str(tick) for tick in TICKS], fontsize=7)
        panel.set_yticks([-place for place in range(len(rows))])
        panel.set_yticklabels(["{source}: {claim}".format(**claim) for claim in rows], fontsize=7)
    marks = [Line2D([], [], marker="o", ls="", color=each) for each in COLOURS.values()]
    figure.legend(marks, COLOURS, loc="outside lower left", ncols=len(COLOURS), fontsize=7)
    figure.savefig(path, dpi=80)


def main(argv: list[str]) -> None:
    parser = students_parser(__doc__)
    parser.add_argument("--ablation", type=Path, help="the --root of benchmarks/ablation.py")
    flags = parser.parse_args(argv)
    students = finished_runs(flags.runs)
    students |= evaluated_students(flags.ablation, flags.count) if flags.ablation else {}
    arms = {
        arm: {seed: digits_report(folder, flags.count)["runs"] for seed, folder in folders.items()}
        for arm, folders in students.items()
    }
    lines = [{"command": "python benchmarks/claims.py " + " ".join(argv)}]
    lines += [teacher_line(digits_report(flags.teacher, flags.count)["runs"])]
    for arm, reports in arms.items():
        steps = {
            str(runs[0]["steps"]): numbers(runs) for runs in zip(*reports.values(), strict=True)
        }
        lines.append({"arm": arm, "seeds": len(reports), "by_steps": steps})
    claims = [
        {"claim": claim, "source": source, "better": a, "other": b, "steps": n} | compare(arms[a], arms[b], n)
        for source, claim, a, b in CLAIMS
        if arms.get(a, {}).keys() & arms.get(b, {}).keys()
        for n in STEPS
    ]  # fmt: skip
    for claim in claims:
        print("{source}, {steps} steps: {claim}: {accuracy[verdict]}".format(**claim))
    write_lines(HERE / "results" / "claims.jsonl", [*lines, *claims])
    draw(HERE / "pictures" / "claims.png", claims)


if __name__ == "__main__":
    main(sys.argv[1:])
