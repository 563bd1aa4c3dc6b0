"""results.csv and results.png of a sweep, best row first."""

import csv
import difflib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.errors import UserError
from ..core.files import write_atomic
from .rows import Row
from .run import Result

RESULTS, PICTURE = "results.csv", "results.png"
CURVES = 10  # of the best rows that get a colour; the rest is grey


class Ranking(NamedTuple):
    """What "best" means.

    Attributes:
      metrics: names in metrics.jsonl; the first decides.
      goal: min or max.
      last: a row's score is the mean of its last so many logged values.
    """

    metrics: tuple[str, ...]
    goal: str = "min"
    last: int = 10


class Ranked(NamedTuple):
    """A row with its numbers. ``scores``: one per metric, None where nothing finite was logged."""

    row: Row
    result: Result
    steps: int
    scores: list[float | None]
    curves: list[tuple[list[int], list[float]]]


def rank(rows: Sequence[Row], results: dict[str, Result], ranking: Ranking) -> list[Ranked]:
    """Finished rows from best to worst; then the others, in the order of the sweep.

    A row that is not finished has no rank, since losses of different lengths do not compare, and a
    finished one without a score neither.
    """
    read = [_read(row, results[row.name], ranking) for row in rows]
    sign = 1 if ranking.goal == "min" else -1
    comparable = [each for each in read if each.result.status == "done" and _known(each)]
    rest = [each for each in read if not (each.result.status == "done" and _known(each))]
    return sorted(comparable, key=lambda each: sign * each.scores[0]) + rest


def _known(ranked: Ranked) -> bool:
    return ranked.scores[0] is not None


def _read(row: Row, result: Result, ranking: Ranking) -> Ranked:
    records = row.metrics()
    curves, scores = [], []
    for metric in ranking.metrics:
        logged = [(each["step"], each[metric]) for each in records if metric in each]
        # Null, in the file, is a number that was not finite: then the mean is not either.
        values = [math.nan if value is None else value for _, value in logged]
        curves.append(([step for step, _ in logged], values))
        score = sum(values[-ranking.last :]) / len(values[-ranking.last :]) if values else math.nan
        scores.append(score if math.isfinite(score) else None)
    return Ranked(row, result, records[-1]["step"] if records else 0, scores, curves)


def unknown_metrics(rows: Sequence[Row], ranking: Ranking) -> list[str]:
    """One line for each chosen metric that no row has logged although some have logged others."""
    known = {name for row in rows for record in row.metrics() for name in record} - {"step"}
    lines = []
    for metric in ranking.metrics:
        if known and metric not in known:
            nearest = difflib.get_close_matches(metric, sorted(known), n=1, cutoff=0.0)[0]
            lines.append(f"no row has logged {metric!r}, nearest is {nearest!r}")
    return lines


def write_results(workdir: Path, ranked: Sequence[Ranked], metrics: Sequence[str]) -> None:
    """Writes results.csv; a reader finds the old file or the new one, whole.

    Raises:
      UserError: when it cannot be written.
    """
    keys = sorted({key for each in ranked for key in each.row.overrides})
    header = ["rank", "run", *(f"config.{key}" for key in keys)]
    header += ["status", "exit_code", "error", "steps", "seconds", *metrics, "workdir"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for place, (row, result, steps, scores, _) in enumerate(ranked, 1):
        ordered = result.status == "done" and scores[0] is not None
        line = [place if ordered else "", row.name, *(row.overrides.get(key, "") for key in keys)]
        line += [result.status, "" if result.exit_code is None else result.exit_code]
        line += [result.error, steps, f"{result.seconds:.1f}"]
        line += ["" if score is None else f"{score:.6g}" for score in scores]
        writer.writerow([*line, row.folder])
    write_atomic(workdir / RESULTS, text.getvalue().encode())


def read_results(workdir: Path) -> dict[str, Result]:
    """What an earlier sweep noted, by run, all of it as waiting; empty where there was none.

    Raises:
      UserError: when results.csv is something else.
    """
    path = workdir / RESULTS
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {
                line["run"]: Result(
                    "waiting",
                    int(line["exit_code"]) if line["exit_code"] else None,
                    line["error"],
                    float(line["seconds"]),
                )
                for line in csv.DictReader(file)
            }
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is not what a sweep writes ({error!r}): move it away, the runs are kept"
        ) from error


def draw(workdir: Path, ranked: Sequence[Ranked], ranking: Ranking) -> bool:
    """Draws results.png: for each metric the curves of all rows, and their scores, best on top.

    Returns:
      Whether there was anything to draw.
    """
    # As in training/log.py: matplotlib takes a second, and a Figure without pyplot has no state.
    from matplotlib.figure import Figure

    drawn = [each for each in ranked if any(steps for steps, _ in each.curves)]
    if not drawn:
        return False
    count = len(ranking.metrics)
    height = max(3.2, 1.4 + 0.28 * len(drawn))
    figure = Figure(figsize=(13, height * count), layout="constrained")
    panels = figure.subplots(count, 2, squeeze=False, width_ratios=(3, 2))
    labels = short_labels([each.row for each in drawn])
    for index, metric in enumerate(ranking.metrics):
        curve, bars = panels[index]
        for place, each in reversed(list(enumerate(drawn))):
            color = f"C{place}" if place < CURVES else "0.75"
            steps, values = each.curves[index]
            curve.plot(steps, values, color=color, linewidth=1.6 if place == 0 else 1)
            score = each.scores[index]
            done = each.result.status == "done"
            if score is not None:
                bars.barh(place, score, color=color, alpha=1 if done else 0.35)
                bars.annotate(f" {score:.4g}", (score, place), va="center", fontsize=8, color="0.2")
        curve.set_title(metric)
        curve.set_xlabel("step (generator updates)")
        curve.grid(alpha=0.3)
        marks = [
            "" if each.result.status == "done" else f" ({each.result.status})" for each in drawn
        ]
        bars.set_yticks(range(len(drawn)), [a + b for a, b in zip(labels, marks, strict=True)])
        bars.set_ylim(len(drawn) - 0.4, -0.6)  # the first on top
        bars.tick_params(axis="y", labelsize=8)
        bars.margins(x=0.15)
        order = "lower is better" if ranking.goal == "min" else "higher is better"
        what = f"mean of the last {ranking.last} logged values"
        bars.set_title(f"{what}\n{order}, best on top" if index == 0 else what, fontsize=9)
        bars.set_axisbelow(True)
        bars.grid(alpha=0.3, axis="x")
    path = workdir / PICTURE
    temporary = path.with_name(f".{path.name}")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return True


def short_labels(rows: Sequence[Row]) -> list[str]:
    """Names of rows with the last part of each key, and without what all rows have in common."""
    keys = sorted({key for row in rows for key in row.overrides})
    if len(rows) > 1:
        absent = object()
        keys = [key for key in keys if len({row.overrides.get(key, absent) for row in rows}) > 1]
    last = {key: key.rpartition(".")[2] for key in keys}
    shown = {
        key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()
    }
    labels = []
    for row in rows:
        parts = [f"{shown[key]}={row.overrides[key]}" for key in keys if key in row.overrides]
        label = ", ".join(parts) or "as it stands"
        labels.append(label if len(label) <= 48 else f"{label[:45]}...")
    return labels
