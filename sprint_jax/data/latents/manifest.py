"""What is said of a folder of latents as a whole: at its beginning what it is for, at its end what it has."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ...core.errors import UserError
from ...core.files import write_atomic, write_json_atomic
from ...core.fingerprint import digest
from ...encoders.load import Encoders
from ..rejects import Reject, check_rejects, write_rejects
from .cache import FORMAT, MANIFEST, NULL_TEXT, SHARDS, hash_file
from .units import UNITS, Job

PLAN = "encoding.json"
REJECTED = "rejected.jsonl"

# Within these a standard deviation of latents is taken for the 1 that training assumes.
FITTING = (0.8, 1.25)


def describe_job(job: Job) -> dict[str, Any]:
    """What all records of a folder have in common, JSON-able; another value of anything is another folder."""
    return {
        "format": FORMAT,
        "encoders": job.encoders.identity,
        "dtype": np.dtype(job.dtype).name,
        "sizes": [list(size) for size in job.sizes],
        "unit": job.unit,
        "source": {
            "name": job.source.name,
            "identity": job.source.identity,
            "records": job.count,
        },
    }


def check_plan(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether a folder was begun with this plan; False for one that is not begun.

    Args:
      plan: of `describe_job`.

    Raises:
      UserError: it was begun with another one, naming the first thing that differs, or is something else.
    """
    path = folder / PLAN
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        # A killed process may have left the beginning of the file.
        files = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if folder.exists() and files - {f"{PLAN}.tmp"}:
            raise UserError(
                f"--out {folder} is something else: give a new or empty folder"
            ) from None
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for name, before, now in _differences(old, plan):
        raise UserError(
            f"--out {folder} was encoded with {name} {_short(before)}, this is {_short(now)}: the two are "
            "not mixed; give another --out"
        )
    return True


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Makes a folder that `check_plan` has found not begun, or not quite."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / PLAN, plan)
    for part in (SHARDS, UNITS):
        (folder / part).mkdir(exist_ok=True)


def _differences(old: Any, new: Any, name: str = "") -> Iterable[tuple[str, Any, Any]]:
    """(dotted name, old, new) of leaves that are not the same."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield name, old, new
        return
    for key in [*new, *(key for key in old if key not in new)]:
        yield from _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_rejected(
    entries: list[dict[str, Any]], seen: int, limit: float, folder: Path, total: int
) -> None:
    """Ends the job once too many records of its units are rejected; ``rejected.jsonl`` is written first.

    Args:
      entries: of units that are done; seen: records of those units.
      limit, total: see `rejects.check_rejects`, which raises UserError.
    """
    found = rejects_of(entries)
    try:
        check_rejects(found, seen, limit, folder / REJECTED, total=total)
    except UserError:
        write_rejects(folder / REJECTED, found)
        raise


def rejects_of(entries: Iterable[dict[str, Any]]) -> list[Reject]:
    """The rejected records of some units."""
    return [Reject(**item) for entry in entries for item in entry["rejected"]]


def finish(job: Job, entries: list[dict[str, Any]], sigma_d: float) -> dict[str, Any]:
    """Writes what all units together are: null text, rejected records, and last the manifest.

    Args:
      entries: of all units, in order.
      sigma_d: standard deviation of data in training, for a word on whether the latents have it.

    Returns:
      The manifest.

    Raises:
      UserError: there is no record at all, or a file cannot be written.
    """
    shards = [shard for entry in entries for shard in entry["shards"]]
    write_rejects(job.folder / REJECTED, rejects_of(entries))
    if not shards:
        raise UserError(f"no record of {job.source.name} can be used: see {job.folder / REJECTED}")
    features = _write_null_text(job.folder / NULL_TEXT, job.encoders)
    records = _by_bucket(run for shard in shards for run in shard["buckets"])
    captions = _by_bucket(run for entry in entries for run in entry["captions"])
    factor = job.encoders.autoencoder.factor
    manifest = describe_job(job) | {
        "identity": digest(job.encoders.identity | {"dtype": np.dtype(job.dtype).name}),
        "records": sum(records.values()),
        "rejected": sum(len(entry["rejected"]) for entry in entries),
        "captions": sum(captions.values()),
        "without_caption": sum(entry["without_caption"] for entry in entries),
        "text_features": features,
        "buckets": [
            {
                "pixels": [h * factor, w * factor],
                "latents": [h, w],
                "records": records[h, w],
                "captions": captions[h, w],
            }
            for h, w in sorted(records)
        ],
        "latents": describe_latents(
            [entry["moments"] for entry in entries],
            job.encoders.identity["autoencoder"]["scaling_factor"],
            sigma_d,
        ),
        "null_text_sha256": hash_file(job.folder / NULL_TEXT),
        "shards": shards,
    }
    write_json_atomic(job.folder / MANIFEST, manifest)
    return manifest


def _by_bucket(runs: Iterable[list[int]]) -> dict[tuple[int, int], int]:
    """Sums of [h, w, count] by (h, w)."""
    counts: dict[tuple[int, int], int] = {}
    for height, width, count in runs:
        counts[height, width] = counts.get((height, width), 0) + count
    return counts


def _write_null_text(path: Path, encoders: Encoders) -> int:
    """Features of the null prompt; returns their number D."""
    text, mask = encoders.text_encoder.encode_plain([""])
    kept = np.asarray(mask[0], np.int32)
    text = np.where(kept[:, None] == 1, np.asarray(text[0], np.float32), 0)
    write_atomic(path, safetensors.numpy.save({"text": text, "mask": kept}))
    return text.shape[-1]


def describe_latents(
    moments: list[dict[str, Any]], scaling_factor: float, sigma_d: float
) -> dict[str, Any]:
    """Mean and standard deviation of latents by channel and over all, and whether training's sigma_d fits.

    Args:
      moments: of units, see `units`: values by channel, their sums and those of their squares.
      scaling_factor: of the autoencoder, by which latents were multiplied.
      sigma_d: training multiplies latents by it, and takes it for their standard deviation.
    """
    moments = [part for part in moments if part["count"]]
    count = sum(part["count"] for part in moments)
    means = sum(np.array(part["sums"]) for part in moments) / count
    squares = sum(np.array(part["squares"]) for part in moments) / count
    std = math.sqrt(max(0.0, float(squares.mean() - means.mean() ** 2)))
    words = f"latents have std {std:.3g}: sigma_d {sigma_d:g} stands for {std * sigma_d:.3g}"
    if FITTING[0] <= std <= FITTING[1]:
        words += ", which fits"
    elif std > 0:
        words += f", which does not fit; a scaling factor of {scaling_factor / std:.4g} would"
    return {
        "mean": means.tolist(),
        "std": np.sqrt(np.maximum(squares - means**2, 0)).tolist(),
        "overall_mean": float(means.mean()),
        "overall_std": std,
        "sigma_d": sigma_d,
        "fits": FITTING[0] <= std <= FITTING[1],
        "in_words": words,
    }


def is_complete(folder: Path) -> bool:
    """Whether a folder has its manifest."""
    return (folder / MANIFEST).is_file()
