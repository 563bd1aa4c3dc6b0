"""The verdict on a teacher: limits on its measurements, and advice for each that is exceeded.

All limits are relative, so that they mean the same for other sizes, latents and resolutions. On digits
(docs/teachers.md), teachers with the dense time embedding had a tangent of 0.49 and a bend of 0.007 to 0.009,
those with times 0..1000 had 1.13 and 0.21, and only the former gave good students: these limits lie between.
No digits teacher came near the others: ``bfloat16`` 0.04 to 0.06, ``gradient`` 2.0 to 2.8, ``samples`` 1.03,
``learnt`` 0.23, ``lossless`` 1e-6.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

_DENSE = "use the dense time embedding, timestep_scale 0.001"
# Name: the limit, the number that it limits, and the advice if that is larger.
CHECKS = {
    "finite": (0.0, "numbers that are not finite", "the weights are damaged: load others"),
    # Prop. 3.1 is exact: more than rounding means that the network reacts to its inputs' last bits.
    "lossless": (1e-4, "relative error of the TrigFlow transform", _DENSE),
    "learnt": (
        0.9,
        "flow loss over that of the best linear guess",
        "train it longer, or check that data and latent scaling are those it was trained on",
    ),
    # Of all times; 1.25 in any bin of time.
    "kept": (1.1, "flow loss over that from before", "fine-tune it longer"),
    # The network's own change along the trajectory is at most half of sigma_d: the rest is derivative by time.
    "tangent": (1.0, "largest tangent over sigma_d F", f"{_DENSE}, and fine-tune longer"),
    # Central difference of relative step 0.005: training never resolves what bends within it.
    "bend": (0.05, "largest difference of derivative and central difference", _DENSE),
    "bfloat16": (
        0.2,
        "largest error of the tangent in bfloat16",
        "use QK norm and the dense time embedding, or config.scm.jvp_dtype=float32",
    ),
    # A bin above it would be all that a clipped step sees.
    "gradient": (
        10.0,
        "largest gradient over the median bin's",
        "use QK norm, and fine-tune longer",
    ),
    "samples": (
        2.0,
        "spread of samples over the data's, or the inverse",
        "look at samples.png; is the guidance too strong, or the shift another?",
    ),
}


class Check(NamedTuple):
    """One reason for or against: ``value`` is to be at most ``limit``; ``advice`` says what to do if not."""

    name: str
    value: float
    limit: float
    what: str
    advice: str

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit; NaN is not."""
        return self.value <= self.limit


def judge(found: dict[str, Any], before: dict[str, Any] | None = None) -> list[Check]:
    """Returns the checks of one teacher, in the order of `CHECKS`.

    Args:
      found: of `measure.measure`; before: the same of the network that it was made from, for ``kept``.
    """
    flow, tangent, transform = found["flow"], found["tangent"], found["transform"]
    numbers = [*flow["loss"], *transform.values(), *(x for name in tangent for x in tangent[name])]
    broken = sum(not math.isfinite(x) for x in numbers) + sum(x > 0 for x in tangent["nonfinite"])
    spread = found["samples"]["deviation"]
    values = {
        "finite": broken + 1.0 - found["samples"]["finite"],
        "lossless": _worst(transform.values()),
        "learnt": flow["mean"] / flow["linear_mean"],
        "tangent": _worst(tangent["size"]),
        "bend": _worst(tangent["bend"]),
        "bfloat16": _worst(tangent["bfloat16"]),
        "gradient": _worst(tangent["gradient"]) / float(np.median(tangent["gradient"])),
        "samples": _worst([max(spread, 1 / spread) if spread > 0 else math.inf]),
    }
    if before is not None:
        old = before["flow"]
        rise = [a / b for a, b in zip(flow["loss"], old["loss"], strict=True)]
        # One limit for both: a bin's share of its own 1.25.
        values["kept"] = max(flow["mean"] / old["mean"], _worst(rise) * 1.1 / 1.25)
    return [Check(name, values[name], *CHECKS[name]) for name in CHECKS if name in values]


def _worst(values: Iterable[float]) -> float:
    """Returns the largest, or infinity where one is not a number."""
    return max(x if math.isfinite(x) else math.inf for x in values)
