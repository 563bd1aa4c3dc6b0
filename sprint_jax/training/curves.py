"""Curves of a run: every metric of a metrics.jsonl over steps, one panel for each group."""

import io
import math
from pathlib import Path

import numpy as np

from ..checkpoints.workdir import read_metrics
from ..core.files import write_atomic


def _panel(axes, group: str, series: dict[str, tuple[list[int], list[float]]]) -> None:
    """Draws the metrics of one group, long ones with their means over 50 windows."""
    everything = np.concatenate([values for _, values in series.values()])
    finite = everything[np.isfinite(everything)]
    if finite.size and finite.min() > 0 and finite.max() > 50 * finite.min():
        axes.set_yscale("log")
    for index, (name, (steps, values)) in enumerate(sorted(series.items())):
        style = dict(color=f"C{index % 10}", linestyle=("-", "--", ":", "-.")[index // 10 % 4])
        label = dict(label=name.removeprefix(f"{group}/"))
        window = len(values) // 50
        if window < 2:
            axes.plot(steps, values, **style, **label, marker=".", ms=3)
            continue
        axes.plot(steps, values, **style, alpha=0.25, linewidth=0.8)
        # A window with nothing finite stays a gap.
        whole = len(values) // window * window
        block = np.asarray(values[:whole]).reshape(-1, window)
        known = np.isfinite(block).sum(1)
        mean = np.where(known > 0, np.nansum(block, 1) / np.maximum(known, 1), np.nan)
        axes.plot(np.asarray(steps[:whole]).reshape(-1, window).mean(1), mean, **style, **label)
    axes.set(title=group, ylabel=group, xlabel="step (generator updates)")
    axes.grid(alpha=0.3)
    # Beside the panel: a dozen names would hide the lines.
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def draw_curves(metrics_path: str | Path, out_path: str | Path) -> bool:
    """Draws all metrics of a metrics.jsonl over steps into a PNG, one panel per group.

    Nulls (NaN) are gaps. A group of positive values that span more than a factor of 50 gets a logarithmic axis.

    Returns:
      Whether there was anything to draw.

    Raises:
      UserError: when the picture cannot be written.
    """
    # Imported here, since it takes a second. Figure without pyplot has no global state and renders with Agg.
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
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_atomic(Path(out_path), content.getvalue())
    return True
