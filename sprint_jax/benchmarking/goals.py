"""Goals of speed and memory beside what plans promise and machines measured, as rows of one table.

Goals are for an H200 unless a row names another device. A plan's time is the least one by the device's peaks
(docs/planning.md); a measured one is a median, in milliseconds.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import NamedTuple

from .measure import OURS

PLANNED = "h200:1"
WHOLE = "whole, 1 steps"


class Facts(NamedTuple):
    """What is known: plans, lines of the GPU machine (`latest`), and lines of the network on a CPU."""

    plans: Sequence[dict]
    gpu: Sequence[dict]
    cpu: Sequence[dict]


class Goal(NamedTuple):
    """One row; ``plan`` and ``measured`` return '' for what is not known."""

    metric: str
    must: str
    ambitious: str
    plan: Callable[[Facts], str]
    measured: Callable[[Facts], str]


def latest(lines: Iterable[dict]) -> list[dict]:
    """Returns the lines of each part's last run in a file of benchmarks/gpu.sh, with its name and device."""
    found: dict[str, list[dict]] = {}
    part, device = "", ""
    for line in lines:
        if "began" in line:
            part = line["part"]
            found[part] = []
        elif "command" in line:
            device = line["device"]
        elif "ended" not in line and not part.startswith("programs"):  # timed beside others
            found.setdefault(part, []).append(line | {"part": part, "device": device})
    return [line for its in found.values() for line in its]


def rows(
    plans: Sequence[dict], gpu: Sequence[dict], cpu: Sequence[dict]
) -> list[tuple[str, str, str, str, str]]:
    """Returns all rows: metric, must, ambitious, plan, measured; arguments are those of `Facts`."""
    facts = Facts(plans, gpu, cpu)
    return [(*goal[:3], goal.plan(facts), goal.measured(facts)) for goal in GOALS]


def _part(name: str, sizes: Sequence[str], batch: int, per: str = "ms") -> tuple:
    """Plan and measurement of a part of inference for each size; ``per`` is 'ms' or 'images'."""

    def cell(value: float) -> str:
        return f"{value:.3g}" if per == "ms" else f"{value:.3g} images/s"

    def plan(facts: Facts) -> str:
        return _together(sizes, lambda size: _planned(facts, name, size, batch, per), cell)

    def measured(facts: Facts) -> str:
        device = ""

        def find(size: str) -> float | None:
            nonlocal device
            for line in facts.gpu:
                its = line.get("workload"), line.get("batch"), line.get("dtype")
                fits = its == (name, batch, "bfloat16") and line["part"] != "max-autotune"
                if fits and PurePath(line["size"]).name == size and line["ms"]:
                    device = line["device"]
                    return line["ms"][OURS][1] if per == "ms" else line["pictures_per_s"]
            return None

        return _on(_together(sizes, find, cell), device)

    return plan, measured


def _most(plan: dict) -> int:
    """The most images of a device: batches and temporaries grow with them, on a straight line."""
    grows = plan["memory"]["batch"] + plan["memory"]["temporaries"]
    room = plan["limit_bytes"] - plan["bytes_per_device"] + grows
    return int(room / grows * plan["batch"] / plan["devices"])


def _planned(
    facts: Facts, name: str, size: str, batch: int, per: str = "ms", where: str = PLANNED
) -> float | None:
    for plan in facts.plans:
        if plan.get("topology") == where and PurePath(plan.get("model", "")).name == size:
            for run in plan.get("runs", ()):
                if (run["batch"], run["steps"]) == (batch, 1):
                    parts = {part["name"]: part["calls"] * part["seconds"] for part in run["parts"]}
                    seconds = parts.get(name) or run["whole"]["seconds"]
                    return 1e3 * seconds if per == "ms" else batch / seconds
    return None


def _together(sizes: Sequence[str], find: Callable, cell: Callable) -> str:
    """Values of several sizes beside one another; '-' where only some are known."""
    values = [find(size) for size in sizes]
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else cell(value) for value in values)


def _on(text: str, device: str) -> str:
    return f"{text} ({device})" if text else ""


