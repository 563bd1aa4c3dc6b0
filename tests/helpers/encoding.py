"""Sources in memory, and encodings of them, for tests of `encode` and of what reads its folders."""

import hashlib
from pathlib import Path

import numpy as np
from helpers.runs import ROOT

from sprint_jax.core.config import load_config
from sprint_jax.data.latents import encoding
from sprint_jax.data.sources.records import Caption, Record, Rejected

STORED = ROOT / "tests" / "parity" / "stored"
SHAPES = ((8, 16), (20, 11), (9, 9), (16, 40), (33, 16))
# Small enough for eight devices: units of 8 records, batches of 8, three buckets.
SMALL = {
    "data.sizes": ("8x16", "16x8", "8x8"),
    "encode.unit": 8,
    "encode.batch_size": 8,
    "encode.text_batch_size": 8,
    "encode.threads": 2,
    "data.max_rejected": 0.5,
}


class Pictures:
    """``count`` pictures of several shapes; a few have two captions, a few none, and some are rejected."""

    def __init__(self, count: int, rejected: tuple[int, ...] = (), identity: str = "pictures"):
        self.name, self.identity = "pictures", f"{identity} {count} {rejected}"
        self._count, self._rejected = count, rejected

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        key, (height, width) = self.measure(index)
        random = np.random.default_rng(index)
        image = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
        captions = (Caption(f"a red {index % 10}", 0.75, 0.25), Caption("two green 4s", 0.5))
        if index % 7 == 3:
            captions = (Caption(""),)
        return Record(key, image, captions if index % 5 == 0 else captions[:1])

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        if index in self._rejected:
            raise Rejected(f"picture-{index:03d}", "it is no picture")
        return f"picture-{index:03d}", SHAPES[index % len(SHAPES)]


def small_config(**changes):
    """The config of digits with `SMALL` and changes, whose names have ``__`` for a dot."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(f"{ROOT / 'configs' / 'encode.py'}:digits", []).override(SMALL | named)


def encode_small(folder: Path, source=None, *, limit=None, **changes) -> Path:
    """Encodes a source, by default 40 pictures of which two are rejected, with small options."""
    source = Pictures(40, (5, 21)) if source is None else source
    c = small_config(**changes)
    job = encoding.make_job(c, source, folder, limit)
    encoding.encode(job, sigma_d=c.sigma_d, max_rejected=c.data.max_rejected)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """What the files of a folder of latents have in them, by name; pictures left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".png"
    }


def words(out, **changes) -> list[str]:
    """Those of the command for `encode_small`'s records; see `encoding.small_config`."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    values = {
        key: ",".join(value) if isinstance(value, tuple) else value
        for key, value in (SMALL | named).items()
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return ["--config", "configs/encode.py:digits", *flags, "--out", str(out)]
