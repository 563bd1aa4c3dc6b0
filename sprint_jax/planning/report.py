"""A plan as text and as a picture."""

from pathlib import Path

from .chips import GIB
from .inference import CARDS
from .layout import KINDS


def table(plan: dict) -> str:
    """Returns a plan in lines for a terminal."""
    lines = [
        f"{plan['devices']} x {plan['chip']} ({plan['topology']}), mesh {_mesh(plan)}, global batch "
        f"{plan['batch']}, remat {plan['remat']}\n\nmemory per device, GiB"
    ]
    memory = {kind: size for kind, size in plan["memory"].items() if size}
    lines += [f"  {kind:<14}{size / GIB:9.3f}" for kind, size in memory.items()]
    if memory.get("code"):
        how = ", estimated" if plan["code_is_estimated"] else ""
        lines[-1] += f"  ({plan['programs']} programs{how})"
    used, limit, spare = (
        plan[key] / GIB for key in ("bytes_per_device", "limit_bytes", "spare_bytes")
    )
    verdict = f"fits, {spare:.2f} to spare" if plan["fits"] else f"DOES NOT FIT, by {-spare:.2f}"
    lines.append(f"  {'in all':<14}{used:9.3f} of {limit:.2f}: {verdict}")
    for update in plan["updates"]:
        lines.append(
            f"\n{update['name']} update: {update['flops_per_device'] / 1e12:.4g} TFLOP, "
            f"{update['hbm_bytes'] / 1e9:.4g} GB of memory traffic, {update['kernels']:.0f} kernels per "
            f"device; peak {update['bytes_per_device'] / GIB:.2f} GiB"
        )
        for kind, axes in update["collective_bytes"].items():
            for name, size in axes.items():
                count = update["collective_counts"][kind][name]
                lines.append(f"  {kind} over {name}: {size / 1e9:.4g} GB in {count:.0f}")
        parts = [f"{name} {_seconds(value)}" for name, value in update["roofline"].items() if value]
        least = f"{_seconds(update['seconds'])}, bound by {update['bound']}"
        lines.append(f"  at least {least} ({', '.join(parts)})")
    if not plan["fits"] and plan["updates"]:
        lines += [
            "\nlargest buffers:",
            *(f"  {each}" for each in plan["updates"][-1]["largest_buffers"]),
        ]
    if plan["step_seconds"]:
        lines.append(
            f"\nstep: at least {_seconds(plan['step_seconds'])} "
            f"({_seconds(plan['step_seconds_without_overlap'])} if no transfer hides behind arithmetic), "
            f"bound by {plan['bound']}\n"
            f"  {plan['images_per_second']:.4g} images/s (one batch per step counted); MFU at most "
            f"{100 * plan['mfu']:.1f} % ({plan['model_flops_per_device'] / 1e12:.4g} TFLOP per device that the "
            f"algorithm asks for, without remat; compiled {plan['flops_per_device'] / 1e12:.4g})"
        )
    return "\n".join(lines + [f"warning: {each}" for each in plan["warnings"]])


def sweep_table(plans: list[dict]) -> str:
    """Returns the layouts of a sweep, one a line."""
    rows = [("mesh", "remat", "batch", "GiB", "fits", "step s", "images/s", "MFU", "bound")]
    for each in plans:
        speed = ("-", "-", "-", "-")
        if each["step_seconds"]:
            speed = (f"{each['step_seconds']:.3g}", f"{each['images_per_second']:.4g}")
            speed += (f"{100 * each['mfu']:.0f} %", each["bound"])
        memory = f"{each['bytes_per_device'] / GIB:.2f}"
        fits = "yes" if each["fits"] else "no"
        rows.append((_mesh(each), each["remat"], str(each["batch"]), memory, fits, *speed))
    return _columns(rows)


