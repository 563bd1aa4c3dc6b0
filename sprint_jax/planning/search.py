"""A bounded search for the layout of a run that trains fastest.

For each ``fsdp`` (powers of two that divide the devices, small first) and each remat policy (least
recomputation first) the batch per device starts at the config's and doubles (or halves); two batches that
fit tell how memory grows, and where that line meets the limit is tried next, and so on until the largest
batch is known to an eighth or `REFINEMENTS` tries were made between one that fits and one that does not. A
larger ``fsdp`` and more recomputation only buy memory, which bounds the search:

- an ``fsdp`` whose state alone exceeds the memory is not compiled;
- a layout that does not fit one image per device ends there;
- a layout is saturated when links do not bound it and its last doubling of the batch gained less than
  `CLOSE` in images/s: a larger ``fsdp`` with this policy, or with one that recomputes more, cannot be faster
  and is left out.

The best layout is the fastest by roofline; within 1 %, the one with the larger batch.
"""

import time
from collections.abc import Callable, Iterator

from ..core.config import Config
from ..core.errors import UserError
from .topology import Topology

KEYS = ("batch", "fsdp", "remat")
POLICIES = ("none", "dots", "dots_no_batch", "full")
REFINEMENTS = 2
CLOSE = 0.03


def sweep(
    c: Config,
    topology: Topology,
    keys: tuple[str, ...],
    plan: Callable[[Config], dict],
    say: Callable[[str], None],
) -> list[dict]:
    """Plans of all layouts that were compiled, in order; `best` chooses.

    Args:
      keys: which of `KEYS` to vary; the others stay as the config has them.
      plan: `layout.plan_layout` of a config.
      say: takes lines of progress.
    """
    layouts = list(_layouts(c, topology, keys))
    tried: list[dict] = []
    ceiling = len(POLICIES)  # policies from here on are left out
    started = time.monotonic()
    for number, changes in enumerate(layouts):
        layout = c.override(changes)
        cost = POLICIES.index(layout.model.remat) if layout.model.remat in POLICIES else 0
        name = (
            " ".join(f"{key}={value}" for key, value in changes.items()) or "layout of the config"
        )
        if cost >= ceiling:
            say(f"{name}: left out, a cheaper layout is saturated")
            continue
        found = _largest_batch(layout, topology, keys, plan, _saying(say, name, started))
        tried += found
        if _saturated(found):
            ceiling = cost
        left = (time.monotonic() - started) / (number + 1) * (len(layouts) - number - 1)
        say(f"layout {number + 1} of {len(layouts)} done, at most {left / 60:.0f} min left")
    return tried


def best(plans: list[dict]) -> dict:
    """The fastest plan that fits; the one nearest to fitting where none does."""
    fitting = [each for each in plans if each["fits"]]
    if not fitting:
        return max(plans, key=lambda each: each["spare_bytes"])
    fastest = max(each["images_per_second"] for each in fitting)
    close = [each for each in fitting if each["images_per_second"] >= 0.99 * fastest]
    return max(close, key=lambda each: (each["batch"], each["images_per_second"]))


def summary(plan: dict) -> dict:
    """One line of a sweep's table."""
    keys = (
        "mesh",
        "remat",
        "batch",
        "fits",
        "bytes_per_device",
        "step_seconds",
        "images_per_second",
    )
    return {key: plan[key] for key in (*keys, "mfu", "bound")}


def check_keys(text: str) -> tuple[str, ...]:
    """The keys of a ``--sweep batch,fsdp,remat``. UserError for other words."""
    keys = tuple(word.strip() for word in text.split(","))
    for key in keys:
        if key not in KEYS:
            raise UserError(f"--sweep {text}: '{key}' is not one of {', '.join(KEYS)}", exit_code=2)
    return keys


