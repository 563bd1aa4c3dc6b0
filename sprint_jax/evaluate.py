"""Measures pictures: any folder of them, those that a model draws, and models of the digits world.

    python -m sprint_jax.evaluate --pictures DIR --reference DIR --metrics fid,kid,prdc --protocol clean-fid \
        --inception pt_inception-2015-12-05-6726825d.pth --out report.json
    python -m sprint_jax.evaluate --model MODEL --prompts meta_data.json --reference imgs --metrics fid,clip \
        --protocol sana --inception FILE --steps 2 --out report.json
    python -m sprint_jax.evaluate --compare a.json b.json
    python -m sprint_jax.evaluate --model runs/student --teacher runs/teacher --out report.json

Every number is written with its standard error and the protocol that it depends on, to report.json, .md and
.html. The same line goes on after an interruption: features, and pictures that a model draws, are kept in
--cache. Several processes with --distributed share one such folder.

Without --metrics a model of the digits world is judged: a teacher in 20 steps of DPM-Solver++ with guidance,
and for comparison by Euler's method; a student in 1, 2, 3 and 4 steps. Prompts are held out, and the same for
all; picture i starts from the same noise everywhere. A network with a control branch is also given sketches,
right, shuffled and empty ones at scales 0, 0.5 and 1. report.png shows pictures.
"""

import argparse
import shlex
from typing import Any

import jax
import jax.numpy as jnp

from .checkpoints.workdir import read_workdir_config
from .core import cli
from .core.errors import UserError
from .core.files import check_writable
from .core.fingerprint import digest, fingerprint
from .core.ranges import COUNT, GUIDANCE, MODEL, SEED
from .core.schema import check, optional, whole
from .core.storage import AnyPath, as_path, in_bucket
from .digits.evaluation import SHEET_SIZE, judge_models
from .digits.worlds import get_world
from .encoders.load import identify
from .metrics import drawing, evaluation
from .metrics.geneval_prompts import make_prompts
from .metrics.measures import NEEDS
from .metrics.networks import Places
from .metrics.pictures import first_prompts, read_prompts
from .metrics.protocols import PROTOCOLS
from .metrics.report import compare, markdown
from .parallel import distributed
from .pipeline import Request, SprintPipeline

# What a pipeline's pictures depend on beside its weights, its encoders and the request.
SAMPLING = ("is_student", "sigma_d", "shift", "midpoint", "integer_times")
# Fields of a network on which its pictures depend; the others say how it is computed, or are of training.
NETWORK = sorted(MODEL.keys() - {"dtype", "logvar", "remat", "scan"})

