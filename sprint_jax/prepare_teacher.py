"""Makes a teacher that can be distilled out of a SANA or SANA-1.5 checkpoint, or of a run of ours.

    python -m sprint_jax.prepare_teacher --config configs/teacher.py:1600m --model PATH --workdir DIR
    python -m sprint_jax.teacher_check --model DIR --before PATH --out REPORT_DIR

PATH is a diffusers folder (of a pipeline or a transformer), a hub id, a .pth file of NVlabs/Sana, or a workdir.
First comes surgery, by what the config's network has and PATH's has not: RMS norms of queries and keys, the
dense time embedding (``timestep_scale`` 0.001), and with --prune N the N most important blocks only. Its result
is the diffusers folder DIR/prepared, with prepared.json (what was done, and the hash of the source) and, after
pruning, importance.png. Then `train` fine-tunes from there in stage 'flow'; DIR is a workdir as any other, for
``--config.teacher=DIR``. The same line resumes, and does not operate twice.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from .checkpoints.weights import Weights, find_weights
from .core import cli
from .core.config import Config
from .core.errors import UserError
from .core.files import write_json_atomic
from .core.fingerprint import fingerprint
from .data import feed
from .interop.diffusers import save_transformer
from .models.sana import from_fields
from .parallel import distributed
from .parallel.sharding import state_shardings, to_devices
from .teacher import pruning, surgery
from .train import train
from .training import checks, setup
from .training.setup import PREPARED

RECORD = "prepared.json"
PROBE_BATCHES, PROBE_TIMES = 2, 8  # of the data, to measure the importance of blocks


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be prepared."""
    parser = _parser()
    flags, c = cli.parse_with_config(parser, argv)
    if c.stage != "flow":
        raise UserError(f"config.stage is '{c.stage}': a teacher is of stage 'flow'", exit_code=2)
    if c.init:
        raise UserError("leave out --config.init: --model says what to start from", exit_code=2)
    workdir = Path(flags.workdir)
    c = c.override({"init": str(workdir / PREPARED)})
    if flags.prune:
        c = c.override({"model.num_layers": flags.prune})
    with distributed.joined(flags) as peers:
        checks.check_values(c)
        checks.check_workdir(workdir, c)
        prepare(c, flags, workdir / PREPARED)
        if not flags.surgery_only:
            train(c, workdir, peers)


def prepare(c: Config, flags: argparse.Namespace, folder: Path) -> None:
    """Writes ``folder``, whole or not at all; one that the same words made is left as it is.

    Raises:
      UserError: the source does not fit, or the folder was made by other words.
    """
    options = {
        "model": str(Path(flags.model).resolve()) if Path(flags.model).exists() else flags.model,
        "prune": flags.prune,
        "protect": flags.protect,
        "keep_time_embedding": flags.keep_time_embedding,
        "timestep_scale": flags.timestep_scale,
    }
    if folder.is_dir():
        _check_same(folder, options)
        print(f"{folder} is there already; going on from it", flush=True)
        return
    if jax.process_count() > 1:
        raise UserError(
            f"{folder} is not there yet: make it in one process, with --surgery_only and without --distributed"
        )
    target = dict(c.model)
    source = find_weights(flags.model, target | {"timestep_scale": flags.timestep_scale})
    if not source.is_teacher:
        raise UserError(f"--model {flags.model} is a student: it embeds guidance")
    surgery.check_fits(flags.model, source.fields, target, flags.prune)
    mesh = setup.mesh_from(c)
    params, step = source.load(lambda tree: state_shardings(mesh, tree))
    params.pop("logvar_linear", None)
    record = {"options": options, "kind": source.kind, "step": step, "hash": fingerprint(params)}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fields, changes = source.fields, []
    if flags.prune and flags.prune < from_fields(fields).num_layers:
        fields, params, found = _prune(c, flags, source, params, mesh, partial)
        record |= found
        changes.append(f"blocks {', '.join(map(str, found['kept']))} kept")
    params, more = surgery.operate(fields, params, target, fit_time=not flags.keep_time_embedding)
    record["changes"] = changes + more
    save_transformer(partial, target, params)
    write_json_atomic(partial / RECORD, record)
    partial.replace(folder)
    print(f"{folder}: {'; '.join(record['changes']) or 'nothing to change'}", flush=True)


def _prune(c: Config, flags, source: Weights, params, mesh, folder: Path) -> tuple[Any, Any, dict]:
    """Fields and parameters of the most important blocks; importance and choice go into the record."""
    data = feed.open_data(c, mesh)
    batches = [to_devices(mesh, data.batches(i)) for i in range(PROBE_BATCHES)]
    print(f"measuring the importance of {from_fields(source.fields).num_layers} blocks", flush=True)
    model = from_fields(source.fields, dtype=c.model.dtype)
    importance = pruning.block_importance(model, params, batches, PROBE_TIMES)
    kept = pruning.choose_blocks(importance, flags.prune, flags.protect)
    pruning.draw_importance(folder / "importance.png", importance, kept)
    fields, params = pruning.prune_blocks(source.fields, params, kept)
    return fields, params, {"importance": importance.tolist(), "kept": list(kept)}


def _check_same(folder: Path, options: dict[str, Any]) -> None:
    path = folder / RECORD
    try:
        old = json.loads(path.read_text())["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): is {folder} of prepare_teacher? Use another --workdir"
        ) from error
    changed = [name for name in options if old.get(name) != options[name]]
    if changed:
        name = changed[0]
        raise UserError(
            f"{folder} was made with --{name} {old.get(name)}, not {options[name]}: use another --workdir"
        )


def _parser() -> cli.Parser:
    parser = cli.make_parser("prepare_teacher", __doc__)
    cli.add_config(parser)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="what to start from; see above")
    add("--workdir", required=True, metavar="DIR", help="made if missing; resumed if not")
    add("--prune", type=int, default=0, metavar="N", help="keep the N most important blocks")
    add("--protect", type=int, default=1, metavar="K", help="never prune the first and last K (1)")
    add(
        "--keep_time_embedding",
        action="store_true",
        help="as published: keep its weights where the time scale changes, instead of fitting new ones",
    )
    add(
        "--timestep_scale",
        type=float,
        default=1.0,
        metavar="S",
        help="of a .pth file, which does not say it: 1 for SANA and SANA-1.5 (default), 0.001 for a teacher"
        " of SANA-Sprint",
    )
    add("--surgery_only", action="store_true", help="write DIR/prepared and do not train")
    distributed.add_flags(parser)
    return parser


if __name__ == "__main__":
    cli.run_command(main)
