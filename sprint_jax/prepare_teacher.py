"""Makes a teacher that can be distilled out of a SANA or SANA-1.5 checkpoint, or of a run of ours.

    python -m sprint_jax.prepare_teacher --config configs/teacher.py:1600m --model PATH --workdir DIR
    python -m sprint_jax.teacher_check --model DIR --before PATH --out REPORT_DIR

PATH is a diffusers folder (of a pipeline or a transformer), a hub id, a workdir, or a .pth file of NVlabs/Sana,
which --before does not take: leave it out there.
Surgery comes first. It adds RMS norms of queries and keys and the dense time embedding (``timestep_scale``
0.001), if the config's network has them and PATH's has not; --prune N keeps the N most important blocks only.
Its result is the diffusers folder DIR/prepared, with prepared.json (the changes, and the hash of the source)
and, after pruning, importance.png. Then `train` fine-tunes from there in stage 'flow'; DIR is a workdir as any
other, for ``--config.teacher=DIR``. The same line resumes, and does not operate twice. Of several processes the
first one operates, on its own devices; --prune is for one process.
"""

from .core import cli
from .core.errors import UserError
from .core.storage import as_path
from .parallel import distributed
from .parallel.interrupt import Stop, named_memory
from .teacher.prepare import Options, prepare
from .train import train
from .training import checks
from .training.setup import PREPARED


def main(argv: list[str]) -> None:
    """Runs the command; ``argv`` are its words. Raises UserError for what cannot be prepared."""
    flags, c = cli.parse_with_config(_parser(), argv)
    if c.stage != "flow":
        raise UserError(f"config.stage is '{c.stage}': a teacher is of stage 'flow'", exit_code=2)
    if c.init:
        raise UserError("leave out --config.init: --model says what to start from", exit_code=2)
    workdir = as_path(flags.workdir)
    c = c.override({"init": str(workdir / PREPARED)})
    if flags.prune:
        c = c.override({"model.num_layers": flags.prune})
    cli.use_compilation_cache()
    options = Options(**{name: getattr(flags, name) for name in Options._fields})
    with distributed.joined(flags) as peers:
        checks.check_values(c)
        with Stop(peers) as stop, named_memory(stop), checks.hold_workdir(workdir, peers):
            checks.check_workdir(workdir, c)
            stop.phase("preparing the teacher")
            prepare(c, options, workdir / PREPARED, peers)
        if not flags.surgery_only:
            train(c, workdir, peers)


def _parser() -> cli.Parser:
    parser = cli.make_parser("prepare_teacher", __doc__)
    cli.add_config(parser)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="the network to start from; see above")
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
