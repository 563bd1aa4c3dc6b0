"""The verdict on a teacher: limits on its measurements, and advice for each that is exceeded.

All limits are relative, so that they mean the same for other sizes, latents and resolutions:

* ``finite``: no value may be NaN or infinite.
* ``lossless``: Prop. 3.1 is exact; in float32 rounding leaves 1e-5 or less, and 20 steps of a sampler ten times
  that. More means that the network reacts to its inputs' last bits.
* ``learnt``: a network whose flow loss is not below 0.9 of that of the best multiple of its input has learnt
  nothing that a student could be taught (digits teachers reach 0.24).
* ``kept``: with a teacher from before, the loss may be 1.1 of that one's, and in no bin of time 1.25.
* ``tangent``: the tangent is the network's own change along the trajectory, less ``cos t sin t x_t``, which is
  at most half of sigma_d. One as long as ``sigma_d F`` itself, in any bin, is mostly derivative by time.
* ``bend``: the jvp is to agree with a central difference of relative step 0.005 to 5 %. Where it does not, the
  network bends within a step that training never resolves, and its derivative says nothing about the next.
* ``bfloat16``: the tangent is to survive bfloat16 matmuls to 20 %.
* ``gradient``: no bin may have more than 10 times the median bin's gradient, which would then be all that a
  clipped step sees.
* ``samples``: the spread of 20-step samples is to be within a factor of 2 of the data's.

On digits (docs/teachers.md), teachers with the dense time embedding had a tangent of 0.49 and a bend of 0.007
to 0.009, those with times 0..1000 had 1.13 and 0.21, and only the former gave good students: the two limits lie
between. No digits teacher came near the other limits: ``bfloat16`` 0.04 to 0.06, ``gradient`` 2.0 to 2.8,
``samples`` 1.03, ``learnt`` 0.23, ``lossless`` 1e-6.
"""

import math
from typing import Any, NamedTuple

import numpy as np

# Name: the limit, the number that it limits, and the advice if that is larger.
CHECKS = {
    "finite": (
        0.0,
        "numbers that are not finite",
        "the weights are damaged or overflow: load others",
    ),
    "lossless": (
        1e-4,
        "relative error of the TrigFlow transform",
        "use the dense time embedding, timestep_scale 0.001",
    ),
    "learnt": (
        0.9,
        "flow loss over that of the best linear guess",
        "train it longer, or check that data and latent scaling are those it was trained on",
    ),
    "kept": (1.1, "flow loss over that from before", "fine-tune it longer"),
    "tangent": (
        1.0,
        "largest tangent over sigma_d F",
        "use the dense time embedding, and fine-tune longer",
    ),
    "bend": (
        0.05,
        "largest difference of derivative and central difference",
        "use the dense time embedding, timestep_scale 0.001",
    ),
    "bfloat16": (
        0.2,
        "largest error of the tangent in bfloat16",
        "use QK norm and the dense time embedding, or config.scm.jvp_dtype=float32",
    ),
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
        "lossless": _worst([transform["velocity"], transform["x0"], transform["samples"] / 10]),
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


def _worst(values: list[float]) -> float:
    """Returns the largest, or infinity where one is not a number."""
    return max(x if math.isfinite(x) else math.inf for x in values)
