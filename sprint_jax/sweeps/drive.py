"""A sweep from its rows to results.csv, on any backend."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UserError
from .report import (
    PICTURE,
    RESULTS,
    Ranking,
    draw,
    rank,
    read_results,
    unknown_metrics,
    write_results,
)
from .rows import Row
from .run import TRAIN, Progress, Result, run_rows
from .submit import POD, sbatch_command, submit_rows

BACKENDS = ("local", "slurm", "pod")


def print_commands(rows: Sequence[Row], backend: str) -> None:
    """What a sweep would start: for each row how far it is, and its command."""
    for row in rows:
        if backend == "slurm":
            words = sbatch_command(row)
        else:
            words = [*(POD if backend == "pod" else TRAIN), *row.arguments]
        state = "done" if row.finished() else f"from step {row.checkpoint()}"
        print(f"# {row.name}: {state}\n{shlex.join(words)}")


def starting_results(workdir: Path, rows: Sequence[Row]) -> dict[str, Result]:
    """How each row stands before anything runs: by its folder, with what results.csv remembers."""
    before = read_results(workdir)
    results = {row.name: before.get(row.name, Result()) for row in rows}
    for row in rows:
        result = results[row.name]
        result.status = "done" if row.finished() else "waiting"
        if result.status == "done":
            result.error = ""
    return results


def run_sweep(
    workdir: Path, rows: Sequence[Row], ranking: Ranking, backend: str, parallel: int
) -> None:
    """Runs, or submits, what is unfinished, and keeps results.csv and results.png up to date.

    Args:
      workdir: of the sweep, made and held by the caller.
      backend: one of `BACKENDS`; ``parallel`` trainings at once if local.

    Raises:
      UserError: when runs failed, after all have had their turn.
      SystemExit: 128 + the signal that stopped it.
    """
    results = starting_results(workdir, rows)
    progress = Progress(rows, results)

    def write(picture: bool) -> None:
        ranked = rank(rows, results, ranking)
        write_results(workdir, ranked, ranking.metrics)
        if picture:
            draw(workdir, ranked, ranking)

    def changed(row: Row, what: str) -> None:
        write(picture=results[row.name].status in ("done", "failed", "stopped"))
        print(progress.line(f"{row.name}: {what}"), flush=True)

    write(picture=True)
    stopped = 0
    if backend == "slurm":
        submit_rows(rows, results, changed)
    else:
        stopped = run_rows(
            rows,
            results,
            changed,
            command=POD if backend == "pod" else TRAIN,
            parallel=parallel,
            heartbeat=lambda: print(progress.line(progress.running()), flush=True),
        )
    _conclude(workdir, rows, results, ranking)
    if stopped:
        print("stopped by signal; the same line goes on from there", flush=True)
        sys.exit(128 + stopped)
    failed = [row.name for row in rows if results[row.name].status == "failed"]
    if failed:
        more = f" and {len(failed) - 1} more" if failed[1:] else ""
        raise UserError(
            f"{len(failed)} of {len(rows)} runs failed: {failed[0]}{more}; see {workdir / RESULTS}"
        )


def _conclude(workdir: Path, rows, results, ranking) -> None:
    for line in unknown_metrics(rows, ranking):
        print(f"warning: {line}", file=sys.stderr)
    best = rank(rows, results, ranking)[0]
    if best.result.status == "done" and best.scores[0] is not None:
        print(f"best: {best.row.name}  {ranking.metrics[0]} {best.scores[0]:.6g}")
    print(f"results: {workdir / RESULTS}, {workdir / PICTURE}", flush=True)
