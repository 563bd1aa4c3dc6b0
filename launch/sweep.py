"""Runs a sweep: the overrides that ``sweep_<name>()`` of a config file lists, one training each.

    python -m launch.sweep --config configs/digits.py:student --sweep lr --workdir runs/lr \\
        --config.teacher=runs/teacher --parallel 2

Start it in the root of the checkout (`python launch/sweep.py` does the same where the package is
installed, as in the .venv of the launch scripts). The same line goes on with whatever is unfinished:
a run that failed, was killed, or stopped with the sweep. DIR gets one folder per run (a training
workdir, with its output in log.txt), results.csv with one line per run, rewritten after every
change, and results.png; the best run stands on top in both.

Backends: ``local`` starts K trainings at a time here. ``slurm`` submits one job per run through
launch/slurm.sbatch; the same line submits again what neither finished nor waits in the queue, and
renews results.csv. ``pod`` runs one after the other through launch/tpu_pod.sh, whose TPU is named by
TPU_NAME and TPU_ZONE. For both, DIR must be a folder that this machine and the others see. SIGTERM
and Ctrl-C reach the trainings, which write a checkpoint.
"""

from pathlib import Path

from sprint_jax.core import cli
from sprint_jax.core.errors import UserError
from sprint_jax.core.files import write_atomic
from sprint_jax.sweeps.drive import BACKENDS, print_commands, run_sweep
from sprint_jax.sweeps.report import Ranking
from sprint_jax.sweeps.rows import check_same_sweep, load_rows, sweep_record
from sprint_jax.sweeps.run import only_sweep

LOSSES = {"flow": "loss/flow", "distill": "loss/total"}


def parse(argv: list[str]):
    parser = cli.Parser(prog="python -m launch.sweep", description=__doc__)
    cli.add_config(parser)
    parser.add_argument("--sweep", required=True, metavar="NAME", help="sweep_NAME() is called")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="made if missing")
    parser.add_argument("--backend", default="local", choices=BACKENDS)
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="K",
        help="trainings at a time, local (default 1)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands, do nothing")
    parser.add_argument(
        "--metric",
        nargs="+",
        metavar="NAME",
        help="of metrics.jsonl, to show; the first ranks (default loss/flow or loss/total, by stage)",
    )
    parser.add_argument("--goal", default="min", choices=("min", "max"), help="default min")
    parser.add_argument(
        "--last", type=int, default=10, metavar="N", help="mean of the last N values (default 10)"
    )
    words, rest = cli.split_overrides(argv)
    flags = parser.parse_args(rest)
    if flags.parallel < 1 or flags.last < 1:
        raise UserError("--parallel and --last must be at least 1", exit_code=2)
    if flags.parallel > 1 and flags.backend != "local":
        raise UserError(f"--parallel is of no use with --backend {flags.backend}", exit_code=2)
    if "://" in flags.workdir:
        raise UserError(f"--workdir {flags.workdir} must be a folder, not an address", exit_code=2)
    return flags, words


def main(argv: list[str]) -> None:
    flags, words = parse(argv)
    workdir = Path(flags.workdir)
    rows = load_rows(flags.config, flags.sweep, words, workdir)
    check_same_sweep(workdir, flags.config, flags.sweep)
    if flags.dry_run:
        print_commands(rows, flags.backend)
        return
    metrics = flags.metric or [LOSSES.get(rows[0].config.stage, "loss/total")]
    ranking = Ranking(tuple(metrics), flags.goal, flags.last)
    with only_sweep(workdir):
        write_atomic(workdir / "sweep.json", sweep_record(flags.config, flags.sweep))
        run_sweep(workdir, rows, ranking, flags.backend, flags.parallel)


if __name__ == "__main__":
    cli.run_command(main)
