"""The numbers of `evaluate` from features: which network each needs, its value, and its standard error."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import UserError
from . import clip_score, diversity, frechet, kernel
from .prdc import prdc
from .protocols import Protocol

POOL = 2048  # features of Inception's last pool; logits, if any, stand behind them


class Need(NamedTuple):
    """What a metric takes: networks for the pictures, and whether for the reference and its features too."""

    networks: tuple[str, ...]
    reference: bool = False
    features: bool = False
    prompts: bool = False


NEEDS = {
    "fid": Need(("inception",), reference=True),
    "fid_infinity": Need(("inception",), reference=True),
    "kid": Need(("inception",), reference=True, features=True),
    "prdc": Need(("inception",), reference=True, features=True),
    "is": Need(("inception",)),
    "clip": Need(("clip", "text"), prompts=True),
    "diversity": Need(("clip",), prompts=True),
    "cmmd": Need(("cmmd",), reference=True, features=True),
    "fd_dinov2": Need(("dinov2",), reference=True, features=True),
    "geneval": Need(()),
}


class Features(NamedTuple):
    """Features by network: of the pictures, and of the reference; its Inception moments; the prompts."""

    pictures: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]
    moments: frechet.Moments | None
    prompts: Sequence[str] | None


def check_metrics(names: Sequence[str], given: set[str]) -> None:
    """Refuses metrics that are unknown or lack something.

    Args:
      given: of 'reference', 'features' (a reference of pictures, not of statistics) and 'prompts'.

    Raises:
      UserError: exit code 2.
    """
    flags = dict(reference="--reference", features="--reference DIR", prompts="--prompts")
    for name in names:
        if name not in NEEDS:
            known = ", ".join(["digits", *NEEDS])
            raise UserError(f"--metrics {name} is not known: choose of {known}", exit_code=2)
        for what, flag in flags.items():
            if getattr(NEEDS[name], what) and what not in given:
                raise UserError(f"--metrics {name} needs {flag}", exit_code=2)


def check_counts(
    names: Sequence[str], count: int | None, reference: int | None, protocol: Protocol
) -> None:
    """Refuses metrics that so few pictures, or pictures of the reference, cannot have; None is any number.

    Raises:
      UserError: naming the metric and the least number.
    """
    least = {"fid": 2, "fid_infinity": 45, "kid": 2, "prdc": protocol.neighbours + 1, "is": 10}
    least |= {"clip": 1, "diversity": 2, "cmmd": 1, "fd_dinov2": 2}
    for name in names:
        # Of the reference FID's limit takes the moments alone, as FID does.
        others = least["fid"] if name == "fid_infinity" else least.get(name, 0)
        sides = [(count, "", least.get(name, 0))]
        sides += [(reference, " of the reference", others)] if NEEDS[name].reference else []
        for found, whose, lowest in sides:
            if found is not None and found < lowest:
                raise UserError(
                    f"{found} pictures{whose} are too few for {name}: at least {lowest}"
                )


def measure(names: Sequence[str], found: Features, protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Computes each metric: a dict of ``value`` and ``standard_error``, and what else there is to it.

    Raises:
      UserError: there are too few pictures for a metric.
    """
    count = min((len(x) for x in found.pictures.values()), default=0)
    theirs = min((len(x) for x in found.reference.values()), default=None)
    check_counts(names, count, theirs, protocol)
    return {name: _one(name, found, protocol) for name in names if name != "geneval"}


def _one(name: str, found: Features, protocol: Protocol) -> dict[str, Any]:
    ours, theirs = found.pictures, found.reference
    if name in ("fid", "fid_infinity", "kid", "prdc", "is"):
        pool = ours["inception"][:, :POOL]
        other = theirs["inception"][:, :POOL] if "inception" in theirs else None
    if name == "fid":
        value, error = frechet.distance_with_error(pool, found.moments, other)
        return _number(value, error, pictures=len(pool))
    if name == "fid_infinity":
        value, error, curve = frechet.infinity(pool, found.moments)
        return _number(value, error, curve=curve)
    if name == "kid":
        how = protocol.kid_subsets, protocol.kid_size, protocol.kid_seed
        kid = kernel.kid(pool, other, *how)
        return _number(kid.value, kid.standard_error, subset_mean=kid.mean, subset_std=kid.std)
    if name == "prdc":
        return {"parts": prdc(other, pool, protocol.neighbours)}
    if name == "is":
        value, spread = diversity.inception_score(ours["inception"][:, POOL:])
        # The ten splits' deviation has 10 in its denominator; that of a sample has 9.
        return _number(value, spread / 9**0.5, split_std=spread)
    if name == "clip":
        scores = clip_score.clip_scores(ours["clip"], ours["text"])
        value, error = clip_score.mean_with_error(scores, found.prompts)
        floor = max(value, 0.0) if protocol.clip_floor else value
        return _number(floor, error, histogram=_histogram(scores))
    if name == "diversity":
        value, error, groups = diversity.within_prompts(ours["clip"], found.prompts)
        return _number(value, error, prompts=groups, vendi=diversity.vendi(ours["clip"]))
    if name == "cmmd":
        return _number(*kernel.cmmd(ours["cmmd"], theirs["cmmd"]))
    own = frechet.moments(theirs["dinov2"])
    value, error = frechet.distance_with_error(ours["dinov2"], own, theirs["dinov2"])
    return _number(value, error)


def _number(value: float, error: float, **more: Any) -> dict[str, Any]:
    return {"value": float(value), "standard_error": float(error)} | more


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, 30)
    return {"counts": counts.tolist(), "edges": edges.tolist()}
