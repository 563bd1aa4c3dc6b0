"""The setting of every test: 8 virtual CPU devices, strict ranks, warnings as errors (pyproject.toml).

The environment is set before JAX is imported, and the commands that tests start inherit it.
"""

import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

# Eight devices on a busy machine of two cores may wait for one another longer than XLA's 40 seconds.
# Most of the tests' time is compilation: without XLA's MLIR emitters, and in one piece, it takes half of it.
DEVICES = (
    "--xla_force_host_platform_device_count=8"
    # XLA ends a process at a flag that it does not know; jaxlib 0.12 has the emitters alone.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.12" else "")
    + " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    " --xla_cpu_collective_timeout_seconds=600"
)
CACHE_DAYS = 3

os.environ["JAX_PLATFORMS"] = "cpu"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()


def use_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs in ``folder`` for the next run, and drops those of old code.

    JAX writes entries in place, so each worker has a folder of its own and none reads what another
    is writing. Compiled code is for one kind of processor, hence the machine's name.
    """
    folder = folder / f"{platform.node()}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if time.time() - entry.stat().st_mtime > CACHE_DAYS * 86400:
            entry.unlink()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


use_compilation_cache(Path(__file__).parent.parent / ".cache" / "jax")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def quick():
    """Most of XLA's optimizations are off, also in the commands that a test starts."""
    from helpers.runs import quick_compilation

    with quick_compilation():
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a few scenes of the small world of digits."""
    from helpers.runs import write_digits

    return write_digits(tmp_path_factory.getbasetemp() / "digits")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 10 and 20, and their states; copy it, do not change it."""
    from helpers.checkpoints import save_two

    return save_two(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of `saved` that a test may change."""
    return shutil.copytree(saved[0], tmp_path / "run"), saved[1]


# Files that take longest, the longest first: else a worker would be left alone with one at the end.
SLOW = (
    "test_pod",
    "test_updates",
    "test_recipes",
    "test_compiled",
    "test_train",
    "test_bucket_runs",
)
SLOW += (
    "test_sweep_backends",
    "test_launch",
    "test_peers",
    "test_feed",
    "test_faults",
    "test_encode_faults",
)


def pytest_collection_modifyitems(items):
    for item in items:
        for folder in ("faults", "parity"):
            if folder in item.path.parts:
                item.add_marker(folder)
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))