def _training(key: str) -> tuple:
    """Plan, for as few GPUs as there is one, and measurement of a distillation: 'mfu' or 'batch' of a GPU."""

    def plan(facts: Facts) -> str:
        def find(size: str) -> float | None:
            its = "H200", f"configs/sprint.py:{size}", True
            for plan in sorted(facts.plans, key=lambda plan: plan.get("devices", 0)):
                if (plan.get("chip"), plan.get("config"), plan.get("fits")) == its:
                    return plan["mfu"] if key == "mfu" else _most(plan)
            return None

        return _together(SIZES, find, "{:.0%}".format if key == "mfu" else "{:g}".format)

    def measured(facts: Facts) -> str:
        lines = {line["distill"]: line for line in facts.gpu if "images_per_second" in line}
        ceiling = [each["per_second"] for each in facts.gpu if each.get("ceiling") == "product"]
        device = next((line["device"] for line in lines.values()), "")

        def find(size: str) -> float | None:
            if size not in lines or not ceiling:
                return None
            share = lines[size]["flops_per_second"] / ceiling[0]
            return share if key == "mfu" else lines[size]["batch"]

        # Of what the card multiplies, not of its datasheet, as in a plan.
        cell = "{:.0%} of the measured product".format if key == "mfu" else "{:g}".format
        return _on(_together(SIZES, find, cell), device)

    return plan, measured


def _on_tpus(facts: Facts) -> str:
    """The least time of one picture of 0.6B on a v5e and a v6e."""
    places = "v5e:1x1", "v6e:1x1"
    text = _together(
        places, lambda at: _planned(facts, WHOLE, "600m", 1, where=at), "{:.3g} ms".format
    )
    return text and f"{text} at 100%"


def _on_cpu(size: str, workloads: Sequence[str], other: str) -> tuple:
    """The ratios of an arm's time to ours on a CPU."""

    def measured(facts: Facts) -> str:
        ratios = {
            line["workload"]: line["ratio"][other][1]
            for line in facts.cpu
            if line.get("size") == size and other in line.get("ratio", {})
        }
        return ", ".join(f"{ratios[name]:.2f}" for name in workloads if name in ratios)

    return _unknown, measured


def _over_forward(workload: str) -> tuple:
    """A workload's time over the forward pass's on a CPU, tiny / mid."""

    def measured(facts: Facts) -> str:
        def find(size: str) -> float | None:
            lines = [line for line in facts.cpu if line.get("size") == size]
            ms = {line["workload"]: line["ms"][OURS][1] for line in lines}
            return ms[workload] / ms["forward"] if {workload, "forward"} <= ms.keys() else None

        text = _together(("tiny", "mid"), find, "{:.2f}".format)
        return f"time {text} (CPU, tiny / mid)" if text else ""

    return _unknown, measured


def _cold(facts: Facts) -> str:
    for line in facts.cpu:
        if (line.get("size"), line.get("workload")) == ("mid", "backward"):
            return f"{line['cold_s'][OURS]:.1f} s (blocks apart)"
    return ""


def _eight(facts: Facts) -> dict:
    """The plan of 0.6B on eight v6e chips."""
    for plan in facts.plans:
        if (plan.get("topology"), plan.get("config")) == ("v6e:2x4", "configs/sprint.py:600m"):
            return plan
    return {}


def _state(facts: Facts) -> str:
    """The share of the state that a device of eight holds, beside what it would hold alone."""
    plan = _eight(facts)
    return f"{1 / 8 + 7 / 8 * plan['replicated_share']:.3f} (v6e:2x4)" if plan else ""


def _collectives(facts: Facts) -> str:
    plan = _eight(facts)
    if not plan:
        return ""
    exchanged = sum(plan["collective_bytes"].get("all-to-all", {}).values()) / 1e9
    warnings = len(plan["involuntary_rematerializations"])
    return f"-; {exchanged:.2g} GB; {warnings} (v6e:2x4)"


