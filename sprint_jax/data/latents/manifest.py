"""Plan and manifest of a folder of latents: its encoders and options, and its content in numbers."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import safetensors.numpy

from ...core.errors import UserError
from ...core.files import differences, read_json, write_atomic, write_json_atomic
from ...core.fingerprint import digest
from ...core.storage import AnyPath, make_folder
from ..rejects import REJECTED, Reject, check_rejects, write_rejects
from .cache import FORMAT, MANIFEST, NULL_TEXT, SHARDS, hash_file
from .units import UNITS, Job

PLAN = "encoding.json"
# Within these a standard deviation of latents is taken for the 1 that training assumes.
FITTING = (0.8, 1.25)


def describe_job(job: Job) -> dict[str, Any]:
    """Returns what all records of a folder have in common, JSON-able; with another value they are not mixed."""
    conditions = job.encoders.conditions
    control = conditions and conditions.identity | {"variants": conditions.variants}
    # Without conditions the entry is not there: folders that were begun before go on.
    return ({"control": control} if control else {}) | {
        "format": FORMAT,
        "encoders": job.encoders.identity,
        "dtype": np.dtype(job.dtype).name,
        "sizes": [list(size) for size in job.sizes],
        "unit": job.unit,
        "source": {"name": job.source.name, "identity": job.source.identity, "records": job.count},
    }


def check_plan(folder: AnyPath, plan: dict[str, Any]) -> bool:
    """Returns whether a folder was begun with this plan (of `describe_job`); False for one that is not begun.

    Raises:
      UserError: it was begun with another one, naming the first thing that differs, or is something else.
    """
    if not (folder / PLAN).is_file():
        # A killed process may have left the beginning of the file.
        files = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if folder.exists() and files - {f"{PLAN}.tmp"}:
            raise UserError(f"--out {folder} is something else: give a new or empty folder")
        return False
    for name, *values in differences(read_json(folder / PLAN), plan):
        before, now = map(_shorten, values)
        raise UserError(
            f"--out {folder} was encoded with {name} {before}, this is {now}: the two are not mixed; give "
            "another --out"
        )
    return True


def _shorten(value: Any) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def begin(folder: AnyPath, plan: dict[str, Any]) -> None:
    """Makes a folder that `check_plan` has found not begun, or not quite."""
    make_folder(folder)
    write_json_atomic(folder / PLAN, plan)
    for part in (SHARDS, UNITS):
        make_folder(folder / part)


def check_rejected(job: Job, entries: list[dict[str, Any]], seen: int, limit: float) -> None:
    """Ends the job once too many of ``seen`` records are rejected, with all of them in rejected.jsonl."""
    found, path = rejects_of(entries), job.folder / REJECTED
    try:
        check_rejects(found, seen, limit, path, total=job.count)
    except UserError:
        write_rejects(path, found)
        raise


def rejects_of(entries: Iterable[dict[str, Any]]) -> list[Reject]:
    """The rejected records of some units."""
    return [Reject(**item) for entry in entries for item in entry["rejected"]]


def finish(job: Job, entries: list[dict[str, Any]], sigma_d: float) -> dict[str, Any]:
    """Writes null text, rejected records, and last the manifest, from the entries of all units in order.

    Returns the manifest. Raises UserError if there is no record at all, or a file cannot be written.
    """
    shards = [shard for entry in entries for shard in entry["shards"]]
    write_rejects(job.folder / REJECTED, rejects_of(entries))
    if not shards:
        raise UserError(f"no record of {job.source.name} can be used: see {job.folder / REJECTED}")
    text, mask = job.encoders.text_encoder.encode_plain([""])
    kept = np.asarray(mask[0], np.int32)
    null = np.asarray(text[0], np.float32)  # padding included, which `data.null_mask=caption` shows
    content = safetensors.numpy.save({"text": null, "mask": kept})
    write_atomic(job.folder / NULL_TEXT, content)
    records: Counter = Counter()
    for height, width, count in (run for shard in shards for run in shard["buckets"]):
        records[height, width] += count
    factor = job.encoders.autoencoder.factor
    manifest = describe_job(job) | {
        "identity": digest(job.encoders.identity | {"dtype": np.dtype(job.dtype).name}),
        "records": records.total(),
        "rejected": sum(len(entry["rejected"]) for entry in entries),
        "captions": sum(entry["captions"] for entry in entries),
        "without_caption": sum(entry["without_caption"] for entry in entries),
        "text_features": null.shape[-1],
        "buckets": [
            {"pixels": [h * factor, w * factor], "latents": [h, w], "records": records[h, w]}
            for h, w in sorted(records)
        ],
        "latents": describe_latents(
            [entry["moments"] for entry in entries],
            job.encoders.identity["autoencoder"]["scaling_factor"],
            sigma_d,
        ),
        "null_padding": True,
        "null_text_sha256": hash_file(job.folder / NULL_TEXT),
        "shards": shards,
    }
    write_json_atomic(job.folder / MANIFEST, manifest)
    return manifest


def describe_latents(
    moments: list[dict[str, Any]], scaling_factor: float, sigma_d: float
) -> dict[str, Any]:
    """Computes mean and standard deviation of latents by channel and over all, and whether sigma_d fits.

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
    fits = FITTING[0] <= std <= FITTING[1]
    words = f"latents have std {std:.3g}: sigma_d {sigma_d:g} stands for {std * sigma_d:.3g}"
    if fits:
        words += ", which fits"
    elif std > 0:
        words += f", which does not fit; a scaling factor of {scaling_factor / std:.4g} would"
    return {
        "mean": means.tolist(),
        "std": np.sqrt(np.maximum(squares - means**2, 0)).tolist(),
        "overall_mean": float(means.mean()),
        "overall_std": std,
        "sigma_d": sigma_d,
        "fits": fits,
        "in_words": words,
    }
