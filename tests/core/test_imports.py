"""The order of rooms: imports point down, and the pipeline loads neither data nor training.

``python tests/core/test_imports.py`` prints the arrows between rooms.
"""

import ast
import collections
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

METHOD = "trigflow losses sampling"
COMMANDS = ("train", "sample", "encode", "evaluate", "export", "plan", "benchmark")
COMMANDS += ("prepare_teacher", "teacher_check", "serve")
# From the ground up: the method, the rooms and the API, each with what it may import.
MAY_IMPORT = {
    "__init__": "",  # the API is imported when it is first used
    "trigflow": "",
    "losses": "trigflow",
    "sampling": "trigflow",
    "core": "",
    "models": f"core {METHOD}",
    "parallel": "core",
    "interop": "core models",
    "metrics": "core interop parallel",
    "digits": "core metrics",
    "checkpoints": "core models parallel.sharding interop",
    "encoders": "core models parallel.sharding digits interop checkpoints.locate",
    # The version is written into exported files.
    "artifacts": f"core models parallel.sharding interop encoders checkpoints {METHOD} __version__",
    "data": "core parallel.sharding digits encoders",
    "pipeline": "core models encoders.autoencoder artifacts trigflow sampling",
    "serving": "core pipeline",
    "training": f"core models parallel digits interop encoders checkpoints artifacts data {METHOD}",
    "teacher": "core models parallel digits interop encoders checkpoints artifacts data training "
    + METHOD,
    # Rows are checked before the first one runs, and ranked by the metric of their stage.
    "sweeps": "core checkpoints training.checks training.stages",
    # A pipeline lowers its own calls, so that what is planned is what it runs.
    "planning": "core models parallel training data.buckets data.loader interop encoders checkpoints "
    + f"pipeline {METHOD}",
    # Scripts that measure quality judge pictures of digits.
    "benchmarking": f"core models digits interop checkpoints pipeline sweeps {METHOD}",
}
MAY_IMPORT |= dict.fromkeys(COMMANDS, " ".join(MAY_IMPORT))
MAY_IMPORT["prepare_teacher"] += " train"  # it ends in the fine-tuning of the teacher that it made


@functools.cache
def imports() -> dict[str, set[tuple[str, str]]]:
    """Room -> (file, module) of every import from another room, also of those inside functions."""
    found = collections.defaultdict(set)
    for path in sorted((ROOT / "sprint_jax").rglob("*.py")):
        place = path.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name.split(".") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = list(place[: len(place) - node.level]) if node.level else []
                base += node.module.split(".") if node.module else []
                modules = [[*base, alias.name] for alias in node.names]
            else:
                continue
            for package, *names in modules:
                if package == "sprint_jax" and names and names[0] != place[1]:
                    found[place[1]].add(("/".join(place), ".".join(names)))
    return found


def against_the_table(room: str) -> list[str]:
    allowed = tuple(f"{each}." for each in MAY_IMPORT[room].split())
    wrong = [pair for pair in imports()[room] if not f"{pair[1]}.".startswith(allowed)]
    return sorted(f"{file} imports {module}" for file, module in wrong)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down(room):
    assert not against_the_table(room)
    above = list(MAY_IMPORT)[list(MAY_IMPORT).index(room) :]
    assert not {name.partition(".")[0] for name in MAY_IMPORT[room].split()}.intersection(above)


def test_every_room_stands_in_the_table():
    names = {path.stem for path in (ROOT / "sprint_jax").iterdir() if path.name != "__pycache__"}
    assert names == MAY_IMPORT.keys()


def loaded(statement: str) -> set[str]:
    """Returns the names of the modules that a fresh interpreter has after a statement."""
    command = [sys.executable, "-c", f"import sys; {statement}; print(*sys.modules)"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    return set(run.stdout.split())


def test_the_pipeline_loads_no_more_than_it_needs():
    modules = loaded("import sprint_jax.pipeline")
    heavy = {"grain", "matplotlib", "optax", "orbax", "sklearn", "tensorboardX"}
    assert not modules & (heavy | {"tensorflow_datasets", "torch", "huggingface_hub"})
    ours = {name.removeprefix("sprint_jax.") for name in modules if name.startswith("sprint_jax.")}
    assert {name for name in ours if name.startswith("parallel.")} <= {"parallel.sharding"}
    unwanted = {"digits", "data", "serving", "training", "teacher", "sweeps", "planning", *COMMANDS}
    assert not {name.partition(".")[0] for name in ours} & unwanted


def test_the_package_and_command_lines_load_without_jax():
    assert not loaded("import sprint_jax, sprint_jax.core.cli") & {"jax", "flax", "numpy"}


if __name__ == "__main__":
    count = 0
    for room in MAY_IMPORT:
        others = sorted({module.partition(".")[0] for _, module in imports()[room]})
        count += len(others)
        print(f"{room:16s}->", *others)
    wrong = [line for room in MAY_IMPORT for line in against_the_table(room)]
    print(
        f"{len(MAY_IMPORT)} rooms, {count} arrows, {len(wrong)} against the table", *wrong, sep="\n"
    )
