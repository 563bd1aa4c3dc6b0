"""Writes benchmarks/README.md from the files in benchmarks/results and benchmarks/plans.

    python benchmarks/make_readme.py

Each file becomes one or two short tables under the commands that print it.
"""

import collections
import json
from pathlib import Path

from sprint_jax.benchmarking import gpu_page
from sprint_jax.benchmarking.sections import SECTIONS

HERE = Path(__file__).parent

INTRODUCTION = """# Benchmarks

Made by `python benchmarks/make_readme.py` from [results](results) and [plans](plans); not to be edited. Each
table is of a file that the commands above it printed. Where no device is named, times were measured on two
CPU cores; the first line of most files says on what. Arms of a comparison took turns in every round; rounds
with more than 12 % foreign load were dropped ([timing](../sprint_jax/benchmarking/timing.py)). Times are
medians; times of others are over ours, round by round, as median [minimum, maximum]. Where the package is not
installed, scripts run with `PYTHONPATH=.` before them.
"""


def read(pattern: str) -> list[dict]:
    """All objects of the files: JSON lines, plans, or a report of digits and its runs."""
    found = []
    for path in sorted(HERE.glob(pattern)):
        text = path.read_text()
        lines = (
            [*map(json.loads, text.splitlines())] if path.suffix == ".jsonl" else [json.loads(text)]
        )
        for line in lines:
            found.append(line | {"file": f"{path.parent.name}/{path.name}"})
            shared = {
                key: found[-1][key] for key in ("model", "topology", "file") if key in found[-1]
            }
            found += [shared | run for run in line.get("runs", [])]
            if "real" in line:
                found.append(line["real"] | {"name": "real scenes, held-out handwriting"})
    return found


def prepared(line: dict) -> dict:
    """A line with what the rows need beside what is in it."""
    more = {"part_of": "-", "depthwise_speedup": "-"}
    spans = {arm: span(values) for arm, values in line.get("ratio", {}).items()}
    more["over"] = collections.defaultdict(lambda: "-", spans)
    more["kept"] = line.get("blocks", "")
    more["shape"] = line.get("size_in_out") or line.get("tokens")
    if "sprint_jax" in line.get("ms", {}):
        more["ours"] = line["ms"]["sprint_jax"][1]
    if "time_ratio" in line:
        more["span"] = span(line["time_ratio"])
    if "tangent_norm" in line:
        more["tangents"] = sorted(line["tangent_norm"])
        more["verdict"] = f"fails {', '.join(line['failed'])}" if line["failed"] else "ready"
    if "by_steps" in line:
        rows = [line["by_steps"][steps] for steps in ("1", "2", "4")]
        more["in_steps"] = ", ".join(with_error(row["accuracy"], ".1%") for row in rows)
        for name, form in (("frechet", ".1f"), ("diversity", ".2f")):
            more[f"{name}_in_steps"] = ", ".join(with_error(row[name], form) for row in rows)
    if "claim" in line:
        for name, form in (("accuracy", "+.1%"), ("frechet", "+.2f"), ("diversity", "+.3f")):
            found = line[name]
            values = with_error([found["mean"], found["standard_error"]], form)
            more[f"{name}_claimed"] = f"{values}, {found['verdict']}"
    if "faults" in line:
        more["wrong"] = line["faults"] + line["last_pictures_of_others"]
    if "collective_gb" in line:
        more["links"] = sum(line["collective_gb"].values())
    if "name" in line:
        more["right"] = "{accuracy:.1%} ± {standard_error:.1%}".format(
            **line["accuracy"]["overall"]
        )
        for section, key in (("frechet", "distance"), ("diversity", "combined")):
            value = line.get(section)
            more[key] = f"{value[key]:.2f} ± {value['standard_error']:.2f}" if value else "-"
    if "whole" in line:
        whole = line["whole"]
        more |= {"tflop": whole["flops"] / 1e12, "moved": whole["hbm_bytes"] / 1e9}
        more |= {"gib": whole["bytes"] / 2**30, "in_turn": whole["bytes_in_turn"] / 2**30}
        spent = (1e3 * part["calls"] * part["seconds"] for part in line["parts"])
        more |= {"least_ms": 1e3 * whole["seconds"]}
        more["of_parts"] = ", ".join(f"{each:.3g}" for each in spent)
    if line.get("largest_batch"):
        for key, name in (("bytes", "most"), ("bytes_in_turn", "most_in_turn")):
            cards = line["largest_batch"][0][key].items()
            more[name] = ", ".join(f"{card} GB: {count}" for card, count in cards)
    if "bytes_per_device" in line:
        more |= {"gib": line["bytes_per_device"] / 2**30, "limit": line["limit_bytes"] / 2**30}
        largest = max((each["batch"] for each in line.get("sweep", []) if each["fits"]), default=0)
        fastest = f"the fastest ({largest} fits)"
        more["chosen"] = fastest if largest > line["batch"] else "the largest tried that fits"
        if "sweep" not in line:
            more["chosen"] = "without a sweep"
    return more | line


def with_error(values: list[float | None], form: str) -> str:
    """A mean and its standard error, if it has one."""
    mean, error, *_ = values
    shown = "-" if mean is None else f"{mean:{form}}"
    return shown if error is None else f"{shown} ± {error:{form.lstrip('+')}}"


def span(values: list[float]) -> str:
    """Median [minimum, maximum] of [minimum, median, maximum]."""
    return "{1:.2f} [{0:.2f}, {2:.2f}]".format(*values)


def page() -> str:
    """The whole page."""
    facts = [read(name) for name in ("plans/*.json", "results/gpu.jsonl", "results/network.jsonl")]
    parts = [INTRODUCTION, gpu_page.section(*facts)]
    for pattern, title, command, tables in SECTIONS:
        lines = [prepared(line) for line in read(pattern)]
        commands = (
            [command] if command else [line["command"] for line in lines if "command" in line]
        )
        shown = "\n".join(each.replace(" --out ", " \\\n  --out ") for each in commands)
        files = "" if "*" in pattern else f"[{pattern}]({pattern})\n\n"
        parts.append(f"## {title}\n\n{files}```bash\n{shown}\n```\n")
        for key, head, row in tables:
            rule = " | ".join(["---"] * len(head.split(" | ")))
            rows = [row.format(**line) for line in lines if key in line]
            parts.append("".join(f"| {each} |\n" for each in (head, rule, *rows)))
    return "\n".join(parts)


if __name__ == "__main__":
    (HERE / "README.md").write_text(page(), encoding="utf-8")
