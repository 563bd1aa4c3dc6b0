"""A sweep on SLURM: one job per row, through launch/slurm.sbatch."""

import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence

from ..core.errors import UserError
from ..core.storage import absolute
from .rows import Row


def job_name(row: Row) -> str:
    """Returns the name of the row's job, which no other has: the queue is asked for it."""
    digest = hashlib.sha256(os.fspath(absolute(row.folder)).encode()).hexdigest()[:8]
    return f"{row.name[:60]}-{digest}"


def sbatch_command(row: Row) -> list[str]:
    """Returns the words that submit a row; the job's output is appended to its log.txt."""
    # SLURM reads % in a file name as a pattern.
    log = str(row.log).replace("%", "%%")
    flags = [f"--job-name={job_name(row)}", f"--output={log}", "--open-mode=append"]
    return ["sbatch", *flags, "launch/slurm.sbatch", "--", *row.arguments]


def submit_rows(rows: Sequence[Row], changed: Callable[[Row], None]) -> None:
    """Submits the rows that are not in the queue; a refused one stops no other.

    An unreadable queue is a UserError: submitting blindly could run a row twice.
    """
    queued = _run(["squeue", "--me", "--noheader", "--format=%j"]).split()
    for row in rows:
        try:
            if job_name(row) not in queued:
                row.log.parent.mkdir(parents=True, exist_ok=True)  # else the job cannot start
                _run(sbatch_command(row))
            row.status = "queued"
        except UserError as error:
            row.status, row.error = "failed", str(error)[:300]
        changed(row)


def _run(words: list[str]) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise UserError(f"there is no {words[0]} on PATH: is this a SLURM cluster?") from error
    except subprocess.CalledProcessError as error:
        message = f"{words[0]} ended with exit code {error.returncode}: {error.stderr.strip()}"
        raise UserError(message) from error
