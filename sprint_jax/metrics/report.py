"""Reports: numbers, errors and protocol, as JSON, Markdown and one HTML page that opens from disk."""

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..core.errors import UserError
from ..core.files import read_json, without_nan, write_atomic, write_json_atomic
from ..core.sheet import Cell, draw_sheet
from ..core.storage import AnyPath
from .protocols import check_same

SAMPLES = 24  # pictures on the page
SIDE = 192  # pixels of each

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #bbb; padding: .2em .6em; text-align: left
}} pre {{ background: #f4f4f4; padding: .8em; overflow-x: auto }} img {{ max-width: 100% }}</style>
<h1>{title}</h1> <p><code>{command}</code></p> {table} {pictures} <h2>Protocol</h2> <pre>{protocol}</pre>
</html>
"""


def rows_of(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the numbers of a report as (name, dict of value and standard_error), parts on their own."""
    rows = []
    for name, number in report["metrics"].items():
        parts = number.get("parts")
        rows += (
            [(f"{name}/{part}", each) for part, each in parts.items()]
            if parts
            else [(name, number)]
        )
    return rows


def note(report: dict[str, Any]) -> str:
    """Returns a sentence on GenEval's tasks without pictures, or none."""
    missing = report["metrics"].get("geneval", {}).get("missing")
    return (
        f"geneval/overall is without {', '.join(missing)}: no results of them." if missing else ""
    )


def title(name: str, report: dict[str, Any]) -> str:
    """Returns a report's name, and what its model drew with in place of its own autoencoder and weights."""
    model = report.get("model") or {}
    name += f", decoded by {model['autoencoder']}" if model.get("autoencoder") else ""
    return f"{name}, weights in eight bits" if model.get("int8") else name


def show(number: dict[str, Any] | None) -> str:
    """Returns a number with its error, to as many digits as the error allows, such as ``6.53 ± 0.12``."""
    value = (number or {}).get("value")
    if value is None or not np.isfinite(value):
        return "-"
    error = number.get("standard_error")
    if error is None or not np.isfinite(error) or error <= 0:
        return f"{value:.6g}"
    digits = min(max(1 - int(np.floor(np.log10(error))), 0), 9)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Returns a Markdown table, a report in each row.

    Raises:
      UserError: their protocols differ (`protocols.check_same`).
    """
    check_same(reports)
    rows = {name: dict(rows_of(report)) for name, report in reports.items()}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, row in rows.items():
        lines.append([title(name, reports[name]), *(show(row.get(column)) for column in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def compare(paths: Sequence[AnyPath]) -> str:
    """Returns the common table of reports on disk; raises UserError for a damaged one or another protocol."""
    reports = {str(path): read_json(path) for path in paths}
    for path, report in reports.items():
        if not isinstance(report.get("protocol"), dict) or not isinstance(
            report.get("metrics"), dict
        ):
            raise UserError(f"{path} is no report of evaluate with a protocol")
    return table(reports)


def markdown(report: dict[str, Any]) -> str:
    """Returns a report as a page of Markdown."""
    lines = "".join(f"| {name} | {show(number)} |\n" for name, number in rows_of(report))
    lines += f"\n{note(report)}\n" if note(report) else ""
    protocol = json.dumps(report["protocol"], indent=2)
    return (
        f"# {title(report['pictures']['path'], report)}\n\n```\n{report['command']}\n```\n\n"
        f"| metric | value ± standard error |\n|---|---|\n{lines}\n## Protocol\n\n```json\n{protocol}\n```\n"
    )


def write(
    out: AnyPath, report: dict[str, Any], samples: Sequence[Image.Image], captions: Sequence[str]
) -> None:
    """Writes ``out`` (.json), and .md and .html beside it.

    Args:
      samples: a few pictures; captions: theirs, or empty ones.
    """
    report = without_nan(report)
    write_atomic(out.with_suffix(".md"), markdown(report).encode())
    write_atomic(out.with_suffix(".html"), page(report, samples, captions).encode())
    write_json_atomic(out, report)  # last: it makes the others count


def page(report: dict[str, Any], samples: Sequence[Image.Image], captions: Sequence[str]) -> str:
    """Returns the page: numbers, curves, samples and protocol, with all pictures inside."""
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(show(number))}</td></tr>"
        for name, number in rows_of(report)
    )
    images = [_curve(*each) for each in _curves(report["metrics"])]
    if samples:
        small = [np.asarray(_square(picture)) for picture in samples[:SAMPLES]]
        row = [Cell(x, caption) for x, caption in zip(small, captions, strict=False)]
        images.append(draw_sheet([row[start : start + 6] for start in range(0, len(row), 6)]))
    return _PAGE.format(
        title=html.escape(title(report["pictures"]["path"], report)),
        command=html.escape(report["command"]),
        table=f"<table><tr><th>metric</th><th>value ± standard error</th></tr>{cells}</table>"
        f"<p>{html.escape(note(report))}</p>",
        pictures="\n".join(f'<p><img alt="" src="{_inside(image)}"></p>' for image in images),
        protocol=html.escape(json.dumps(report["protocol"], indent=2)),
    )


def _square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    picture = picture.crop((left, top, left + side, top + side))
    return picture if side <= SIDE else picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def _inside(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _curves(metrics: dict[str, Any]):
    """Yields the name, axis and points of what is drawn, and whether as bars."""
    if curve := metrics.get("fid_infinity", {}).get("curve"):
        points = [1 / size for size in curve["sizes"]], curve["distances"]
        yield (
            "Frechet distance of subsets",
            "1 / pictures",
            *points,
            metrics["fid_infinity"]["value"],
        )
    if bars := metrics.get("clip", {}).get("histogram"):
        middles = np.add(bars["edges"][:-1], bars["edges"][1:]) / 2
        yield "CLIP scores", "score", middles.tolist(), bars["counts"], None


def _curve(
    title: str, axis: str, x: list[float], y: list[float], limit: float | None
) -> Image.Image:
    from matplotlib.figure import Figure  # here, since it takes a second

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    if limit is None:
        axes.bar(x, y, width=(x[-1] - x[0]) / len(x) or 1)
    else:
        axes.plot(x, y, "o")
        axes.axline((0, limit), slope=(np.mean(y) - limit) / np.mean(x), color="C1")
        axes.set_xlim(left=0)
    axes.set(title=title, xlabel=axis)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return Image.open(content)
