"""The evaluation of pictures, from folders to a report: features, reference statistics, numbers."""

import hashlib
import io
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ..core.errors import UserError
from ..core.files import read_json, write_atomic, write_json_atomic
from ..core.fingerprint import digest
from ..core.storage import AnyPath, make_folder
from . import features, geneval, measures, networks, report
from .frechet import Moments, moments
from .inception import SIDE
from .pictures import Pictures, hash_contents, open_pictures, prompts_of, read_sizes
from .protocols import Protocol, describe


class Job(NamedTuple):
    """What is evaluated.

    Attributes:
      pictures: their folder.
      reference: a folder, a .npz file of statistics, or None.
      metrics: names of `measures.NEEDS`.
      places: of weights.
      cache: folder of features and statistics, which all processes see.
      prompts: of `pictures.read_prompts` for the whole folder, or None.
      boxes: GenEval's results.jsonl, or None.
      count: pictures to take from the folder; None for all.
      batch: pictures at once.
      command: of the report.
    """

    pictures: AnyPath
    reference: AnyPath | None
    metrics: list[str]
    protocol: Protocol
    places: networks.Places
    cache: AnyPath
    prompts: Any = None
    boxes: AnyPath | None = None
    count: int | None = None
    batch: int = 32
    command: str = ""


class Inputs(NamedTuple):
    """What a job has beside its pictures; None for what it has not.

    Attributes:
      theirs: pictures of the reference.
      stored: statistics of the reference.
      results: of GenEval's detector.
    """

    theirs: Pictures | None
    stored: Moments | None
    results: list[geneval.Result] | None


def networks_of(job: Job) -> set[str]:
    """Returns the names of the networks that the metrics of a job take."""
    return {name for metric in job.metrics for name in measures.NEEDS[metric].networks}


def check_job(job: Job) -> Inputs:
    """Opens all that a job needs beside its pictures, before these are drawn or any network is loaded.

    Raises:
      UserError: something is missing or damaged, or as `measures.check_metrics`.
    """
    given = {"reference"} if job.reference is not None else set()
    given |= {"features"} if given and job.reference.suffix != ".npz" else set()
    measures.check_metrics(job.metrics, given | ({"prompts"} if job.prompts is not None else set()))
    if "geneval" in job.metrics and job.boxes is None:
        raise UserError(
            "--metrics geneval needs --boxes FILE, the results.jsonl that GenEval's evaluate_images.py writes; "
            "draw the pictures for it with --prompts geneval",
            exit_code=2,
        )
    theirs = open_pictures(job.reference) if "features" in given else None
    stored = read_statistics(job.reference) if given and "features" not in given else None
    if stored is not None and len(stored.mu) != measures.POOL:
        what = f"statistics of {len(stored.mu)} features, not of Inception's {measures.POOL}"
        raise UserError(f"--reference {job.reference} has {what}")
    many = len(theirs.names) if theirs else None
    measures.check_counts(job.metrics, None, many, job.protocol)
    results = None if job.boxes is None else geneval.read_results(job.boxes)
    networks.find_all(job.places, networks_of(job))
    return Inputs(theirs, stored, results)


