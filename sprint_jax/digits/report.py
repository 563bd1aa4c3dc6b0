"""The numbers of a report on the digits world, their references, and the goals."""

from typing import Any, NamedTuple

import numpy as np

from ..metrics.kernel import kid
from .detector import geneval_scores
from .judge import (
    Judge,
    PixelFeatures,
    Reading,
    binomial,
    diversity,
    frechet_distance,
    is_right,
    prompt_accuracy,
)
from .scenes import draw_images, held_out_prompts, to_float

GROUP = 8  # pictures of one prompt, which diversity compares with each other
FRECHET_MINIMUM = 128  # pictures that distances by 64 features need

# The goals of the project: (run, number, sense, limit, reference). With a reference run, 'at least' and 'at
# most' take the limit as a factor of its number, and 'within' as a difference.
GOALS = (
    ("teacher 20", "accuracy", "at least", 0.90, None),
    ("student 1", "accuracy", "at least", 0.80, None),
    ("student 2", "accuracy", "within", 0.03, "teacher 20"),
    ("student 4", "accuracy", "within", 0.03, "teacher 20"),
    ("student 1", "frechet", "at most", 1.5, "teacher 20"),
    ("student 1", "diversity", "at least", 0.8, "teacher 20"),
)


class Yardsticks(NamedTuple):
    """The judge, features, real pictures and prompts that all runs are measured with."""

    world: str
    judge: Judge
    features: PixelFeatures
    real: np.ndarray
    prompts: list[str]
    grouped: list[str]


def make_yardsticks(world: str, count: int, seed: int) -> Yardsticks:
    """Makes `Yardsticks`; there are two real pictures for each prompt, in held-out handwriting."""
    prompts = held_out_prompts(world, count, seed)
    # Another seed: with the same prompts, diversity and accuracy would not be independent.
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
    """Measures one run.

    Args:
      images: uint8 [N, H, W, 3] for the first N prompts.
      grouped: uint8 for all of ``sticks.grouped``, or None to leave out diversity.

    Returns:
      ``accuracy`` (overall and by category), ``geneval`` (by GenEval's laxer rules), ``unreadable``, and
      ``frechet``, ``kid`` and ``diversity``, None where not measured; and bool [N], whether each picture is
      right.
    """
    prompts, world, images = sticks.prompts[: len(images)], sticks.world, to_float(images)
    readings = sticks.judge.read(images)
    result = {
        "accuracy": prompt_accuracy(readings, prompts, world),
        "geneval": geneval_scores(readings, prompts, world),
        "unreadable": binomial("share", [not reading.readable for reading in readings]),
        "frechet": None,
        "kid": None,
        "diversity": None,
    }
    if len(images) >= FRECHET_MINIMUM:
        result["frechet"] = frechet_distance(images, sticks.real, sticks.features)
        found = kid(sticks.features(images), sticks.features(sticks.real), subsets=1)
        result["kid"] = {"distance": found.value, "standard_error": found.standard_error}
    if grouped is not None:
        readings_of_groups = sticks.judge.read(to_float(grouped))
        result["diversity"] = diversity_with_error(readings_of_groups, sticks.grouped, world)
    return result, is_right(readings, prompts, world)


def diversity_with_error(readings: list[Reading], captions: list[str], world: str) -> dict:
    """Returns `diversity` with ``standard_error`` of ``combined``, by a jackknife over tenths of the captions.

    It is over captions because pictures of one caption are not independent.
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


def readable(world: str, pictures: np.ndarray) -> np.ndarray:
    """Whether the judge can read each of the pictures, uint8 [N, H, W, 3]: bool [N]."""
    readings = Judge.fit(world).read(to_float(pictures))
    return np.asarray([reading.readable for reading in readings])


def measure_real(sticks: Yardsticks, seed: int) -> dict[str, Any]:
    """Measures real pictures in held-out handwriting, which give the highest possible accuracy."""
    images = draw_images(sticks.world, sticks.prompts, "test", seed)
    return {"accuracy": prompt_accuracy(sticks.judge.read(images), sticks.prompts, sticks.world)}


def judge_goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each of `GOALS` whose runs are there, with its value, limit and ``met``.

    ``standard_error`` is that of the value, ``margin_error`` that of the value less the limit, which may be of
    another run. Errors of two runs count as independent, which overestimates: they share prompts and noise.
    """
    runs = {result["name"]: result for result in results}
    goals = []
    for name, key, sense, limit, reference in GOALS:
        if name not in runs or (reference and reference not in runs):
            continue
        value, error = number(runs[name], key)
        margin_error = error
        if reference:
            base, base_error = number(runs[reference], key)
            factor = 1.0 if sense == "within" else limit
            limit = base - limit if sense == "within" else limit * base
            margin_error = float(np.hypot(error, factor * base_error))
        sense = "at most" if sense == "at most" else "at least"
        met = bool(value <= limit if sense == "at most" else value >= limit)
        goal = dict(run=name, number=key, value=value, standard_error=error, sense=sense)
        known = bool(np.isfinite([value, limit]).all())
        goal |= dict(limit=limit, margin_error=margin_error, met=met if known else None)
        goals.append(goal)
    return goals


def number(result: dict[str, Any], key: str) -> tuple[float, float]:
    """Returns the number of a goal and its standard error; NaN where it was not measured."""
    entry = result.get(key)
    if entry is None:
        return np.nan, np.nan
    if key == "accuracy":
        entry = entry["overall"]
    name = {"accuracy": "accuracy", "diversity": "combined"}.get(key, "distance")
    return entry[name], entry["standard_error"]
