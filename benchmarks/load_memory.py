"""Measures the host memory that loading a transformer takes, and prints JSON lines.

    python benchmarks/load_memory.py > benchmarks/results/load_memory.jsonl
    python benchmarks/load_memory.py --size 600m-teacher --dtypes bfloat16 --devices 8

Writes a float32 file of random weights of a published size to a temporary folder, tensor by tensor,
and loads it in a process of its own per line. Peaks are the process's resident memory over what it
held before (interpreter, JAX, the name table), divided by the size of the file. On CPU the loaded
parameters are part of that; on 8 virtual devices kernels are split and the rest is held eight times.
"""

import argparse
import functools
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from sprint_jax.benchmarking.scripts import resident_memory, run_on_devices
from sprint_jax.interop.diffusers import WEIGHTS, load_transformer, read_config
from sprint_jax.interop.sana import config_from_fields, fields_from_config, sana_table
from sprint_jax.models.sana import SIZES
from sprint_jax.parallel.sharding import make_mesh, state_shardings


def write_random(folder: Path, fields: dict) -> None:
    """Writes a folder of diffusers with random float32 weights."""
    config = {"_class_name": "SanaTransformer2DModel"} | config_from_fields(fields)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    shapes = {name: entry.shape for name, entry in sana_table(fields).items()}
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write(random.standard_normal(shape, np.float32))


def load(folder: Path, dtype: str, devices: int) -> dict:
    """Loads in this process, which must have that many devices."""
    fields = fields_from_config(read_config(folder, "SanaTransformer2DModel"), str(folder))
    jax.block_until_ready(jax.numpy.zeros(len(sana_table(fields))))
    shardings = functools.partial(state_shardings, make_mesh(1, devices)) if devices > 1 else None
    before, start = resident_memory("VmHWM"), time.perf_counter()
    _, params = load_transformer(folder, dtype, shardings=shardings)
    jax.block_until_ready(params)
    seconds, file = time.perf_counter() - start, (folder / WEIGHTS).stat().st_size
    held = sum(shard.data.nbytes for a in jax.tree.leaves(params) for shard in a.addressable_shards)
    return {
        "dtype": dtype,
        "devices": devices,
        "file_bytes": file,
        "before_bytes": before,
        "parameters_per_file": round(held / file, 3),
        "peak_per_file": round((resident_memory("VmHWM") - before) / file, 3),
        "seconds": round(seconds, 1),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="600m", choices=sorted(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--load", type=Path, help="a folder to load in this process")
    options = parser.parse_args(argv)
    if options.load:
        print(json.dumps(load(options.load, options.dtypes[0], options.devices[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), SIZES[options.size])
        for dtype in options.dtypes:
            for devices in options.devices:
                words = [f"--load={folder}", f"--dtypes={dtype}", f"--devices={devices}"]
                line = run_on_devices(__file__, devices, *words)
                print(json.dumps({"size": options.size} | line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