def evaluate(
    job: Job, out: AnyPath, peers: Any = None, about: dict | None = None
) -> dict[str, Any]:
    """Computes the numbers of a job and writes its report; every process must call it.

    Args:
      out: of the report, a .json file; .md and .html are written beside it by process 0.
      about: what else the report says, such as the model that drew the pictures.

    Returns:
      The report on process 0, an empty dict on others.

    Raises:
      UserError: something is missing, damaged or too small.
    """
    _begin(peers, "opening pictures")
    theirs, stored, results = check_job(job)
    wanted = networks_of(job)
    ours = open_pictures(job.pictures, job.count)
    measures.check_counts(job.metrics, len(ours.names), None, job.protocol)
    if results is not None:
        _check_results(job.boxes, results, ours)
    prompts = None
    if job.prompts is not None:
        every = ours if job.count is None else open_pictures(job.pictures)
        prompts = prompts_of(every, job.prompts)[: job.count]
    make_folder(job.cache)
    found, used, views, timings = _all_features(job, wanted, ours, theirs, prompts, peers)
    protocol = job.protocol._replace(**views)
    _begin(peers, "measuring")
    known = _moments(job, found[1], stored, theirs, used)
    if jax.process_index() != 0:
        return {}
    rows = measures.Features(*found, known, prompts)
    numbers = measures.measure(job.metrics, rows, protocol)
    if "geneval" in job.metrics:
        pairs = [(result.request, result.correct) for result in results]
        missing = geneval.missing_tasks(result.request for result in results)
        mark = hashlib.sha256(job.boxes.read_bytes()).hexdigest()
        boxes = {"path": str(job.boxes), "sha256": mark}
        numbers["geneval"] = {"parts": geneval.summarize(pairs), "missing": missing, "boxes": boxes}
    mark = stored and digest_of(stored)
    if theirs:
        mark = _kept(job.cache, "contents", theirs, lambda: hash_contents(job.reference, theirs))
    written = {
        "command": job.command,
        "made": time.strftime("%Y-%m-%d"),
        "pictures": {"path": ours.origin, "identity": ours.identity},
        "reference": None if job.reference is None else str(job.reference),
        "protocol": describe(
            protocol,
            wanted,
            weights={name: network.weights for name, network in used.items()},
            networks={name: network.fields for name, network in used.items()},
            count=len(ours.names),
            formats=ours.formats,
            sizes=_kept(job.cache, "sizes", ours, lambda: read_sizes(job.pictures, ours)),
            reference=mark,
            prompts=None if prompts is None else digest(prompts),
        ),
        "metrics": numbers,
        "throughput": timings,
    } | (about or {})
    samples = [ours.read(i) for i in range(min(report.SAMPLES, len(ours.names)))]
    report.write(out, written, samples, prompts or [""] * len(samples))
    return written


def _begin(peers: Any, doing: str) -> None:
    """Tells the other processes of long work without steps, which the clock for steps would take for a halt."""
    if peers is not None:
        peers.at_phase(doing)


def _check_results(path: AnyPath, results: list[geneval.Result], pictures: Pictures) -> None:
    """Refuses results of GenEval's detector that are not one for each picture, by places in GenEval's layout.

    Folders above may have other names: the detector may have run on another machine. Pictures elsewhere, such
    as the grids that GenEval's own generator adds, need no result.
    """
    places = {name: _place(name) for name in pictures.names}
    given = [(result.filename, _place(result.filename)) for result in results]
    known, found = Counter(places.values()), Counter(place for _, place in given)
    missing = [name for name, place in places.items() if place is not None and not found[place]]
    foreign = [
        name
        for name, place in given
        if place is None or known[place] != 1 or found[place] != 1  # of none, or of several
    ]
    if missing or foreign:
        counts = f"{len(missing)} pictures without a result, {len(foreign)} results not of one picture alone"
        raise UserError(
            f"--boxes {path} is not of the pictures of {pictures.origin}: {counts}, such as "
            f"{(missing + foreign)[0]} (by NUMBER/samples/NUMBER.png)",
            exit_code=2,
        )


def _place(name: Any) -> str | None:
    """Returns where a picture lies in GenEval's layout; None if it lies elsewhere."""
    match = re.fullmatch(r"(?:.*/)?(\d+/samples/\d+\.png)", str(name))
    return match and match[1]


def _kept(cache: AnyPath, what: str, pictures: Pictures, find: Callable[[], Any]) -> Any:
    """Returns what ``find`` reads from pictures, which is kept: of many it takes minutes."""
    path = cache / f"{what}-{pictures.stamp[:16]}.json"
    if not path.exists():
        write_json_atomic(path, {what: find()})
    return read_json(path)[what]


