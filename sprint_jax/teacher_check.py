"""Is a teacher ready to be distilled? Measures it on held-out latents, and says yes or no with reasons.

    python -m sprint_jax.teacher_check --model DIR --before PATH --out REPORT_DIR

--model and --before are workdirs, diffusers folders or hub ids. Where --model is no workdir, --config says
which data to take; --config.key=value changes keys of either. Measured are, by time: the flow loss, and of a
student at its start, which is this teacher as a TrigFlow model, the tangent and the gradient (the paper's
Fig. 3), the error of the tangent in bfloat16, and where the derivative is no guide to the next step; besides,
the losslessness of the TrigFlow transform, and samples in 20 steps.

Writes report.json, curves.png and samples.png. Exit code 0: ready; 4: not ready. What the limits are and why:
`teacher/verdict.py`.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .checkpoints.weights import Weights, find_weights
from .checkpoints.workdir import read_workdir_config
from .core import cli
from .core.config import Config, load_config
from .core.errors import UserError
from .core.files import without_nan, write_json_atomic
from .core.pixels import to_bytes
from .core.progress import Progress
from .core.sheet import Cell, draw_sheet
from .data import feed
from .models.sana import from_fields
from .parallel.sharding import Partition, batch_ways, state_shardings, to_devices
from .teacher.measure import Setting, measure
from .teacher.verdict import Check, judge
from .training import setup

NOT_READY = 4  # exit code
SHEET_ROWS = 8


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be measured."""
    overrides, rest = cli.split_overrides(argv)
    flags = _parser().parse_args(rest)
    c = _config(flags, overrides)
    out = Path(flags.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a directory")
    paths = {"after": flags.model} | ({"before": flags.before} if flags.before else {})
    found, pictures = check(c, paths, flags.count, flags.batch)
    checks = judge(found["after"], found.get("before"))
    ready = all(each.passed for each in checks)
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "model": flags.model,
        "before": flags.before,
        "ready": ready,
        "checks": [each._asdict() | {"passed": each.passed} for each in checks],
        "measured": found,
        "guidance": c.log.sample_guidance,
        "count": flags.count,
    }
    write_json_atomic(out / "report.json", without_nan(report))
    draw_curves(out / "curves.png", found)
    if pictures:
        draw_pictures(out / "samples.png", pictures)
    print_checks(checks)
    print(f"{flags.model} is {'ready' if ready else 'NOT ready'} to be distilled; see {out}")
    if not ready:
        sys.exit(NOT_READY)


