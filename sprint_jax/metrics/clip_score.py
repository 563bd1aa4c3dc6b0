"""The CLIP score: how well pictures and their sentences agree."""

from collections.abc import Hashable, Sequence

import numpy as np

SCALE = 100.0  # exp(logit_scale) of all that OpenAI published


def clip_scores(image: np.ndarray, text: np.ndarray, scale: float = SCALE) -> np.ndarray:
    """Returns ``scale`` times the cosines of pictures [N, D] with their sentences [N, D]: [N] float64.

    SANA's script takes their mean, torchmetrics their mean or 0, whichever is larger.
    """
    image, text = (np.asarray(x, np.float64) for x in (image, text))
    cosines = (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    return scale * cosines


def mean_with_error(
    values: np.ndarray, groups: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """Returns the mean of values [N] and its standard error.

    Args:
      groups: of values that are not independent, such as the prompt of each picture; errors are then those
      of a
        mean over groups (cluster-robust).
    """
    values = np.asarray(values, np.float64)
    mean = values.mean()
    if groups is None or len(values) < 2:
        count = len(values)
        return float(mean), float(values.std(ddof=1) / count**0.5) if count > 1 else np.nan
    _, number = np.unique([str(group) for group in groups], return_inverse=True)
    sums = np.bincount(number, values - mean)
    count = len(sums)
    factor = count / (count - 1) if count > 1 else np.nan
    return float(mean), float(np.sqrt(factor * np.square(sums).sum()) / len(values))
