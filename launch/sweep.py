"""Runs a sweep: the overrides that ``sweep_<name>()`` of a config file lists, one training each.

    python -m launch.sweep --config configs/digits.py:student --sweep lr --workdir runs/lr \\
        --config.teacher=runs/teacher --parallel 2

Start it in the root of the checkout. DIR gets a training workdir for each run, with its output in log.txt,
and results.csv and results.png, best run on top; docs/sweeps.md describes them. The same line goes on with what
is unfinished. SIGTERM and Ctrl-C reach the trainings, which write a checkpoint.

Backends: ``local`` has K trainings at a time on this machine, ``slurm`` submits a job for each run through
launch/slurm.sbatch, ``pod`` runs one after the other through launch/tpu_pod.sh, on the TPU that TPU_NAME
and TPU_ZONE name. For both, DIR must be a folder that this machine and the others see. It may be in a bucket
(gs://, s3://); output of the runs then lies in logs/ here until they end.
"""

import shlex
import sys

from sprint_jax.core import cli
from sprint_jax.core.errors import UserError
from sprint_jax.core.storage import as_path
from sprint_jax.sweeps.report import Ranking
from sprint_jax.sweeps.rows import load_rows
from sprint_jax.sweeps.run import claim, run_sweep
from sprint_jax.sweeps.slurm import sbatch_command
from sprint_jax.training.stages import stage_of

# The words before a run's arguments; SLURM's depend on the run. The script of the pod returns when it is over.
COMMANDS = {
    "local": (sys.executable, "-m", "sprint_jax.train"),
    "pod": ("bash", "launch/tpu_pod.sh", "--"),
    "slurm": (),
}


def parse(argv: list[str]):
    parser = cli.Parser(prog="python -m launch.sweep", description=__doc__)
    cli.add_config(parser)
    parser.add_argument("--sweep", required=True, metavar="NAME", help="sweep_NAME() is called")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="made if missing")
    parser.add_argument("--backend", default="local", choices=COMMANDS)
    parser.add_argument("--parallel", type=int, default=1, metavar="K", help="local (default 1)")
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
    return flags, words


def main(argv: list[str]) -> None:
    flags, words = parse(argv)
    workdir = as_path(flags.workdir)
    rows = load_rows(flags.config, flags.sweep, words, workdir)
    command = COMMANDS[flags.backend]
    if flags.dry_run:
        for row in rows:
            words = [*command, *row.arguments] if command else sbatch_command(row)
            state = "done" if row.finished() else "unfinished"
            print(f"# {row.name}: {state}\n{shlex.join(words)}")
        return
    metrics = flags.metric or [stage_of(rows[0].config).headline]
    ranking = Ranking(metrics, flags.goal, flags.last)
    with claim(workdir, flags.config, flags.sweep):
        run_sweep(workdir, rows, ranking, command, flags.parallel)


if __name__ == "__main__":
    cli.run_command(main)
