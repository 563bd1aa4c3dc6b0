"""Hands the rows of a sweep to SLURM, one job each."""

import hashlib
import subprocess
from collections.abc import Callable, Sequence

from ..checkpoints.workdir import LOG_FILE
from ..core.errors import UserError
from .rows import Row
from .run import LINE_LIMIT, Result

SCRIPT = "launch/slurm.sbatch"
POD = ("bash", "launch/tpu_pod.sh", "--")  # then the arguments of train; returns when it is done


def job_name(row: Row) -> str:
    """A name that only this row's job has: the queue is asked for it, nothing is stored."""
    digest = hashlib.sha256(str(row.folder.resolve()).encode()).hexdigest()[:8]
    return f"{row.name[:60]}-{digest}"


def sbatch_command(row: Row) -> list[str]:
    """The submission of a row; output is appended to its log.txt."""
    return [
        "sbatch",
        "--parsable",
        f"--job-name={job_name(row)}",
        # SLURM reads % in a file name as a pattern.
        f"--output={row.folder / LOG_FILE}".replace("%", "%%"),
        "--open-mode=append",
        SCRIPT,
        "--",
        *row.arguments,
    ]


def queued_jobs() -> set[str]:
    """Names of this user's jobs that wait or run.

    Raises:
      UserError: when the queue cannot be read: submitting blindly could run a row twice.
    """
    return set(_run(["squeue", "--me", "--noheader", "--format=%j"]).split("\n")) - {""}


def submit_rows(
    rows: Sequence[Row], results: dict[str, Result], changed: Callable[[Row, str], None]
) -> None:
    """Submits the rows that are neither done nor in the queue; a refused one stops no other.

    Raises:
      UserError: when the queue cannot be read.
    """
    queued = {name.strip() for name in queued_jobs()}
    for row in rows:
        result = results[row.name]
        if result.status == "done":
            continue
        if job_name(row) in queued:
            result.status, what = "queued", "is in the queue"
        else:
            try:
                row.folder.mkdir(parents=True, exist_ok=True)
                job = _run(sbatch_command(row)).strip().partition(";")[0]
                result.status, what = "queued", f"submitted as job {job}"
                result.exit_code = None
            except (UserError, OSError) as error:
                result.status, result.error = "failed", str(error)[:LINE_LIMIT]
                what = f"failed: {result.error}"
        changed(row, what)


def _run(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise UserError(f"there is no {words[0]} on PATH: is this a SLURM cluster?") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"{words[0]} failed with exit code {done.returncode}: {last}")
    return done.stdout
