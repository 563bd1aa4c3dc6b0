"""A host's part in batches of a billion records: memory, time to the first batch, time a batch, exactness.

    PYTHONPATH=. python benchmarks/billion.py [--records 1000000000] [--kind latents|images] [--batches 2000]

No record is read: records of 33 sizes are those of a manifest with shards of 65,536, or of a survey of images
in a file of one byte each, which is written first. Everything that training does with numbers of records is
done: they are hashed, some are held out, two sources are mixed by weight (latents alone), and batches of 512
are drawn at random places of the first epoch. ``twice`` counts records that were drawn a second time, of
``drawn``; drawing with replacement would give ``by_chance``. ``longest_wait_cpu_s`` is how long another
thread was kept from running, in CPU time of this process, to which others on a busy machine add nothing.
``--whole`` draws an epoch to its end. Prints one JSON line.
"""

import argparse
import json
import os
import resource
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from sprint_jax.data.buckets import size_table
from sprint_jax.data.latents.cache import Cache
from sprint_jax.data.members import Buckets, Surveyed
from sprint_jax.data.order import Order, hold_out, make_order
from sprint_jax.data.survey import join_sizes

BATCH, SHARD, HELD_OUT, FACTOR = 512, 65_536, 4096, 32
SIZES = size_table(1024)
WRITTEN = 1 << 24  # bytes of a survey that are made at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10**9)
    parser.add_argument("--kind", choices=("latents", "images"), default="latents")
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--whole", action="store_true")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), flags.records, flags.kind, flags.batches, flags.whole)
    print(
        json.dumps({"benchmark": "billion", "records": flags.records, "kind": flags.kind, **result})
    )


def shares() -> np.ndarray:
    """Of each size, the share of the records: most are near square."""
    ratios = np.log([height / width for height, width in SIZES])
    weights = np.exp(-((ratios / 0.45) ** 2) / 2)
    return weights / weights.sum()


def make_manifest(records: int) -> dict:
    """The shards of a folder of latents, as its manifest has them."""
    shards, ends = [], np.cumsum(shares())
    for first in range(0, records, SHARD):
        count = min(SHARD, records - first)
        counts = np.diff(np.round(ends * count).astype(int), prepend=0).tolist()
        runs = [
            [height // FACTOR, width // FACTOR, n]
            for (height, width), n in zip(SIZES, counts, strict=True)
            if n
        ]
        shards.append({"file": f"{len(shards):05d}", "records": count, "buckets": runs})
    return {"identity": "", "shards": shards}


def latents(manifest: dict) -> Buckets:
    """Buckets of a folder of latents; of its files none is there."""
    null = {"text": np.zeros((1, 1), np.float32), "mask": np.ones(1, np.int32)}
    return Cache(Path(), manifest, null).buckets


def write_survey(path: Path, records: int) -> None:
    """A file with the number of its size for each of some images."""
    random, ends = np.random.default_rng(0), np.cumsum(shares())[:-1]
    with path.open("wb") as file:
        for first in range(0, records, WRITTEN):
            draws = random.random(min(WRITTEN, records - first), np.float32)
            file.write(np.searchsorted(ends, draws).astype(np.int8))


def images(path: Path) -> Buckets:
    """Buckets of surveyed images."""
    survey = Surveyed(np.memmap(path, np.int8, "r"), len(SIZES))
    return join_sizes([survey], SIZES, FACTOR, BATCH)[0][0]


def measure(folder: Path, records: int, kind: str, batches: int, whole: bool) -> dict:
    before, waits, done = used(), [], threading.Event()

    def wait() -> None:
        last = time.process_time()
        while not done.wait(0.005):
            now = time.process_time()
            waits.append(now - last)
            last = now

    if kind == "images":
        write_survey(folder / "survey", records)
    else:
        manifest, other = make_manifest(records), latents(make_manifest(records // 100))
    thread = threading.Thread(target=wait)
    thread.start()
    start, cpu = time.perf_counter(), time.process_time()
    made = images(folder / "survey") if kind == "images" else latents(manifest)
    for members in made.values():
        members.hash()
    training, _ = hold_out(made, min(HELD_OUT, records // 100))
    order = make_order([training], batch_size=BATCH, seed=0)
    order.rows(0)
    result = {"first_batch_s": time.perf_counter() - start}
    result["first_batch_cpu_s"] = time.process_time() - cpu
    if kind == "latents":
        mixed = make_order([training, other], batch_size=BATCH, seed=0, weights=(3.0, 1.0))
        result["batch_of_mixture_cpu_s"] = timed(mixed, range(0, 10**6, 10**4))[0]
    result |= check_epoch(order, training, batches, whole)
    done.set()
    thread.join()
    result |= {"longest_wait_cpu_s": max(waits), "memory_gb": used(), "memory_before_gb": before}
    return {
        key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()
    }


def check_epoch(order: Order, training: Buckets, batches: int, whole: bool) -> dict:
    """Draws batches of the first epoch, and counts records that came more than once."""
    full = {bucket: len(members) // BATCH for bucket, members in training.items()}
    length = sum(full.values())
    numbers = np.random.default_rng(0).choice(length, min(batches, length), replace=False)
    seconds, rows = timed(order, range(length) if whole else numbers.tolist())
    drawn = np.concatenate([each.records for each in rows])
    twice = len(drawn) - len(np.unique(drawn))
    found = {"batch_cpu_s": seconds, "epoch_batches": length, "drawn": len(drawn), "twice": twice}
    total = sum(map(len, training.values()))
    found["by_chance"] = float(len(drawn) - total * -np.expm1(-len(drawn) / total))
    if whole:
        counted = Counter(each.bucket for each in rows)
        found |= {"left_over": total - len(drawn), "exact": counted == full and not twice}
    return found


def timed(order: Order, numbers) -> tuple[float, list]:
    """The seconds of CPU that a batch takes, but for one in a hundred, and the batches."""
    seconds, rows = [], []
    for i in numbers:
        start = time.process_time()
        rows.append(order.rows(i))
        seconds.append(time.process_time() - start)
    return float(np.quantile(seconds, 0.99)), rows


def used() -> float:
    """The most memory that this process had so far, in GB; mapped files that were read count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
