"""Curves of a run: every metric of a metrics.jsonl over steps, one panel for each group."""

import math
from pathlib import Path

import numpy as np

from ..checkpoints.workdir import read_metrics
from ..core.errors import UserError


def _panel(axes, group: str, series: dict[str, tuple[list[int], list[float]]]) -> None:
    """Draws the metrics of one group; a moving average over the noise of long series."""
    everything = np.concatenate([values for _, values in series.values()])
    finite = everything[np.isfinite(everything)]
    if finite.size and finite.min() > 0 and finite.max() > 50 * finite.min():
        axes.set_yscale("log")
    for index, (name, (steps, values)) in enumerate(sorted(series.items())):
        color = f"C{index % 10}"
        dash = ("-", "--", ":", "-.")[index // 10 % 4]
        label = name.removeprefix(f"{group}/")
        window = len(values) // 50
        if window < 2:
            axes.plot(steps, values, color=color, linestyle=dash, label=label, marker=".", ms=3)
            continue
        axes.plot(steps, values, color=color, linestyle=dash, alpha=0.25, linewidth=0.8)
        # Means over whole windows; a window with nothing finite stays a gap.
        rows = len(values) // window
        block = np.asarray(values[: rows * window]).reshape(rows, window)
        known = np.isfinite(block).sum(1)
        mean = np.where(known > 0, np.nansum(block, 1) / np.maximum(known, 1), np.nan)
        centers = np.asarray(steps[: rows * window]).reshape(rows, window).mean(1)
        axes.plot(centers, mean, color=color, linestyle=dash, label=label)
    axes.set_title(group)
    axes.set_xlabel("step (generator updates)")
    axes.set_ylabel(group)
    axes.grid(alpha=0.3)
    # Beside the panel: a dozen names would hide the lines.
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def draw_curves(metrics_path: str | Path, out_path: str | Path) -> bool:
    """Draws all metrics of a metrics.jsonl over steps into a PNG, one panel per group.

    Nulls (NaN) are gaps; a group whose values are positive and span more than a factor of 50 gets a
    logarithmic axis.

    Returns:
      Whether there was anything to draw.
    """
    # Imported here because it takes a second that a short command need not pay. Figure without
    # pyplot has no global state and renders with Agg.
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in read_metrics(metrics_path):
        for name, value in record.items():
            if name == "step" or not (value is None or isinstance(value, int | float)):
                continue
            group = name.split("/")[0] if "/" in name else "other"
            steps, values = groups.setdefault(group, {}).setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(math.nan if value is None else float(value))
    if not groups:
        return False
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(7.5 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (group, series) in zip(panels, sorted(groups.items()), strict=False):
        _panel(axes, group, series)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    out_path = Path(out_path)
    temporary = out_path.with_name(f".{out_path.name}")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(out_path)
    except OSError as error:
        raise UserError(f"cannot write {out_path}: {error.strerror}") from error
    return True
