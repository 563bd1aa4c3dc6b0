"""The numbers of a report on the digits world: what is measured, against what, and the goals."""

from typing import Any, NamedTuple

import numpy as np

from .judge import (
    Judge,
    PixelFeatures,
    Reading,
    diversity,
    frechet_distance,
    is_right,
    prompt_accuracy,
)
from .scenes import draw_images, held_out_prompts, to_float

# Pictures of one prompt that diversity compares with each other.
GROUP = 8
# 64 features need so many pictures for a Frechet distance.
FRECHET_MINIMUM = 128

# What the project aims at: (run, number, 'at least' or 'at most', limit, relative to). Relative to a
# run, the limit is a factor of its number; an accuracy "within 3 points" is a difference.
GOALS = (
    ("teacher 20", "accuracy", "at least", 0.90, None),
    ("student 1", "accuracy", "at least", 0.80, None),
    ("student 2", "accuracy", "within", 0.03, "teacher 20"),
    ("student 4", "accuracy", "within", 0.03, "teacher 20"),
    ("student 1", "frechet", "at most", 1.5, "teacher 20"),
    ("student 1", "diversity", "at least", 0.8, "teacher 20"),
)


class Yardsticks(NamedTuple):
    """What pictures are measured with, and against."""

    world: str
    judge: Judge
    features: PixelFeatures
    real: np.ndarray
    prompts: list[str]
    grouped: list[str]


def make_yardsticks(world: str, count: int, seed: int) -> Yardsticks:
    """Judge, features, real pictures and prompts.

    The real pictures of the Frechet distance are for the same prompts, twice over, in held-out
    handwriting.
    """
    prompts = held_out_prompts(world, count, seed)
    # Another seed, since these may repeat: the same prompts would not be independent numbers.
    distinct = list(dict.fromkeys(held_out_prompts(world, count, seed + 1)))
    groups = distinct[: max(4, count // 40)]
    return Yardsticks(
        world=world,
        judge=Judge.fit(world),
        features=PixelFeatures.fit(world),
        real=draw_images(world, prompts * 2, "test", seed),
        prompts=prompts,
        grouped=[prompt for prompt in groups for _ in range(GROUP)],
    )


def measure(
    sticks: Yardsticks, images: np.ndarray, grouped: np.ndarray | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """The judge's numbers of one run.

    Args:
      images: uint8 [N, H, W, 3] for the first N prompts.
      grouped: uint8 for all of ``sticks.grouped``, or None where diversity is not measured.

    Returns:
      ``accuracy`` (overall and by category), ``unreadable``, ``frechet``, ``diversity``; None for
      what is not measured. And bool [N]: which pictures are right.
    """
    prompts = sticks.prompts[: len(images)]
    readings = sticks.judge.read(to_float(images))
    distance = None
    if len(images) >= FRECHET_MINIMUM:
        distance = frechet_distance(to_float(images), sticks.real, sticks.features)
    variety = None
    if grouped is not None:
        variety = diversity_with_error(
            sticks.judge.read(to_float(grouped)), sticks.grouped, sticks.world
        )
    result = {
        "accuracy": prompt_accuracy(readings, prompts, sticks.world),
        "unreadable": _share([not reading.readable for reading in readings]),
        "frechet": distance,
        "diversity": variety,
    }
    return result, is_right(readings, prompts, sticks.world)


def diversity_with_error(readings: list[Reading], captions: list[str], world: str) -> dict:
    """`diversity`, with ``standard_error`` of ``combined`` by a jackknife over captions.

    A tenth of the captions is left out at a time: pictures of one caption are not independent.
    """
    result = diversity(readings, captions, world)
    distinct = list(dict.fromkeys(captions))
    parts = min(10, len(distinct))
    values = []
    for part in range(parts):
        left_out = set(distinct[part::parts])
        kept = [pair for pair in zip(readings, captions, strict=True) if pair[1] not in left_out]
        values.append(diversity(*zip(*kept, strict=True), world)["combined"])
    spread = np.var(values) * (parts - 1)
    return result | {"standard_error": float(np.sqrt(spread))}


def measure_real(sticks: Yardsticks, seed: int) -> dict[str, Any]:
    """What the judge says of real pictures in held-out handwriting: the most one can reach."""
    images = draw_images(sticks.world, sticks.prompts, "test", seed)
    return {"accuracy": prompt_accuracy(sticks.judge.read(images), sticks.prompts, sticks.world)}


def judge_goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of `GOALS` whose runs are there, with its value, limit, standard errors and ``met``.

    Errors of two runs are taken as independent, which is cautious: prompts and noise are shared.
    """
    runs = {result["name"]: result for result in results}
    goals = []
    for name, key, sense, limit, reference in GOALS:
        if name not in runs or (reference and reference not in runs):
            continue
        value, error = number(runs[name], key)
        if reference:
            base, base_error = number(runs[reference], key)
            factor = 1.0 if sense == "within" else limit
            limit = base - limit if sense == "within" else limit * base
            error = float(np.hypot(error, factor * base_error))
        met = bool(value <= limit if sense == "at most" else value >= limit)
        goals.append(
            {
                "run": name,
                "number": key,
                "value": value,
                "sense": "at most" if sense == "at most" else "at least",
                "limit": limit,
                "standard_error": error,
                "met": met if np.isfinite([value, limit]).all() else None,
            }
        )
    return goals


def number(result: dict[str, Any], key: str) -> tuple[float, float]:
    """The number a goal is about, and its standard error; NaN where it was not measured."""
    entry = result[key]
    if entry is None:
        return np.nan, np.nan
    if key == "accuracy":
        entry = entry["overall"]
    name = {"accuracy": "accuracy", "frechet": "distance", "diversity": "combined"}[key]
    return entry[name], entry["standard_error"]


def _share(flags: list[bool]) -> dict[str, float]:
    share = float(np.mean(flags))
    return {"share": share, "standard_error": float(np.sqrt(share * (1 - share) / len(flags)))}
