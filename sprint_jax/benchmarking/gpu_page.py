"""The section of benchmarks/README.md on GPU machines: how one is measured, the goals, and its lines."""

import collections
from collections.abc import Sequence
from pathlib import PurePath

from . import goals

HOW = """## On a GPU machine

```bash
bash benchmarks/wheels.sh --python 3.12   # where there is a network: fills .wheels
bash benchmarks/gpu.sh                    # on the GPU machine, which needs none
python benchmarks/make_readme.py
```

The machine has Python 3.12 or newer with JAX 0.11 or newer for CUDA, torch and transformers; what else is
missing is unpacked from `.wheels` into `runs/gpu`. For at most ten minutes (`--seconds`) it measures, the most
important first and each part in a process of its own: matrix products and copies; transformer, decoder, text
encoder and the whole, with random weights in bfloat16, in turns with diffusers eager and compiled, whose
programs and ours are compiled beforehand; a distillation at the largest batch; pictures along a sketch; float32
outputs beside diffusers'; compiler options; the digits world. On one H200 ten minutes were enough for 0.6B at
batch 1 and the transformer at batch 10; their programs were compiled beside one another then. A line is in
`benchmarks/results/gpu.jsonl` as soon as it is known. The same command goes on where an earlier one was cut
off, on another machine too if it has that file; `--again` repeats what failed, `--alone` does without torch,
`--tiny` tries it on a CPU.

Goals, plans and what was measured; times in ms, of an H200 where no other device is named. A plan's time is the
least one by the device's peaks.
"""
GOALS = "what | must | hoped for | plan | measured"
# Of lines with a key: head, row.
TABLES = [
    ("ceiling", "ceiling | FLOP/s, bytes/s | device", "{ceiling} | {per_second:.3g} | {device}"),
    (
        "workload",
        "part | of | dtype | pictures | ms | eager | compiled | without waiting, ms",
        "{workload} | {of} | {dtype} | {batch} | {ours} | {over[diffusers]} "
        "| {over[diffusers compiled]} | {queued}",
    ),
    (
        "options",
        "network | compiler option | compilation, s | time over that without any",
        "{options} | {option} | {compile_s} | {over[option]}",
    ),
    (
        "images_per_second",
        "distillation | batch | images/s | ms, generator and discriminator | GB wanted",
        "{distill} | {batch} | {images_per_second:.3g} | {both} | {needed_gb}",
    ),
    ("digits", "digits, right in 1, 2, 4 steps", "{right}"),
]


def section(plans: Sequence[dict], gpu: Sequence[dict], cpu: Sequence[dict]) -> str:
    """Returns the section.

    Args:
      plans: of benchmarks/plans; gpu: all lines of the GPU machine; cpu: of the network on a CPU.
    """
    lines = goals.latest(gpu)
    parts = [HOW, _table(GOALS, [" | ".join(row) for row in goals.rows(plans, lines, cpu)])]
    for key, head, row in TABLES:
        if its := [row.format(**_prepared(line)) for line in lines if key in line]:
            parts.append(_table(head, its))
    return "\n".join(parts)


def _table(head: str, rows: Sequence[str]) -> str:
    rule = " | ".join(["---"] * len(head.split(" | ")))
    return "".join(f"| {each} |\n" for each in (head, rule, *rows))


def _prepared(line: dict) -> dict:
    """A line with what the rows need beside what is in it."""
    ratios = {
        arm: "{1:.2f} [{0:.2f}, {2:.2f}]".format(*v) for arm, v in line.get("ratio", {}).items()
    }
    ms = line.get("ms", {}).get(goals.OURS)
    more = {
        "of": PurePath(line.get("size", "")).name,
        "ours": f"{ms[1]:.4g}" if ms else "-",
        "over": collections.defaultdict(
            lambda: "-", ratios | {"option": ratios.get(line.get("option"), "-")}
        ),
        "queued": line.get("pipelined_ms", {}).get(goals.OURS, "-"),
        "right": ", ".join(f"{right:.0%}" for right in line.get("accuracy", {}).values()),
        "compile_s": line.get("failed", "-"),
    }
    if "images_per_second" in line:
        more["both"] = ", ".join(f"{values[1]:.4g}" for values in line["ms"].values())
    return more | line
