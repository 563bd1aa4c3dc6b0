"""Measures the host memory that saving and restoring a state takes, and prints JSON lines.

    python benchmarks/checkpoint_memory.py > benchmarks/results/checkpoint_memory.jsonl
    python benchmarks/checkpoint_memory.py --gigabytes 4 --devices 1

Each line is a process of its own with random float32 leaves of 0.17 GB. Peaks are the process's resident
memory over what it held before, divided by the size of the state, so that a copy of the whole state
is 1. The restored state itself is host memory on a CPU, so ``restore`` without any copy is 1, too; its
number includes the check of all hashes. ``save async`` copies the state to the host at once (here,
where device and host are one memory, Orbax copies all the same), ``save stream`` a piece at a time.
"""

import argparse
import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sprint_jax.benchmarking.scripts import resident_memory, run_on_devices
from sprint_jax.checkpoints.checkpoint import Checkpoints

LEAF = (10, 2048, 2048)  # 0.17 GB of float32
MODES = {"save async": 1e9, "save stream": 0.0, "restore": 0.0}  # name: async_gb


def abstract_state(gigabytes: float, devices: int) -> dict:
    """Leaves split over all devices along the last axis."""
    mesh = jax.make_mesh((devices,), ("all",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec(None, None, "all"))
    leaf = jax.ShapeDtypeStruct(LEAF, jnp.float32, sharding=split)
    return {f"leaf{i}": leaf for i in range(round(gigabytes * 1e9 / (4 * np.prod(LEAF))))}


def random_state(abstract: dict) -> dict:
    """Incompressible values, made on the devices."""

    def draw(i: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        make = jax.jit(lambda key: jax.random.normal(key, leaf.shape), out_shardings=leaf.sharding)
        return jax.block_until_ready(make(jax.random.key(i)))

    return {name: draw(i, leaf) for i, (name, leaf) in enumerate(abstract.items())}


def run(mode: str, folder: str, gigabytes: float, devices: int) -> dict:
    """One measurement in this process."""
    abstract = abstract_state(gigabytes, devices)
    size = sum(4 * np.prod(leaf.shape) for leaf in abstract.values())
    state = None if mode == "restore" else random_state(abstract)
    with Checkpoints(Path(folder) / "warm", keep=1) as checkpoints:  # threads, imports
        checkpoints.save(1, {"x": jnp.ones(8)}, {})
    with Checkpoints(Path(folder) / "state", keep=1, async_gb=MODES[mode]) as checkpoints:
        ctypes.CDLL(None).malloc_trim(0)  # what making the state has left
        before, start = resident_memory("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        if mode == "restore":
            state, _ = checkpoints.restore_latest(abstract)
            jax.block_until_ready(state)
            returned = time.perf_counter() - start
        else:
            checkpoints.save(1, state, {})
            returned = time.perf_counter() - start
            checkpoints.wait()
        seconds = time.perf_counter() - start
    return {
        "mode": mode,
        "devices": devices,
        "state_bytes": int(size),
        "peak_per_state": round((resident_memory("VmHWM") - before) / size, 3),
        "returned_seconds": round(returned, 1),
        "seconds": round(seconds, 1),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--run", choices=sorted(MODES), help="a mode to run in this process")
    options = parser.parse_args(argv)
    if options.run:
        line = run(options.run, options.folder, options.gigabytes, options.devices[0])
        print(json.dumps(line))
        return
    for devices in options.devices:
        for mode in MODES:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                words = [f"--folder={folder}", f"--gigabytes={options.gigabytes}"]
                words.append(f"--devices={devices}")
                if mode == "restore":
                    run_on_devices(__file__, devices, "--run=save stream", *words)
                line = run_on_devices(__file__, devices, f"--run={mode}", *words)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