def check(
    c: Config, paths: dict[str, str], count: int, batch_size: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measures teachers on the same held-out records.

    Args:
      c: config of the data, of sigma_d, guidance, shift and of the networks' dtype.
      paths: by name, for `weights.find_weights`.
      count: records; batch_size: so many at once.

    Returns:
      What `measure` finds, by name; and pictures, uint8 [B, H, W, 3], of held-out latents ('held out') and
      of each teacher's samples; none for data without an autoencoder.
    """
    sources = {name: _find_teacher(path) for name, path in paths.items()}
    mesh = setup.mesh_from(c)
    ways = batch_ways(mesh)
    batch_size = -(-batch_size // ways) * ways
    data = feed.open_data(c, mesh)
    held = data.held_out(max(1, count // batch_size) * batch_size)
    runtime = {key: c.model[key] for key in ("dtype", "remat", "scan")}
    runtime["partition"] = Partition(mesh) if mesh.size > 1 else None
    models = {name: from_fields(source.fields, **runtime) for name, source in sources.items()}
    for name, model in models.items():
        _check_width(paths[name], model, held)
    pieces = np.split(np.arange(len(held["latents"])), max(1, count // batch_size))
    setting = Setting(
        [to_devices(mesh, {key: a[rows] for key, a in held.items()}) for rows in pieces],
        jax.numpy.asarray(data.null_text),
        jax.numpy.asarray(data.null_mask),
        c.log.sample_guidance,
        c.sigma_d,
        c.flow.shift,
    )
    found, drawn = {}, {"held out": held["latents"][pieces[0]]}
    done = 0
    with Progress(setting.calls * len(paths)) as progress:

        def tick():
            nonlocal done
            done += 1
            progress.update(done)

        for name, weights in sources.items():
            params, _ = weights.load(lambda tree: state_shardings(mesh, tree))
            params.pop("logvar_linear", None)
            found[name], drawn[name] = measure(models[name], params, setting, tick)
    if data.decode is None:
        return found, {}
    return found, {
        name: to_bytes(np.asarray(data.decode(np.nan_to_num(latents[:SHEET_ROWS]))))
        for name, latents in drawn.items()
    }


def _find_teacher(path: str) -> Weights:
    weights = find_weights(path)
    if not weights.is_teacher:
        raise UserError(f"{path} is a student, which embeds guidance: name a teacher")
    return weights


def _check_width(path: str, model, held: dict[str, np.ndarray]) -> None:
    channels, features = held["latents"].shape[-1], held["text"].shape[-1]
    if (model.in_channels, model.caption_channels) != (channels, features):
        raise UserError(
            f"{path} takes latents of {model.in_channels} channels and text of {model.caption_channels}, but "
            f"the data has {channels} and {features}: name another --config",
            exit_code=2,
        )


def draw_curves(path: Path, found: dict[str, Any]) -> None:
    """Flow loss, tangent, gradient, bend and bfloat16 error by time, of every teacher, as a PNG."""
    # As in training/log.py: imported where it is needed, without pyplot's global state.
    from matplotlib.figure import Figure

    panels = {
        "flow loss (by flow time)": ("flow", "loss"),
        "tangent / (sigma_d F)": ("tangent", "size"),
        "gradient of sCM, unweighted": ("tangent", "gradient"),
        "jvp against difference": ("tangent", "bend"),
        "tangent error in bfloat16": ("tangent", "bfloat16"),
    }
    figure = Figure(figsize=(3.2 * len(panels), 3.0), layout="constrained")
    for axes, (title, (group, key)) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
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


def draw_pictures(path: Path, pictures: dict[str, np.ndarray]) -> None:
    """A column for held-out pictures and one for each teacher; a row's prompt is the same."""
    rows = zip(*pictures.values(), strict=True)
    draw_sheet([[Cell(image) for image in row] for row in rows], titles=list(pictures)).save(path)


def print_checks(checks: list[Check]) -> None:
    """One line for each check."""
    for each in checks:
        said = "ok" if each.passed else f"FAILED: {each.advice}"
        print(f"{each.name:9} {each.value:10.3g}  at most {each.limit:<7g} {each.what}: {said}")


def _config(flags: argparse.Namespace, overrides: list[str]) -> Config:
    if flags.count < 1 or flags.batch < 1:
        raise UserError("--count and --batch must be at least 1", exit_code=2)
    if flags.config:
        return load_config(flags.config, overrides)
    if (
        not (Path(flags.model) / "config.json").is_file()
        or not (Path(flags.model) / "checkpoints").is_dir()
    ):
        raise UserError(
            f"--model {flags.model} is not a workdir: say with --config which data to measure it on",
            exit_code=2,
        )
    return read_workdir_config(flags.model).override(overrides)


def _parser() -> cli.Parser:
    parser = cli.make_parser("teacher_check", __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="the teacher")
    add("--before", metavar="PATH", help="what it was made from, to compare with")
    add("--out", required=True, metavar="DIR", help="the report; made if missing")
    add("--config", metavar="FILE.py[:WORDS]", help="data and settings, if not those of --model")
    add("--count", type=int, default=128, metavar="N", help="held-out records (default 128)")
    add("--batch", type=int, default=32, metavar="N", help="records at once (default 32)")
    return parser


if __name__ == "__main__":
    cli.run_command(main)
