"""Writes benchmarks/README.md from the files in benchmarks/results and benchmarks/plans.

    python benchmarks/make_readme.py

Each file becomes one or two short tables under the commands that print it.
"""

import collections
import json
from pathlib import Path

from sprint_jax.benchmarking import gpu_page

HERE = Path(__file__).parent

INTRODUCTION = """# Benchmarks

Made by `python benchmarks/make_readme.py` from [results](results) and [plans](plans); not to be edited. Each
table is of a file that the commands above it printed. Where no device is named, times were measured on two
CPU cores; the first line of most files says on what. Arms of a comparison took turns in every round; rounds
with more than 12 % foreign load were dropped ([timing](../sprint_jax/benchmarking/timing.py)). Times are
medians; times of others are over ours, round by round, as median [minimum, maximum]. Where the package is not
installed, scripts run with `PYTHONPATH=.` before them.
"""

DIGITS = (
    "accuracy",
    "run | pictures | right | Fréchet | diversity",
    "{name} | {accuracy[overall][count]} | {right} | {distance} | {combined}",
)
# (files, title, command of files that do not name their own, tables of lines with a key: head, row)
SECTIONS = [
    ("results/full.json", "Digits, the full recipe", "", [DIGITS]),
    ("results/quickstart.json", "Digits, the quickstart", "", [DIGITS]),
    ("results/int8.json", "Digits, the full recipe's student in eight bits", "", [DIGITS]),
    (
        "results/control.jsonl",
        "Digits along sketches: a teacher, a student with its branch, a branch on a frozen student "
        "([picture](pictures/control.png))",
        "",
        [
            ("goal", "goal | limit | found", "{goal} | {limit:.3f} | {found:.3f}"),
            ("updates", "training | updates | minutes", "{network} | {updates} | {minutes:.0f}"),
            (
                "sketch",
                "network | steps | sketch | scale | IoU with the prompt's sketch | with the one that was shown "
                "| right",
                "{network} | {steps} | {sketch} | {scale:g} | {iou[iou]:.3f} ± {iou[standard_error]:.3f} "
                "| {followed[iou]:.3f} | {accuracy[accuracy]:.1%} ± {accuracy[standard_error]:.1%}",
            ),
        ],
    ),
    (
        "results/ablation.jsonl",
        "Teachers of four kinds on digits",
        "",
        [
            (
                "arm",
                "times, x | QK norm | `teacher_check` | tangent, bend (limits 1, 0.05) "
                "| tangent norm in distillation | right in 1, 2, 4 steps",
                "{timestep_scale} | {qk_norm} | {verdict} | {check[tangent]:.2f}, {check[bend]:.3f} "
                "| {tangents[0]:.1f} to {tangents[7]:.1f} | {in_steps}",
            ),
            (
                "fitted",
                "flow loss before | time embedding fitted | fine-tuned | kept | kept, fine-tuned",
                "{base:.3f} | {fitted:.3f} | {fitted, fine-tuned:.3f} | {kept:.3f} | {kept, fine-tuned:.3f}",
            ),
        ],
    ),
    (
        "results/two_modes.jsonl",
        "Two modes: blends between them at one step",
        "",
        [
            (
                "arm",
                "losses | blends | white ones, of half",
                "{arm} | {blends[0]:.1%} ± {blends[1]:.1%} | {white[0]:.1%} ± {white[1]:.1%}",
            )
        ],
    ),
    (
        "results/pruning.jsonl",
        "Depth pruning on digits",
        "",
        [("accuracy", "blocks | right", "{what} {kept} | {accuracy:.1%}")],
    ),
    (
        "results/network.jsonl",
        "The network beside diffusers, float32",
        "",
        [
            (
                "ms",
                "size | workload | ms | eager | compiled | our compilation, s",
                "{size} | {workload} | {ours:.4g} | {over[diffusers]} | {over[diffusers compiled]} "
                "| {cold_s[sprint_jax]:.1f}",
            )
        ],
    ),
    (
        "results/inference.jsonl",
        "Inference beside diffusers, float32",
        "",
        [
            (
                "ms",
                "part | pixels | ms | eager | channels last",
                "{workload} | {image} | {ours:.4g} | {over[diffusers]} | {over[diffusers channels last]}",
            )
        ],
    ),
    (
        "results/savings.jsonl",
        "Savings of inference that change no number",
        "python benchmarks/savings.py",
        [
            (
                "ms",
                "saving | size, channels in and out; tokens | ms | without it | relative error",
                "{what} | {shape} | {ours:.4g} | {over[off]} | {error:.0e}",
            )
        ],
    ),
    (
        "results/train_step.jsonl",
        "One distillation step (a busy machine)",
        "",
        [
            (
                "ms",
                "arm | part of | ms | FLOPs, in student forwards",
                "{arm} | {part_of} | {ms[1]:.4g} | {forwards[0]:.2f}",
            ),
            (
                "separate_over_shared",
                "primal and tangent in one pass | forwards | with a separate jvp | time of the separate jvp",
                "{separate_over_shared} | {forwards_shared[0]:.2f} | {forwards_separate[0]:.2f} | {span}",
            ),
        ],
    ),
    (
        "results/loop.jsonl",
        "The training loop",
        "",
        [
            (
                "ratio",
                "stage | ms a step | over a plain jitted step",
                "{stage} | {ms[sharded][1]:.4g} | {over[sharded]}",
            ),
            ("data_wait", "stage | waiting for data", "{stage} | {data_wait[1]:.1%}"),
        ],
    ),
    (
        "results/depthwise.jsonl",
        "The depthwise convolution",
        "",
        [
            (
                "workload",
                "workload | shape | ms | nine autodiffed shifts | their share alone | grouped convolution",
                "{workload} | {shape} | {ours:.4g} | {over[naive]} | {depthwise_speedup} | {over[grouped]}",
            )
        ],
    ),
    (
        "results/loader.jsonl",
        "The loader, 1024 pixels, bfloat16",
        "python benchmarks/loader.py --seconds 4 [--tokens 100]",
        [
            (
                "tokens",
                "tokens | images/s | a distillation of 0.6B consumes on an H200 | on eight v5e chips",
                "{tokens} | {images_per_second[median]:.0f} | {need[H200][45%]:.0f} at 45 % of peak, "
                "{need[H200][100%]:.0f} at all | {need[v5e host of 8 chips][45%]:.0f}, "
                "{need[v5e host of 8 chips][100%]:.0f}",
            )
        ],
    ),
    (
        "results/serve_load.jsonl",
        "The page's server under load, digits; twice on a machine that was busy with other work",
        "python benchmarks/serve_load.py --model runs/quickstart/student --browser\n"
        "# and for the same student with a control branch of three blocks, not trained",
        [
            (
                "load_before",
                "other work: load average before | cores",
                "{load_before:.1f} | {cores}",
            ),
            (
                "clients",
                "people | change | pictures/s | ms to the answer, median, 95 % | pictures in a call "
                "| wrong answers | server's MiB, early and late",
                "{clients} | {change} | {per_second:.0f} | {ms[median]:.0f}, {ms[p95]:.0f} | {batches:.1f} "
                "| {wrong} | {mib[0]:.0f}, {mib[1]:.0f}",
            ),
            (
                "gain",
                "pictures/s with calls of up to 8 over calls of one, 32 people",
                "{gain[median]:.2f} [{gain[min]:.2f}, {gain[max]:.2f}]",
            ),
            (
                "shown_after",
                "the picture is shown in Chromium after | ms, median, 95 % | pictures",
                "{shown_after} | {ms[median]:.0f}, {ms[p95]:.0f} | {pictures}",
            ),
        ],
    ),
    (
        "results/load_memory.jsonl",
        "Memory and time of loading a transformer",
        "python benchmarks/load_memory.py",
        [
            (
                "dtype",
                "size | dtype | devices | peak over size of the file | s",
                "{size} | {dtype} | {devices} | {peak_per_file:.2f} | {seconds}",
            )
        ],
    ),
    (
        "results/checkpoint_memory.jsonl",
        "Memory of checkpoints (a busy machine)",
        "python benchmarks/checkpoint_memory.py [--gigabytes 4 --devices 1]",
        [
            (
                "mode",
                "mode | devices | bytes of state | peak over state | training waits, s | s",
                "{mode} | {devices} | {state_bytes:.2g} | {peak_per_state:.2f} | {returned_seconds} "
                "| {seconds}",
            )
        ],
    ),
    (
        "plans/*.json",
        "Plans of runs on TPUs and GPUs (compiled, never run; see [docs/planning.md](../docs/planning.md))",
        "python -m sprint_jax.plan --config CONFIG --topology SLICE --sweep batch --out FILE",
        [
            (
                "fits",
                "config | devices | global batch | GiB per device, of | least step, s | MFU at most | bound",
                "[{config}]({file}) | {topology} | {batch}, {chosen} | {gib:.1f} of {limit:.2f} "
                "| {step_seconds:.1f} | {mfu:.0%} | {bound}",
            )
        ],
    ),
    (
        "plans/sample_*.json",
        "Plans of inference on one device (compiled, never run)",
        "python -m sprint_jax.plan --sample --model NAME --topology DEVICE --steps 1 --out FILE",
        [
            (
                "whole",
                "model | device | steps | batch | TFLOP | GB moved | kernels | GiB, one part's weights at once "
                "| least ms | text, transformer, decoder | images/s at most",
                "[{model}]({file}) | {topology} | {steps} | {batch} | {tflop:.3g} | {moved:.3g} "
                "| {whole[kernels]:.0f} | {gib:.1f}, {in_turn:.1f} | {least_ms:.3g} | {of_parts} "
                "| {whole[images_per_second]:.3g}",
            ),
            (
                "largest_batch",
                "model | planned for | most pictures in one step on a card of | one part's weights at once",
                "{model} | {topology} | {most} | {most_in_turn}",
            ),
        ],
    ),
    (
        "plans/scaling.jsonl",
        "One distillation of 1.6B on more chips ([picture](plans/scaling.png))",
        "python benchmarks/scaling.py --config configs/sprint.py:1600m",
        [
            (
                "chips",
                "slice | global batch | GiB per chip | TFLOP per chip | GB over links | arithmetic, s "
                "| links, s",
                "{topology} | {batch} | {gib:.2f} | {tflop:.2f} | {links:.1f} | {compute_seconds:.2f} "
                "| {link_seconds:.2f}",
            )
        ],
    ),
]


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
        more["in_steps"] = ", ".join(f"{right:.0%}" for right in line["accuracy"].values())
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
