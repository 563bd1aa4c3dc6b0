"""results.csv and results.png of a sweep, best row first."""

import csv
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

from ..checkpoints.workdir import read_metrics
from ..core.files import write_atomic
from ..core.storage import AnyPath
from .rows import Row


class Ranking(NamedTuple):
    """The order of finished rows: by the mean of the last so many values of the first metric."""

    metrics: Sequence[str]  # names in metrics.jsonl
    goal: str = "min"  # or max
    last: int = 10


class Ranked(NamedTuple):
    """A row and its log: (steps, values) and score of each metric, last step, seconds of training."""

    row: Row
    curves: list[tuple[list[int], list[float]]]
    scores: list[float]  # nan where nothing finite was logged
    steps: int
    seconds: float

    @property
    def comparable(self) -> bool:
        """Whether it has a place: losses of runs of different lengths do not compare."""
        return self.row.status == "done" and math.isfinite(self.scores[0])


def rank(rows: Sequence[Row], ranking: Ranking) -> list[Ranked]:
    """Returns the finished rows from best to worst, then the others in the order of the sweep."""
    sign = 1 if ranking.goal == "min" else -1
    read = [_read(row, ranking) for row in rows]
    return sorted(read, key=lambda each: sign * each.scores[0] if each.comparable else math.inf)


def _read(row: Row, ranking: Ranking) -> Ranked:
    curves, scores, steps, seconds = [], [], 0, 0.0
    records = read_metrics(row.folder / "metrics.jsonl")
    for metric in ranking.metrics:
        logged = [each for each in records if metric in each]
        # null in the file is a number that was not finite
        values = [math.nan if each[metric] is None else each[metric] for each in logged]
        curves.append(([each["step"] for each in logged], values))
        last = values[-ranking.last :]
        scores.append(sum(last) / len(last) if last else math.nan)
    for record in records:
        seconds += record.get("time/step_seconds", 0.0) * (record["step"] - steps)
        steps = record["step"]
    return Ranked(row, curves, scores, steps, seconds)


def write_results(path: AnyPath, ranked: Sequence[Ranked], ranking: Ranking) -> None:
    """Writes a CSV file with a line for each row; a reader finds the old file or the new one, whole."""
    keys = sorted({key for each in ranked for key in each.row.overrides})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["rank", "run", *(f"config.{key}" for key in keys), "status", "exit_code", "error"]
    writer.writerow([*header, "steps", "seconds", *ranking.metrics, "workdir"])
    for place, (row, _, scores, steps, seconds) in enumerate(ranked, 1):
        line = [place if ranked[place - 1].comparable else "", row.name]
        line += [row.overrides.get(key, "") for key in keys]
        line += [row.status, row.exit_code, row.error, steps, f"{seconds:.1f}"]
        line += [f"{score:.6g}" if math.isfinite(score) else "" for score in scores]
        writer.writerow([*line, row.folder])
    write_atomic(path, text.getvalue().encode())


def draw(path: AnyPath, ranked: Sequence[Ranked], ranking: Ranking) -> None:
    """Draws for each metric the curves of all rows, and their scores with the best on top, as a PNG."""
    # Imported here since it takes a second; a Figure without pyplot has no global state.
    from matplotlib.figure import Figure

    count = len(ranking.metrics)
    figure = Figure((13, count * max(3.2, 1.4 + 0.28 * len(ranked))), layout="constrained")
    panels = figure.subplots(count, 2, squeeze=False, width_ratios=(3, 2))
    labels = [f"{each.row.name:.48} ({each.row.status})" for each in ranked]
    for index, (curves, bars) in enumerate(panels):
        for place, each in reversed(list(enumerate(ranked))):
            color = f"C{place}" if place < 10 else "0.75"  # matplotlib has ten colours
            curves.plot(*each.curves[index], color=color, linewidth=1 if place else 1.6)
            score = each.scores[index]
            if math.isfinite(score):
                bars.barh(place, score, color=color, alpha=1 if each.comparable else 0.35)
                bars.annotate(f" {score:.4g}", (score, place), va="center", fontsize=8)
        curves.set(title=ranking.metrics[index], xlabel="step (generator updates)")
        bars.set_title(f"mean of the last {ranking.last} values", fontsize=9)
        bars.set_yticks(range(len(ranked)), labels, fontsize=8)
        bars.set(ylim=(len(ranked) - 0.4, -0.6), xmargin=0.15)  # the first on top
        curves.grid(alpha=0.3)
    panels[0, 1].set_xlabel(f"{ranking.goal} is best, and on top")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_atomic(path, png.getvalue())