def _all_features(
    job: Job, wanted: set[str], ours: Pictures, theirs: Pictures | None, prompts, peers
):
    """Extracts what the metrics need: ((pictures, reference), networks, views that differ, timings)."""
    found, used, views, timings = ({}, {}), {}, {}, {}
    how = dict(batch=job.batch, peers=peers)

    def take(name, network, view, reference):
        used[name] = network
        sides = [(found[0], "pictures", ours)]
        sides += [(found[1], "reference", theirs)] if reference and theirs else []
        for rows, side, pictures in sides:
            inputs = features.view_pictures(pictures, view)
            how["label"] = f"{name} of {side}"
            rows[name], timing = features.extract(network, inputs, job.cache, **how)
            if timing.rows:
                timings[how["label"]] = {
                    "pictures_per_second": timing.rows / timing.seconds,
                    "waited_for_pictures": timing.waiting / timing.seconds,
                }

    if "inception" in wanted:
        _begin(peers, "loading Inception")
        network = networks.load_inception_network(job.places, "is" in job.metrics)
        take("inception", network, networks.with_side(job.protocol.inception, SIDE), True)
    if "clip" in wanted:
        _begin(peers, "loading CLIP")
        sentences = prompts if "text" in wanted else None
        loaded = networks.load_clip_networks(job.places.clip, sentences, job.protocol)
        network, views["clip"], text, tokens = loaded
        take("clip", network, views["clip"], False)
        if text is not None:
            inputs, how["label"] = features.list_rows(tokens), "text"
            found[0]["text"], _ = features.extract(text, inputs, job.cache, **how)
    if "cmmd" in wanted:
        _begin(peers, "loading the CLIP of CMMD")
        network, views["cmmd"] = networks.load_cmmd_network(job.places.clip336, job.protocol)
        take("cmmd", network, views["cmmd"], True)
    if "dinov2" in wanted:
        _begin(peers, "loading DINOv2")
        network = networks.load_dinov2_network(job.places.dinov2)
        take("dinov2", network, job.protocol.dinov2, True)
    return found, used, views, timings


def _moments(job: Job, reference: dict, stored: Moments | None, theirs, used) -> Moments | None:
    """Returns Inception's moments of the reference; those of a folder are kept as pytorch-fid keeps its own."""
    if stored is not None or not {"fid", "fid_infinity"} & set(job.metrics):
        return stored
    view = job.protocol.inception._asdict()
    network = used["inception"]
    mark = digest([theirs.stamp, view, network.weights, network.fields])[:16]
    path = job.cache / f"reference-{mark}.npz"
    if path.exists():
        return read_statistics(path)
    made = moments(reference["inception"][:, : measures.POOL])
    if jax.process_index() == 0:
        write_statistics(path, made)
    return made


def read_statistics(path: AnyPath) -> Moments:
    """Reads a .npz file with ``mu`` and ``sigma``, of pytorch-fid, clean-fid or ours.

    Raises:
      UserError: it is missing, damaged or holds something else.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            mu, sigma = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
    except Exception as error:  # of zip, NumPy and the disk, a dozen classes
        raise UserError(f"{path} holds no statistics mu and sigma: {error}") from error
    fits = mu.ndim == 1 and sigma.shape == (len(mu), len(mu))
    if not fits or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise UserError(
            f"{path}: mu {mu.shape} and sigma {sigma.shape} are no statistics of features"
        )
    return Moments(mu, sigma)


def write_statistics(path: AnyPath, values: Moments) -> None:
    """Writes a .npz file that pytorch-fid reads."""
    content = io.BytesIO()
    np.savez(content, mu=values.mu, sigma=values.sigma)
    write_atomic(path, content.getvalue())


def digest_of(values: Moments) -> str:
    """Returns a hash of statistics."""
    return hashlib.sha256(values.mu.tobytes() + values.sigma.tobytes()).hexdigest()
