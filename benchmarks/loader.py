"""Speed of the loader: images per second from cached latents, without a device.

    PYTHONPATH=. python benchmarks/loader.py [--records 384] [--tokens 300] [--batch 64] [--folder DIR]

Writes a folder of random latents of 1024-pixel images: [32, 32, 32], and captions of ``--tokens`` of 300 tokens
of 2304 features, bfloat16. The machine then holds it in memory as it would a fast disk's, and global batches of
one process are read through `prefetch` as the training loop does. ``need`` is what a distillation of 0.6B
consumes at a share of the chip's peak: two images for each pair of updates, 17.6 TFLOP in all (counted from
compiled programs, remat not included). Prints one JSON line.
"""

import argparse
import contextlib
import functools
import json
import os
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sprint_jax.core.files import write_json_atomic
from sprint_jax.data.batches import make_batches, read_latents
from sprint_jax.data.latents.cache import (
    FORMAT,
    MANIFEST,
    NULL_TEXT,
    SHARDS,
    CachedRecord,
    hash_file,
    open_cache,
    write_shard,
)
from sprint_jax.data.loader import prefetch
from sprint_jax.data.order import make_order
from sprint_jax.data.sources.records import Caption

LENGTH, WIDTH = 300, 2304
PAIR_TFLOP = 17.6
# Dense bfloat16 TFLOP/s: what matrix products of one H200 reached, and the peak of eight v5e chips.
PEAKS = {"H200": 790, "v5e host of 8 chips": 8 * 197}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=LENGTH, help="of each caption, 1 to 300")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="by default a temporary one")
    flags = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = flags.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_folder(folder, flags.records, flags.tokens)
        rates = measure(folder, flags.batch, flags.seconds, flags.rounds)
    result = {
        "benchmark": "loader",
        "images_per_second": {
            "median": float(np.median(rates)),
            "min": min(rates),
            "max": max(rates),
        },
        "tokens": flags.tokens,
        "batch": flags.batch,
        "cores": len(os.sched_getaffinity(0)),
        "need": {
            name: {f"{share:.0%}": 2 * share * peak / PAIR_TFLOP for share in (0.45, 1.0)}
            for name, peak in PEAKS.items()
        },
    }
    print(json.dumps(result))


def write_folder(folder: Path, records: int, tokens: int) -> None:
    """A folder as `encode` would have written it, of noise in four buckets."""
    random = np.random.default_rng(0)
    sizes = [(32, 32), (24, 42), (42, 24), (28, 36)]

    def noise(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    made = (
        CachedRecord(
            f"{number:06d}",
            noise(*sizes[number * len(sizes) // records], 32),
            (Caption("noise"),),
            (noise(tokens, WIDTH),),
        )
        for number in range(records)
    )
    (folder / SHARDS).mkdir(parents=True)
    shards = write_shard(folder / SHARDS, 0, made)
    null = {"text": np.zeros((LENGTH, WIDTH), np.float32), "mask": np.zeros(LENGTH, np.int32)}
    safetensors.numpy.save_file(null, folder / NULL_TEXT)
    manifest = {"format": FORMAT, "identity": "noise", "shards": shards}
    manifest["null_text_sha256"] = hash_file(folder / NULL_TEXT)
    write_json_atomic(folder / MANIFEST, manifest)


def measure(folder: Path, batch_size: int, seconds: float, rounds: int) -> list[float]:
    """Images per second in each round."""
    cache = open_cache(folder)
    order = make_order([cache.buckets], batch_size=batch_size, seed=0)
    read = functools.partial(read_latents, [cache], 0.0)
    batches = make_batches(order, read, range(batch_size), batch_size=batch_size, seed=0)
    rates = []
    with contextlib.closing(prefetch(batches, 0)) as stream:
        next(stream)
        for _ in range(rounds):
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                next(stream)
                count += batch_size
            rates.append(count / (time.perf_counter() - start))
    return rates


if __name__ == "__main__":
    main()