def _activations(facts: Facts) -> str:
    plan = _eight(facts)
    if not plan:
        return ""
    each = plan["memory"]["temporaries"] * plan["devices"] / plan["batch"] / 1e9
    return f"{each:.2f} (both updates whole, v6e:2x4)"


def _unknown(facts: Facts) -> str:
    del facts
    return ""


SIZES = ("600m", "1600m")
EAGER, COMPILED = "diffusers", "diffusers compiled"
ALL = ("forward", "jvp", "backward", "scm")
NONE = _unknown, _unknown
GOALS = [
    Goal("transformer 0.6B, batch 1, ms", "7", "3.5", *_part("transformer", SIZES[:1], 1)),
    Goal("transformer 1.6B, batch 1, ms", "11", "6.3", *_part("transformer", SIZES[1:], 1)),
    Goal(
        "transformer 0.6B / 1.6B, batch 10, ms",
        "40 / 85",
        "24 / 57",
        *_part("transformer", SIZES, 10),
    ),
    Goal("decoder, batch 1, ms", "30", "17", *_part("decoder", SIZES[:1], 1)),
    Goal("text encoder, batch 1, ms", "8", "3.5", *_part("text", SIZES[:1], 1)),
    Goal(
        "prompt to picture 0.6B / 1.6B, 1 step, ms",
        "50 / 55",
        "25 / 29",
        *_part(WHOLE, SIZES, 1),
    ),
    Goal(
        "the same along a new sketch",
        "",
        "40 / 40",
        _unknown,
        _part("control, 1 steps", SIZES, 1)[1],
    ),
    Goal(
        "the same along a remembered sketch",
        "",
        "30 / 30",
        _unknown,
        _part("control remembered, 1 steps", SIZES, 1)[1],
    ),
    Goal(
        "the same without a sketch, 0.6B, batch 10",
        "30 images/s",
        "45",
        *_part(WHOLE, SIZES[:1], 10, "images"),
    ),
    Goal(
        "v5e / v6e, prompt to picture 0.6B, of roofline",
        "40% / 30%",
        "60% / 45%",
        _on_tpus,
        _unknown,
    ),
    Goal("MFU of distillation, 0.6B / 1.6B", "30% / 35%", "45% / 52%", *_training("mfu")),
    Goal(
        "largest batch of a GPU, remat, EMA, 0.6B / 1.6B",
        "128 / 64",
        "250 / 118",
        *_training("batch"),
    ),
    Goal("JVP over forward", "FLOPs 2.0, time 2.3", "time 1.9", *_over_forward("jvp")),
    Goal("sCM branch over forward", "FLOPs 4.0, time 5.5", "time 4.5", *_over_forward("scm")),
    Goal(
        "CPU tiny, eager over ours: forward, JVP, backward, sCM",
        "1.0, 2.0, 0.85, 1.3",
        "1.3, 2.3, 1.05, 1.7",
        *_on_cpu("tiny", ALL, EAGER),
    ),
    Goal(
        "CPU tiny, compiled over ours: forward, backward",
        "0.95, 0.8",
        "1.1, 1.0",
        *_on_cpu("tiny", ("forward", "backward"), COMPILED),
    ),
    Goal(
        "CPU mid, eager over ours: forward, JVP, backward, sCM",
        "0.95, 1.5, 0.85, 1.25",
        "1.2, 1.9, 1.15, 1.7",
        *_on_cpu("mid", ALL, EAGER),
    ),
    Goal("CPU bfloat16", "no goal: XLA has no AMX", "", *NONE),
    Goal("compilation of mid's gradient on a CPU", "15 s", "8 s", _unknown, _cold),
    Goal("FSDP over 8: state per device, of all", "0.13", "0.126", _state, _unknown),
    Goal(
        "FSDP: all-gather over the least; all-to-all; reshardings",
        "1.05; 0; 0",
        "1.02; 0; 0",
        _collectives,
        _unknown,
    ),
    Goal(
        "activations of 0.6B, remat, sCM branch, GB per image",
        "0.25",
        "0.15",
        _activations,
        _unknown,
    ),
]
