"""The survey of an image source: the bucket of every image, from its header."""

import hashlib
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from ..core.files import write_atomic
from ..core.pixels import nearest_size
from .order import Bucket
from .rejects import RejectLog
from .sources.records import Rejected, Source

CHUNK = 4096  # images whose headers a thread reads at a time


def survey(
    source: Source,
    sizes: Sequence[tuple[int, int]],
    factor: int,
    log: RejectLog,
    *,
    threads: int,
    cache_dir: Path,
) -> dict[Bucket, np.ndarray]:
    """Finds the bucket of every image, once: the answer is kept in a file of ``cache_dir``.

    Args:
      sizes: (height, width) in pixels that images are cut to; factor: pixels per latent along a side.
      log: gets the images that cannot be measured, every time.

    Returns:
      (h, w) of latents -> numbers of records, increasing.
    """
    identity = hashlib.sha256(f"{source.identity} {list(sizes)}".encode()).hexdigest()
    path = cache_dir / f"survey-{identity[:16]}.safetensors"
    log.count(len(source))

    def measure(index: int) -> int:
        try:
            _, size = source.measure(index)
        except Rejected as rejected:
            log.add(rejected, source.name)
            return -1
        return sizes.index(nearest_size(*size, sizes))

    if path.is_file():
        numbers = safetensors.numpy.load_file(path)["numbers"]
        for index in np.flatnonzero(numbers < 0):
            measure(int(index))
    else:
        numbers = np.empty(len(source), np.int16)

        def fill(start: int) -> None:
            part = range(start, min(start + CHUNK, len(source)))
            numbers[part.start : part.stop] = [measure(index) for index in part]
            bar.update(len(part))

        with (
            tqdm(desc=f"sizes of {source.name}", total=len(source), unit="image", delay=2) as bar,
            ThreadPoolExecutor(threads) as pool,
        ):
            list(pool.map(fill, range(0, len(source), CHUNK)))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may come to this; each writes a file of its own.
        mine = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}")
        write_atomic(mine, safetensors.numpy.save({"numbers": numbers}))
        mine.replace(path)
    found = {
        (height // factor, width // factor): np.flatnonzero(numbers == number)
        for number, (height, width) in enumerate(sizes)
    }
    return {bucket: found[bucket] for bucket in sorted(found) if len(found[bucket])}
