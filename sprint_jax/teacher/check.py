"""The check of a teacher: its measurements on held-out records, the verdict, and the report of both."""

import itertools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..checkpoints.weights import Weights, find_weights
from ..core.config import Config
from ..core.errors import UserError
from ..core.files import without_nan, write_json_atomic
from ..core.progress import Progress
from ..core.sheet import Cell, draw_sheet
from ..data import feed
from ..models.sana import SanaTransformer, from_fields
from ..parallel.sharding import Partition, batch_ways, state_shardings, to_devices
from ..training import setup
from .measure import Setting, measure
from .verdict import Check, judge

SHEET_ROWS = 8
PANELS = {
    "flow loss (by flow time)": ("flow", "loss"),
    "tangent / (sigma_d F)": ("tangent", "size"),
    "gradient of sCM, unweighted": ("tangent", "gradient"),
    "jvp against difference": ("tangent", "bend"),
    "tangent error in bfloat16": ("tangent", "bfloat16"),
}


def check_teacher(
    c: Config, model: str, before: str | None, out: Path, count: int, batch_size: int
) -> list[Check]:
    """Measures and judges a teacher; writes report.json, curves.png and samples.png.

    Args:
      c: config of the data, of sigma_d, guidance, shift and of the networks' dtype.
      model, before: paths of the teacher and of what it was made from, for `weights.find_weights`.
      out: folder of the report, made if missing; samples.png needs data with an autoencoder.
      count: held-out records; batch_size: so many at once, rounded up to what the devices share.

    Raises:
      UserError: for a student, or networks that do not fit the data; nothing is written.
    """
    paths = {"after": model} | ({"before": before} if before else {})
    found, pictures = _measure_all(c, paths, count, batch_size)
    checks = judge(found["after"], found.get("before"))
    report = {
        "model": model,
        "before": before,
        "ready": all(each.passed for each in checks),
        "checks": [each._asdict() | {"passed": each.passed} for each in checks],
        "measured": found,
        "guidance": c.log.sample_guidance,
        "count": count,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "report.json", without_nan(report))
    _draw_curves(out / "curves.png", found)
    if pictures:  # a column for held-out pictures and one for each teacher, a row for each prompt
        rows = [[Cell(image) for image in row] for row in zip(*pictures.values(), strict=True)]
        draw_sheet(rows, titles=list(pictures)).save(out / "samples.png")
    return checks


def _measure_all(
    c: Config, paths: dict[str, str], count: int, batch_size: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measures teachers on the same records.

    Returns:
      The numbers of `measure`, by name; and pictures, uint8 [B, H, W, 3], of held-out latents ('held out') and
      of each teacher's samples; none for data without an autoencoder.
    """
    sources = {name: _find_teacher(path) for name, path in paths.items()}
    mesh = setup.mesh_from(c)
    ways = batch_ways(mesh)
    batch_size = -(-batch_size // ways) * ways
    batches = max(1, count // batch_size)
    data = feed.open_data(c, mesh)
    held = data.held_out(batches * batch_size)
    runtime = {key: c.model[key] for key in ("dtype", "remat", "scan")}
    runtime["partition"] = Partition(mesh) if mesh.size > 1 else None
    models = {name: from_fields(source.fields, **runtime) for name, source in sources.items()}
    for name, model in models.items():
        _check_width(paths[name], model, held)
    pieces = np.split(np.arange(len(held["latents"])), batches)
    setting = Setting(
        [to_devices(mesh, {key: a[rows] for key, a in held.items()}) for rows in pieces],
        jnp.asarray(data.null_text),
        None if c.data.null_mask == "caption" else jnp.asarray(data.null_mask),
        c.log.sample_guidance,
        c.sigma_d,
        c.flow.shift,
    )
    found, drawn = {}, {"held out": held["latents"][pieces[0]]}
    with Progress(setting.calls * len(paths)) as progress:
        ticks = itertools.count(1)
        for name, weights in sources.items():
            params, _ = weights.load(lambda tree: state_shardings(mesh, tree))
            params.pop("logvar_linear", None)
            found[name], drawn[name] = measure(
                models[name], params, setting, lambda: progress.update(next(ticks))
            )
    if data.decode is None:
        return found, {}
    shown = {name: np.nan_to_num(latents[:SHEET_ROWS]) for name, latents in drawn.items()}
    return found, {name: data.decode(x) for name, x in shown.items()}


def _find_teacher(path: str) -> Weights:
    weights = find_weights(path)
    if not weights.is_teacher:
        raise UserError(f"{path} is a student, which embeds guidance: name a teacher")
    return weights


def _check_width(path: str, model: SanaTransformer, held: dict[str, np.ndarray]) -> None:
    channels, features = held["latents"].shape[-1], held["text"].shape[-1]
    if (model.in_channels, model.caption_channels) != (channels, features):
        raise UserError(
            f"{path} takes latents of {model.in_channels} channels and text of {model.caption_channels}, but "
            f"the data has {channels} and {features}: name another --config",
            exit_code=2,
        )


def _draw_curves(path: Path, found: dict[str, Any]) -> None:
    """Draws every teacher's numbers of `PANELS` by time, as a PNG."""
    # Imported here since it takes a second; a Figure without pyplot has no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(PANELS), 3.0), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, (title, (group, key)) in zip(panels, PANELS.items(), strict=True):
        for name, numbers in found.items():
            values = [x if math.isfinite(x) else math.nan for x in numbers[group][key]]
            axes.plot((np.arange(len(values)) + 0.5) / len(values), values, marker=".", label=name)
            if all(x > 0 for x in values):
                axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("time, of its range")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=90)