# Flags that are of no use: with --metrics digits, and otherwise with --pictures or --model.
DRAWING = ("steps", "size", "images_per_prompt", "autoencoder")
UNUSED = {
    "digits": (*DRAWING, "prompts", "reference", "inception", "boxes", "cache"),
    "pictures": (*DRAWING, "guidance", "teacher", "int8"),
    "model": ("teacher",),
}


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be measured."""
    flags = _parser().parse_args(argv)
    command = "python -m sprint_jax.evaluate " + shlex.join(argv)
    if flags.compare:
        print(compare([as_path(name) for name in flags.compare]), end="")
        return
    out = _check(flags)
    cli.use_compilation_cache()
    if flags.metrics == "digits":
        _judge_digits(flags, out, command)
        return
    with distributed.joined(flags) as peers:
        _measure_pictures(flags, out, command, peers)


def _measure_pictures(flags: argparse.Namespace, out: AnyPath, command: str, peers) -> None:
    cache = as_path(flags.cache) if flags.cache else out.with_suffix(".cache")
    check_writable(cache, "--cache")
    # A model draws the first prompts; of a folder the first pictures are taken, whose prompts all of it tells.
    first = flags.count if flags.model else None
    requests = make_prompts()[:first] if flags.prompts == "geneval" else None
    prompts = requests and [request["prompt"] for request in requests]
    if flags.prompts and not prompts:
        prompts = first_prompts(read_prompts(as_path(flags.prompts)), first)
    protocol = PROTOCOLS[flags.protocol]
    if flags.pictures:  # whoever drew them
        protocol = protocol._replace(format=None)
    elif requests:  # GenEval's scripts look for NUMBER.png alone
        protocol = protocol._replace(format="png")
    pictures = as_path(flags.pictures) if flags.pictures else cache / "pictures"
    places = {name: getattr(flags, name) for name in Places._fields if getattr(flags, name)}
    job = evaluation.Job(
        pictures=pictures,
        reference=as_path(flags.reference) if flags.reference else None,
        metrics=[name for name in flags.metrics.split(",") if name != "none"],
        protocol=protocol,
        places=Places(**places),
        cache=cache,
        prompts=prompts,
        boxes=as_path(flags.boxes) if flags.boxes else None,
        count=None if flags.model else flags.count,
        batch=flags.batch or 32,
        command=command,
    )
    evaluation.check_job(job)
    about = _draw(flags, job, requests, peers) if flags.model else {}
    report = evaluation.evaluate(job, out, peers, about)
    if jax.process_index() == 0:
        print(markdown(report), end="")
        print(f"numbers: {out}, and .md and .html beside it")


def _draw(flags: argparse.Namespace, job: evaluation.Job, requests, peers) -> dict[str, Any]:
    """Draws the pictures of a model that are not there yet; returns what the report says about it."""
    if job.prompts is None:
        raise UserError("--model needs --prompts FILE, or --prompts geneval", exit_code=2)
    dtype = None if jax.default_backend() != "cpu" else jnp.float32
    how = dict(params=flags.params, autoencoder=flags.autoencoder, int8=bool(flags.int8))
    pipe = SprintPipeline.from_pretrained(flags.model, dtype, **how)
    height, width = cli.parse_size(flags.size) if flags.size else pipe.size
    base = Request(
        steps=pipe.check_steps(flags.steps),
        guidance=pipe.guidance if flags.guidance is None else flags.guidance,
        seed=flags.seed,
        height=height,
        width=width,
        batch_size=flags.batch or 32,
    )
    about = {"model": {"path": flags.model, "step": pipe.meta.get("step"), "params": flags.params}}
    about["model"] |= {key: getattr(pipe, key) for key in SAMPLING}
    about["model"] |= {
        "weights": fingerprint(pipe.params),
        "dtype": jnp.dtype(pipe.model.dtype).name,
        "network": {key: getattr(pipe.model, key) for key in NETWORK},
    }
    # By name as well: pictures of a smaller decoder are not to be taken for those of the network's own.
    about["model"] |= {"autoencoder": flags.autoencoder} if flags.autoencoder else {}
    about["model"] |= {"int8": True} if flags.int8 else {}
    about["model"]["encoders"] = digest(identify(pipe.autoencoder, pipe.text_encoder))
    each = flags.images_per_prompt or (4 if requests else 1)
    plan = (
        drawing.plan_geneval(requests, each)
        if requests
        else drawing.plan_prompts(job.prompts, each)
    )
    if requests and jax.process_index() == 0:
        drawing.write_geneval_metadata(job.pictures, requests)
    drawing.draw(plan, job.pictures, pipe, base, job.protocol.format, about, peers)
    return about | {"request": drawing.options(base)}


def _judge_digits(flags: argparse.Namespace, out: AnyPath, command: str) -> None:
    world = _world(flags)
    student, teacher = _pipelines(flags)
    first = student or teacher
    guidance = first.guidance if flags.guidance is None else flags.guidance
    base = Request(guidance=guidance, seed=flags.seed, batch_size=flags.batch or 250)
    about = {
        "command": command,
        "model": _origin(flags.model, first, flags.params),
        "teacher": _origin(flags.teacher, teacher, "ema") if flags.teacher else None,
    }
    judge_models(out, world, student, teacher, base, flags.count or 1000, about)


def _parser() -> cli.Parser:
    parser = cli.make_parser("evaluate", __doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a workdir, a diffusers folder or a hub id, which draws")
    add("--teacher", metavar="DIR", help="digits: workdir to compare a student with")
    add("--pictures", metavar="DIR", help="a folder of pictures, instead of a model")
    add("--reference", metavar="PATH", help="a folder of real pictures, or a .npz of mu and sigma")
    add("--metrics", default="digits", metavar="LIST", help=f"digits, or of {', '.join(NEEDS)}")
    add("--protocol", choices=PROTOCOLS, default="sana", help="whose choices (default sana)")
    prompts = "lines of text, MJHQ's meta_data.json, or the word geneval"
    add("--prompts", metavar="FILE", help=prompts)
    add("--inception", metavar="FILE", help="weights of pytorch-fid's Inception-v3")
    for name, what in (("clip", "CLIP"), ("clip336", "the CLIP of cmmd"), ("dinov2", "DINOv2")):
        usual = Places._field_defaults[name]
        add(f"--{name}", metavar="PATH", help=f"weights of {what}, or a hub id ({usual})")
    add("--boxes", metavar="FILE", help="results.jsonl of GenEval's detector")
    add("--out", metavar="FILE.json", help="the report")
    add("--cache", metavar="DIR", help="of features and drawn pictures (default: beside --out)")
    add("--compare", nargs="+", metavar="REPORT", help="print a common table of reports, no more")
    add(
        "--count", type=int, metavar="N", help="first prompts drawn, or pictures (all); digits 1000"
    )
    add("--batch", type=int, metavar="N", help="pictures at once (default 32; digits 250)")
    add("--steps", type=int, metavar="N", help="of --model (default: as sample)")
    add("--guidance", type=float, metavar="G", help="CFG scale (default: as in training)")
    add("--size", metavar="HxW", help="of drawn pictures, in pixels (default: as in training)")
    add(
        "--int8",
        action="store_true",
        default=None,
        help="draw with weights in eight bits (extra int8)",
    )
    add("--autoencoder", metavar="DIR", help="another one for the same latents, e.g. DC-AE-Lite")
    add("--images-per-prompt", type=int, metavar="N", help="drawn (default 1; geneval 4)")
    add("--seed", type=int, default=0, metavar="S", help="of prompts and noise (default 0)")
    weights = "which weights of --model (default ema)"
    add("--params", choices=("ema", "raw"), default="ema", help=weights)
    distributed.add_flags(parser)
    return parser


def _check(flags: argparse.Namespace) -> AnyPath:
    """The path of the report, once everything that needs no network is known to be in order."""
    if flags.out is None:
        raise UserError("--out FILE.json is missing", exit_code=2)
    digits = flags.metrics == "digits"
    if digits and flags.distributed:
        raise UserError("--metrics digits is for one process: leave out --distributed", exit_code=2)
    if (flags.model is None) == (flags.pictures is None) or (digits and flags.model is None):
        raise UserError(f"give --model DIR{'' if digits else ' or --pictures DIR, one of them'}", 2)
    what = "digits" if digits else "pictures" if flags.pictures else "model"
    for name in UNUSED[what]:
        if getattr(flags, name) is not None:
            what = "--metrics digits" if digits else f"--metrics and --{what}"
            raise UserError(f"--{name.replace('_', '-')} is of no use with {what}: leave it out", 2)
    cli.parse_size(flags.size)
    count = whole(SHEET_SIZE if digits else 1, 10**6)
    kinds = {"count": optional(count), "guidance": optional(GUIDANCE), "batch": optional(COUNT)}
    kinds |= {"seed": SEED, "images_per_prompt": optional(COUNT), "steps": optional(COUNT)}
    check(vars(flags), kinds, "--", exit_code=2)
    out = as_path(flags.out)
    if out.suffix != ".json":
        raise UserError(f"--out {out} must end in .json", exit_code=2)
    if not in_bucket(out) and not out.parent.is_dir():
        raise UserError(f"--out {out}: the directory {out.parent} does not exist")
    check_writable(out.parent)
    return out


def _world(flags: argparse.Namespace) -> str:
    """The world of the workdirs, which must be the same."""
    worlds = [
        read_workdir_config(folder).data.world for folder in (flags.model, flags.teacher) if folder
    ]
    if len(set(worlds)) > 1:
        raise UserError(f"--model is of the world {worlds[0]!r}, but --teacher of {worlds[1]!r}")
    get_world(worlds[0])
    return worlds[0]


def _origin(folder: str, pipe: SprintPipeline, params: str) -> dict[str, Any]:
    return {
        "path": folder,
        "stage": "distill" if pipe.is_student else "flow",
        "step": pipe.meta["step"],
        "params": params,
    } | ({"int8": True} if pipe.sampler.int8 else {})


def _pipelines(flags: argparse.Namespace) -> tuple[SprintPipeline | None, SprintPipeline | None]:
    """(student, teacher); None for what is not given."""
    # In float32 on every device: its numbers are compared with others.
    how = dict(params=flags.params, int8=bool(flags.int8))
    model = SprintPipeline.from_pretrained(flags.model, jnp.float32, **how)
    if flags.teacher is None:
        return (model, None) if model.is_student else (None, model)
    if not model.is_student:
        raise UserError(f"--model {flags.model} is a teacher itself: leave out --teacher")
    teacher = SprintPipeline.from_pretrained(flags.teacher, jnp.float32, "ema")
    if teacher.is_student:
        raise UserError(f"--teacher {flags.teacher} is a student: name the workdir of its teacher")
    return model, teacher


if __name__ == "__main__":
    cli.run_command(main)
