"""A bounded search for the layout of a run that trains fastest.

For each ``fsdp`` (powers of two that divide the devices, small first) and each remat policy (least
recomputation first) the batch per device starts at the config's and doubles, or halves; from then on it is
where a straight line through the memory of the last two meets the limit, until one fits and one an eighth
larger does not. A larger ``fsdp`` and more recomputation only
buy memory, which bounds the search:

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
from .chips import GIB
from .topology import Topology

KEYS = ("batch", "fsdp", "remat")
POLICIES = ("none", "dots", "dots_no_batch", "full")
CLOSE = 0.03
# The keys of a plan that make one line of a sweep's table.
SUMMARY = ("mesh", "remat", "batch", "fits", "bytes_per_device", "step_seconds")
SUMMARY += ("images_per_second", "mfu", "bound")


def sweep(
    c: Config,
    topology: Topology,
    keys: tuple[str, ...],
    plan: Callable[[Config], dict],
    say: Callable[[str], None],
) -> list[dict]:
    """Plans all layouts, in order, and returns those that were compiled; `best` chooses.

    Args:
      keys: those of `KEYS` to vary; the others stay as the config has them.
      plan: `layout.plan_layout` of a config; say: takes lines of progress.
    """
    layouts = list(_layouts(c, topology, keys))
    tried: list[dict] = []
    ceiling = len(POLICIES)  # policies from here on are left out
    started = time.monotonic()
    for number, changes in enumerate(layouts, start=1):
        layout = c.override(changes)
        cost = POLICIES.index(layout.model.remat) if layout.model.remat in POLICIES else 0
        name = " ".join(f"{key}={value}" for key, value in changes.items()) or "the config's layout"
        if cost >= ceiling:
            say(f"{name}: left out, a cheaper layout is saturated")
            continue

        def attempt(changed: Config, name=name) -> dict:
            found = plan(changed)
            speed = f"{found['step_seconds']:.3g} s" if found["step_seconds"] else "-"
            used, limit = (found[key] / GIB for key in ("bytes_per_device", "limit_bytes"))
            verdict = "fits" if found["fits"] else "does not fit"
            minutes = (time.monotonic() - started) / 60
            say(
                f"{minutes:5.1f} min  {name}: batch {found['batch']}: {used:.2f} of {limit:.2f} GiB, "
                f"{speed}, {verdict}"
            )
            return found

        found = _batches(layout, topology, attempt) if "batch" in keys else [attempt(layout)]
        tried += found
        if _is_saturated(found):
            ceiling = cost
        left = (time.monotonic() - started) / number * (len(layouts) - number)
        say(f"layout {number} of {len(layouts)} done, at most {left / 60:.0f} min left")
    return tried


def best(plans: list[dict]) -> dict:
    """Returns the fastest plan that fits; the one nearest to fitting where none does."""
    fitting = [each for each in plans if each["fits"]]
    if not fitting:
        return max(plans, key=lambda each: each["spare_bytes"])
    fastest = max(each["images_per_second"] for each in fitting)
    close = [each for each in fitting if each["images_per_second"] >= 0.99 * fastest]
    return max(close, key=lambda each: (each["batch"], each["images_per_second"]))


def check_keys(text: str) -> tuple[str, ...]:
    """Returns the keys of a ``--sweep batch,fsdp,remat``. UserError for other words."""
    keys = tuple(word.strip() for word in text.split(","))
    for key in keys:
        if key not in KEYS:
            raise UserError(f"--sweep {text}: '{key}' is not one of {', '.join(KEYS)}", exit_code=2)
    return keys


def _layouts(c: Config, topology: Topology, keys: tuple[str, ...]) -> Iterator[dict]:
    """Overrides of the config, without the batch, in the order in which they are tried."""
    devices = len(topology.devices)
    fsdps = [2**i for i in range(devices.bit_length()) if devices % (2**i * c.mesh.tensor) == 0]
    for fsdp in fsdps if "fsdp" in keys else [c.mesh.fsdp]:
        for policy in POLICIES if "remat" in keys else [c.model.remat]:
            changes = {"mesh.fsdp": fsdp, "mesh.data": -1} if "fsdp" in keys else {}
            yield changes | ({"model.remat": policy} if "remat" in keys else {})


def _batches(c: Config, topology: Topology, attempt: Callable[[Config], dict]) -> list[dict]:
    """Plans of one layout by batch, until the largest that fits is known to an eighth."""
    unit = len(topology.devices) // c.mesh.tensor * c.accumulate
    found, counts, low, high = [], [], 0, None
    count = max(1, c.data.batch_size // unit)
    while high is None or high - low > max(1, low // 8):
        found.append(attempt(c.override({"data.batch_size": count * unit})))
        counts.append(count)
        if found[-1]["fits"]:
            low = count
        else:
            high = count
        count = _next(found, counts, low, high)
    return found


def _next(found: list[dict], counts: list[int], low: int, high: int | None) -> int:
    """The batch per device to try next; the largest that fits is at least ``low`` and below ``high``."""
    count = 2 * low if high is None else (low + high) // 2
    if len(found) > 1:
        sizes = [each["bytes_per_device"] for each in found[-2:]]
        slope = (sizes[1] - sizes[0]) / (counts[-1] - counts[-2])
        room = found[-1]["limit_bytes"] - sizes[1]
        count = counts[-1] + int(room // slope) if slope > 0 else count
    # What fits is known to fit: then it is the first that the search may end with.
    count = max(count, low + max(1, low // 8))
    return count if high is None else min(count, max(low + 1, high - 1))


def _is_saturated(found: list[dict]) -> bool:
    """Whether a larger batch would not make a layout faster, nor links slow it down."""
    fitting = sorted((each for each in found if each["fits"]), key=lambda each: each["batch"])
    half = [each for each in fitting if 2 * each["batch"] <= fitting[-1]["batch"]]
    if not half or fitting[-1]["bound"] in ("ici", "dcn"):
        return False
    return fitting[-1]["images_per_second"] < (1 + CLOSE) * half[-1]["images_per_second"]
