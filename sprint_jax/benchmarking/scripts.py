"""Parts that the scripts of the folder benchmarks share: processes of their own, commands, digits' accuracy."""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .timing import header


def run_command(module: str, *words: Any, allowed: tuple[int, ...] = (0,)) -> None:
    """Runs a command of the package; its output is this process's. SystemExit for another exit code."""
    command = [sys.executable, "-m", f"sprint_jax.{module}", *map(str, words)]
    print(" ".join(command[1:]), flush=True)
    if subprocess.run(command, check=False).returncode not in allowed:
        raise SystemExit(f"{module} failed")


def config_words(values: dict[str, Any]) -> list[str]:
    """Returns dotted keys and values as words of a command line."""
    return [f"--config.{name}={value}" for name, value in values.items()]


def run_on_devices(script: str, devices: int, *words: str) -> dict:
    """Runs a script in a process of its own, on virtual CPU devices; returns the JSON that it prints."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, script, *words]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def resident_memory(name: str) -> int:
    """Returns ``VmRSS`` (resident now) or ``VmHWM`` (the most since the last reset) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def digits_report(model: Path, count: int) -> dict[str, Any]:
    """Returns `evaluate`'s report of a digits workdir, which it makes where there is none of its last step."""
    from ..checkpoints.checkpoint import saved_steps

    report = model / f"report_{count}.json"
    made = json.loads(report.read_text())["model"]["step"] if report.is_file() else None
    if made is None or made != max(saved_steps(model)):
        words = ["--metrics", "digits", "--count", count, "--out", report]
        run_command("evaluate", "--model", model, *words)
    return json.loads(report.read_text())


def students_parser(description: str) -> argparse.ArgumentParser:
    """Returns the flags of a script that compares the students of a sweep: runs, teacher, count."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="the sweep's --workdir")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000, help="prompts (default 1000)")
    return parser


def finished_runs(sweep: Path) -> dict[str, dict[int, Path]]:
    """Returns {arm: {seed: folder}} of a sweep whose rows are named ARM-SEED, without what is not finished.

    Raises:
      UserError: a folder was trained with another value of a key of its row, as before the sweep was edited.
    """
    from ..checkpoints.checkpoint import saved_steps
    from ..checkpoints.workdir import read_workdir_config
    from ..core.config import flatten
    from ..core.errors import UserError
    from ..sweeps.rows import load_rows

    found: dict[str, dict[int, Path]] = {}
    record = json.loads((sweep / "sweep.json").read_text())
    for row in load_rows(record["config"], record["sweep"], [], sweep):
        # The command line of the sweep may have set more than its rows do.
        if not (row.folder / "config.json").is_file():
            continue
        config = read_workdir_config(row.folder)
        mine, theirs = flatten(row.config), flatten(config)
        for key in row.overrides:
            if mine[key] != theirs[key]:
                raise UserError(
                    f"{row.folder}: {key}={theirs[key]}, but the sweep says {mine[key]}"
                )
        if config.steps in saved_steps(row.folder):
            found.setdefault(row.name.rpartition("-")[0], {})[row.config.seed] = row.folder
    return found


def evaluated_students(root: Path, count: int) -> dict[str, dict[int, Path]]:
    """The same of a folder ``students`` with folders ARM-SEED: those that `digits_report` has a report of."""
    found: dict[str, dict[int, Path]] = {}
    for report in sorted(root.glob(f"students/*/report_{count}.json")):
        arm, _, seed = report.parent.name.rpartition("-")
        found.setdefault(arm, {})[int(seed)] = report.parent
    return found


def run_minutes(folder: Path) -> float:
    """Returns the minutes that a run's loop took, compilation left out."""
    from ..checkpoints.workdir import read_metrics

    records = read_metrics(folder / "metrics.jsonl")
    steps = [0, *(record["step"] for record in records)]
    pairs = zip(records, steps, strict=False)
    return sum(each["time/step_seconds"] * (each["step"] - before) for each, before in pairs) / 60


def numbers(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard error over seeds of the numbers of one step count, of `digits_report`."""
    from ..digits.report import number

    found = {
        name: [number(run, name)[0] for run in runs]
        for name in ("accuracy", "frechet", "kid", "diversity")
    }
    found["unreadable"] = [run["unreadable"]["share"] for run in runs]
    return {name: spread(values) for name, values in found.items()}


def finite(value: float | None) -> bool:
    """Whether a number was measured: a report has none where too few pictures were right, or there at all."""
    return value is not None and math.isfinite(value)


def spread(values: Sequence[float | None]) -> list[float | None]:
    """Mean of what was measured, its standard error, which a single value has not, and how many were."""
    values = [value for value in values if finite(value)]
    error = statistics.stdev(values) / len(values) ** 0.5 if values[1:] else None
    return [statistics.mean(values) if values else None, error, len(values)]


def digits_accuracy(model: Path, count: int, **how: Any) -> float:
    """Returns the share of held-out prompts that pictures satisfy, drawn with CFG scale 3 from seed 0.

    Args:
      model: a workdir of the small world.
      how: fields of a `Request`, such as ``steps``.
    """
    # Here, since other scripts measure the memory of their process.
    from ..digits.judge import Judge, prompt_accuracy
    from ..digits.scenes import held_out_prompts, to_float
    from ..pipeline import Request, SprintPipeline

    pipe, prompts = SprintPipeline.from_pretrained(model), held_out_prompts("small", count, 0)
    batches = pipe.draw(prompts, Request(guidance=3.0, batch_size=count, **how))
    readings = Judge.fit("small").read(to_float(np.concatenate(list(batches))))
    return prompt_accuracy(readings, prompts, "small")["overall"]["accuracy"]


def write_lines(path: Path, lines: list[dict]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@contextlib.contextmanager
def line_writer(path: Path, command: str) -> Iterator[Callable[[dict], None]]:
    """A function that adds a JSON line to a file and prints it, at once; the first is the command's header.

    What is stopped meanwhile keeps what it has measured.
    """
    with path.open("a", encoding="utf-8") as file:

        def write(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(json.dumps(line), flush=True)

        write(header(command))
        yield write