def _layouts(c: Config, topology: Topology, keys: tuple[str, ...]) -> Iterator[dict]:
    """Overrides of the config, without the batch, in the order in which they are tried."""
    devices = len(topology.devices)
    fsdps = [c.mesh.fsdp]
    if "fsdp" in keys:
        tensor = c.mesh.tensor if "tensor" in c.mesh else 1
        fsdps = [2**i for i in range(devices.bit_length()) if devices % (2**i * tensor) == 0]
    for fsdp in fsdps:
        for policy in POLICIES if "remat" in keys else [c.model.remat]:
            changes = {"mesh.fsdp": fsdp, "mesh.data": -1} if "fsdp" in keys else {}
            yield changes | ({"model.remat": policy} if "remat" in keys else {})


def _largest_batch(c, topology, keys, plan, say) -> list[dict]:
    """Plans of one layout: doubling, then refinement."""
    unit = len(topology.devices) * c.accumulate
    if "tensor" in c.mesh and c.mesh.tensor > 1:
        unit //= c.mesh.tensor
    if "batch" not in keys:
        return [_tell(say, plan(c))]
    found: list[dict] = []

    def attempt(count: int) -> dict:
        found.append(_tell(say, plan(c.override({"data.batch_size": count * unit}))))
        return found[-1]

    low, high, count, tries = 0, 0, max(1, c.data.batch_size // unit), 0
    while True:
        if attempt(count)["fits"]:
            low = count
        else:
            high = count
        tries += bool(low and high)
        close = low // 8 if len([each for each in found if each["fits"]]) > 1 else 0
        count = _next(found, unit, topology.hbm_bytes, low, high, tries)
        if high == 1 or tries > REFINEMENTS or (high and high - low <= max(1, close)):
            return found
        if count - low <= close and not high:
            return found  # the next one would be hardly larger


def _next(found: list[dict], unit: int, limit: float, low: int, high: int, tries: int) -> int:
    """The batch per device to try next, between the largest that fits and the least that does not.

    Where a line through the smallest and the largest that fit, or through both ends, meets the limit; every
    other try between two ends halves what is left, since memory is no line near the limit, where the
    compiler begins to recompute. Without anything to go by, twice or half as many.
    """
    known = {each["batch"] // unit: each["bytes_per_device"] for each in found}
    fitting = sorted(each["batch"] // unit for each in found if each["fits"])
    ends = (low, high) if low and high else (fitting[0], fitting[-1]) if fitting else (0, 0)
    guess = (low + high) // 2 if high else 2 * low
    if ends[0] != ends[1] and known.get(ends[1], 0) > known.get(ends[0], 0) and tries % 2 == 0:
        slope = (known[ends[1]] - known[ends[0]]) / (ends[1] - ends[0])
        guess = min(int(low + (limit - known[low]) / slope), 4 * low)
    guess = max(guess, low + 1)
    return min(guess, high - 1) if high else guess


def _tell(say, plan: dict) -> dict:
    speed = f"{plan['step_seconds']:.3g} s" if plan["step_seconds"] else "-"
    used, limit = plan["bytes_per_device"] / 2**30, plan["limit_bytes"] / 2**30
    verdict = "fits" if plan["fits"] else "does not fit"
    say(f"batch {plan['batch']}: {used:.2f} of {limit:.2f} GiB, {speed}, {verdict}")
    return plan


def _saying(say, name: str, started: float):
    return lambda line: say(f"{(time.monotonic() - started) / 60:5.1f} min  {name}: {line}")


def _saturated(found: list[dict]) -> bool:
    """Whether a larger batch would not make a layout faster, nor links slow it down."""
    fitting = sorted((p for p in found if p["fits"]), key=lambda p: p["batch"])
    if len(fitting) < 2 or fitting[-1]["bound"] in ("ici", "dcn"):
        return False
    half = [p for p in fitting if 2 * p["batch"] <= fitting[-1]["batch"]]
    return (
        bool(half)
        and fitting[-1]["images_per_second"] < (1 + CLOSE) * half[-1]["images_per_second"]
    )
