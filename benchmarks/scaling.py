"""Scaling on paper: one distillation at a fixed batch per chip, compiled for 16, 64 and 256 chips.

    PYTHONPATH=. python benchmarks/scaling.py --config configs/sprint.py:1600m --chip v5e --per_chip 4

Compiles, runs nothing; needs libtpu (extra 'plan'). Writes benchmarks/plans/scaling.jsonl, one line per slice,
and scaling.png. Parameters are split over at most 64 chips, the rest of a slice replicates them. Weak scaling
needs FLOPs per chip that are flat and links that take less time than arithmetic; where links take longer, or
FLOPs per chip differ by more than 2 %, the script says so and ends with code 1.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from sprint_jax.core import cli
from sprint_jax.planning.chips import GIB
from sprint_jax.planning.layout import image_flops, plan_layout
from sprint_jax.planning.topology import open_topology

SLICES = {"v5e": ("4x4", "8x8", "16x16"), "v6e": ("4x4", "8x8", "16x16")}
LARGEST_FSDP = 64


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python benchmarks/scaling.py", description=__doc__)
    cli.add_config(parser)
    parser.add_argument("--chip", choices=sorted(SLICES), default="v5e")
    parser.add_argument("--per_chip", type=int, default=4, help="images per chip")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/plans/scaling.jsonl"))
    flags, c = cli.parse_with_config(parser, argv)
    lines = []
    for shape in SLICES[flags.chip]:
        topology = open_topology(f"{flags.chip}:{shape}")
        chips = len(topology.devices)
        changes = {"mesh.data": -1, "mesh.fsdp": min(chips, LARGEST_FSDP)}
        layout = c.override(changes | {"data.batch_size": chips * flags.per_chip})
        plan = plan_layout(layout, topology, image_flops(layout, topology))
        lines.append(line(plan))
        print(json.dumps(lines[-1]), flush=True)
    flags.out.write_text("".join(json.dumps(each) + "\n" for each in lines))
    draw(lines, flags.out.with_suffix(".png"))
    complaints = check(lines)
    print("\n".join(complaints) or "FLOPs per chip are flat, links take less time than arithmetic")
    sys.exit(1 if complaints else 0)


def line(plan: dict) -> dict:
    """What is plotted of one slice, per chip and step."""
    roofs = [update["roofline"] for update in plan["updates"]]
    return {
        "topology": plan["topology"],
        "chips": plan["devices"],
        "mesh": plan["mesh"],
        "batch": plan["batch"],
        "gib": plan["bytes_per_device"] / GIB,
        "tflop": plan["flops_per_device"] / 1e12,
        "collective_gb": {
            f"{kind} over {axes}": size / 1e9
            for kind, sizes in plan["collective_bytes"].items()
            for axes, size in sizes.items()
        },
        "compute_seconds": sum(roof["compute"] for roof in roofs),
        "memory_seconds": sum(roof["memory"] for roof in roofs),
        "link_seconds": sum(roof["ici"] + roof["dcn"] for roof in roofs),
        "step_seconds": plan["step_seconds"],
    }


def check(lines: list[dict]) -> list[str]:
    """Where weak scaling is lost."""
    flops = [each["tflop"] for each in lines]
    found = []
    if max(flops) > 1.02 * min(flops):
        found.append(f"FLOPs per chip differ by {100 * (max(flops) / min(flops) - 1):.1f} %")
    for each in lines:
        if each["link_seconds"] > each["compute_seconds"]:
            found.append(
                f"{each['topology']}: links take {each['link_seconds']:.3g} s, arithmetic "
                f"{each['compute_seconds']:.3g} s"
            )
    return found


def draw(lines: list[dict], path: Path) -> None:
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, 4)
    chips = [str(each["chips"]) for each in lines]
    axes[0].bar(chips, [each["gib"] for each in lines])
    axes[0].set_title("GiB per chip")
    axes[1].bar(chips, [each["tflop"] for each in lines], color="C1")
    axes[1].set_title("TFLOP per chip")
    axes[2].bar(chips, [sum(each["collective_gb"].values()) for each in lines], color="C2")
    axes[2].set_title("GB over links per chip")
    for number, part in enumerate(("compute", "memory", "link")):
        places = [i + 0.27 * (number - 1) for i in range(len(lines))]
        values = [each[f"{part}_seconds"] for each in lines]
        axes[3].bar(places, values, width=0.25, label=part, color=f"C{3 + number}")
    axes[3].set_xticks(range(len(lines)), chips)
    axes[3].set_title("seconds at peak")
    axes[3].legend(fontsize=7, ncols=3, loc="upper center")
    axes[3].set_ylim(0, 1.2 * axes[3].get_ylim()[1])
    for panel in axes:
        panel.set_xlabel("chips")
    figure.suptitle("per step", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run_command(main)