def picture(plan: dict, path: Path) -> None:
    """Draws memory by kind as one stacked bar, with the limit as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.15), layout="constrained")
    axes = figure.subplots()
    name = f"{plan['topology']}\n{_mesh(plan)}\nbatch {plan['batch']}"
    left, limit = 0.0, plan["limit_bytes"] / GIB
    for number, kind in enumerate(KINDS):
        size = plan["memory"][kind] / GIB
        if size < 1e-4 * plan["bytes_per_device"] / GIB:  # too thin to be seen
            continue
        bars = axes.barh([name], [size], left=left, label=kind, color=f"C{number}", height=0.6)
        label = f"{size:.2f}" if size > 0.04 * limit else ""
        axes.bar_label(bars, [label], label_type="center", fontsize=7)
        left += size
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("GiB per device at the peak of a step (dashed: what a program may use)")
    axes.legend(ncols=5, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=120)


def sample_table(plan: dict) -> str:
    """Returns a plan of inference in lines for a terminal."""
    head = (
        "part",
        "calls",
        "TFLOP",
        "GB moved",
        "kernels",
        "weights GiB",
        "GiB",
        "at least",
        "bound",
    )
    lines = [f"{plan['model']} in {plan['dtype']} on one {plan['chip']} ({plan['topology']})"]
    for run in plan["runs"]:
        height, width = run["image"]
        rows, whole = [head], run["whole"]
        for part in (*run["parts"], whole | {"name": "whole", "calls": 1}):
            work = f"{part['flops'] / 1e12:.3g}", f"{part['hbm_bytes'] / 1e9:.3g}"
            memory = f"{part['weight_bytes'] / GIB:.2f}", f"{part['bytes'] / GIB:.2f}"
            counts = str(part["calls"]), *work, f"{part['kernels']:.0f}"
            rows.append((part["name"], *counts, *memory, _seconds(part["seconds"]), part["bound"]))
        lines.append(f"\n{_steps(run)}, {run['batch']} of {height}x{width}")
        lines += [f"  {line}" for line in _columns(rows).splitlines()]
        verdict = "fits" if whole["fits"] else "DOES NOT FIT"
        lines.append(
            f"  {whole['images_per_second']:.4g} images/s at most; {verdict} in "
            f"{plan['limit_bytes'] / GIB:.2f} GiB; fits cards of {_cards(whole['cards'])} GB, with one "
            f"part's weights at a time ({whole['bytes_in_turn'] / GIB:.2f} GiB) "
            f"{_cards(whole['cards_in_turn'])}"
        )
    rows = [("steps", "weights", *(f"{card} GB" for card in CARDS))]
    for each in plan["largest_batch"]:
        for key, name in (("bytes", "all"), ("bytes_in_turn", "in turn")):
            counts = (str(each[key][str(card)]) for card in CARDS)
            rows.append((str(each["steps"]), name, *counts))
    return "\n".join(lines + (["\nlargest batch", _columns(rows)] if len(rows) > 1 else []))


def sample_picture(plan: dict, path: Path) -> None:
    """Draws the least time of each run by parts, and its memory: weights, and what is beside them."""
    from matplotlib.figure import Figure

    runs = plan["runs"]
    figure = Figure(figsize=(9, 1.4 + 0.35 * len(runs)), layout="constrained")
    times, memory = figure.subplots(1, 2, sharey=True)
    names = [f"{_steps(run)}, batch {run['batch']}" for run in runs]
    for number, part in enumerate(part["name"] for part in runs[0]["parts"]):
        parts = [run["parts"][number] for run in runs]
        seconds = [1e3 * each["calls"] * each["seconds"] for each in parts]
        done = [
            sum(1e3 * each["calls"] * each["seconds"] for each in run["parts"][:number])
            for run in runs
        ]
        times.barh(names, seconds, left=done, label=part, color=f"C{number}", height=0.6)
    weights = [run["whole"]["weight_bytes"] / GIB for run in runs]
    beside = [run["whole"]["bytes"] / GIB - size for run, size in zip(runs, weights, strict=True)]
    memory.barh(names, weights, label="weights", color="C7", height=0.6)
    memory.barh(names, beside, left=weights, label="beside them", color="C8", height=0.6)
    times.set_xlabel("least ms")
    memory.set_xlabel("GiB")
    times.invert_yaxis()
    for axes in (times, memory):
        axes.legend(
            ncols=3, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False
        )
    figure.savefig(path, dpi=120)


def _steps(run: dict) -> str:
    return f"{run['steps']} step{'s' if run['steps'] > 1 else ''}"


def _cards(cards: list[int]) -> str:
    return ", ".join(map(str, cards)) or "none"


def _columns(rows: list[tuple]) -> str:
    """Rows of words as columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _mesh(plan: dict) -> str:
    axes = [f"{name} {size}" for name, size in plan["mesh"].items() if size > 1]
    return " x ".join(axes) or "1 device"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
