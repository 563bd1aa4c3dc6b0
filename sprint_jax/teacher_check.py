"""Measures a teacher on held-out latents and says whether it is ready to be distilled, with reasons.

    python -m sprint_jax.teacher_check --model DIR --before PATH --out REPORT_DIR

--model and --before are workdirs, diffusers folders or hub ids. If --model is no workdir, --config names the
data to take; --config.key=value changes keys of either. Measured by time: the flow loss, and of a student at
its start, which is this teacher as a TrigFlow model, the tangent and the gradient (the paper's Fig. 3), the
error of the tangent in bfloat16 and the difference of derivative and central difference; besides, the error of
the TrigFlow transform, and samples in 20 steps.

Writes report.json, curves.png and samples.png. Exit code 0: ready; 4: not ready. The limits and their reasons:
`teacher/verdict.py`.
"""

import argparse
import sys

from .checkpoints.workdir import read_workdir_config
from .core import cli
from .core.config import Config, load_config
from .core.errors import UserError
from .core.files import check_writable
from .core.ranges import COUNT
from .core.schema import check
from .core.storage import as_path, local_output
from .teacher.check import check_teacher

NOT_READY = 4  # exit code


def main(argv: list[str]) -> None:
    """Runs the command; ``argv`` are its words. Raises UserError for what cannot be measured."""
    overrides, rest = cli.split_overrides(argv)
    flags = _parser().parse_args(rest)
    c = _config(flags, overrides)
    out = as_path(flags.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a directory")
    cli.use_compilation_cache()
    check_writable(out)
    with local_output(out) as folder:
        checks = check_teacher(c, flags.model, flags.before, folder, flags.count, flags.batch)
    for each in checks:
        said = "ok" if each.passed else f"FAILED: {each.advice}"
        print(f"{each.name:9} {each.value:10.3g}  at most {each.limit:<7g} {each.what}: {said}")
    ready = all(each.passed for each in checks)
    print(f"{flags.model} is {'ready' if ready else 'NOT ready'} to be distilled; see {out}")
    if not ready:
        sys.exit(NOT_READY)


def _config(flags: argparse.Namespace, overrides: list[str]) -> Config:
    check(vars(flags), {"count": COUNT, "batch": COUNT}, "--", exit_code=2)
    if flags.config:
        return load_config(flags.config, overrides)
    model = as_path(flags.model)
    if not (model / "config.json").is_file() or not (model / "checkpoints").is_dir():
        raise UserError(
            f"--model {model} is not a workdir: say with --config which data to measure it on",
            exit_code=2,
        )
    return read_workdir_config(model).override(overrides)


def _parser() -> cli.Parser:
    parser = cli.make_parser("teacher_check", __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="the teacher")
    add("--before", metavar="PATH", help="the network it was made from, to compare with")
    add("--out", required=True, metavar="DIR", help="the report; made if missing")
    add("--config", metavar="FILE.py[:WORDS]", help="data and settings, if not those of --model")
    add("--count", type=int, default=128, metavar="N", help="held-out records (default 128)")
    add("--batch", type=int, default=32, metavar="N", help="records at once (default 32)")
    return parser


if __name__ == "__main__":
    cli.run_command(main, out_of_memory=1)
