"""A plan as text and as a picture."""

from pathlib import Path

from .chips import GIB
from .layout import KINDS


def table(plan: dict) -> str:
    """A plan in lines for a terminal."""
    mesh = (
        " x ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1)
        or "1 device"
    )
    lines = [
        f"{plan['devices']} x {plan['chip']} ({plan['topology']}), mesh {mesh}, global batch {plan['batch']}, "
        f"remat {plan['remat']}",
        "",
        "memory per device, GiB",
    ]
    memory = {kind: size for kind, size in plan["memory"].items() if size}
    lines += [f"  {kind:<14}{size / GIB:9.3f}" for kind, size in memory.items()]
    if plan["code_is_estimated"] and memory.get("code"):
        lines[-1] += "  (estimated)"
    spare = plan["spare_bytes"] / GIB
    verdict = f"fits, {spare:.2f} to spare" if plan["fits"] else f"DOES NOT FIT, by {-spare:.2f}"
    lines.append(
        f"  {'in all':<14}{plan['bytes_per_device'] / GIB:9.3f} of {plan['limit_bytes'] / GIB:.2f}: {verdict}"
    )
    for update in plan["updates"]:
        lines += ["", *_update(update)]
    if plan["step_seconds"]:
        lines += [
            "",
            f"step: at least {_seconds(plan['step_seconds'])} "
            f"({_seconds(plan['step_seconds_without_overlap'])} if no transfer hides behind arithmetic), "
            f"bound by {plan['bound']}",
            f"  {plan['images_per_second']:.4g} images/s (one batch per step counted); MFU at most "
            f"{100 * plan['mfu']:.1f} % ({plan['model_flops_per_device'] / 1e12:.4g} TFLOP per device that the "
            f"algorithm asks for, without remat; compiled {plan['flops_per_device'] / 1e12:.4g})",
        ]
    lines += [f"warning: {each}" for each in plan["warnings"]]
    return "\n".join(lines)


def sweep_table(lines: list[dict]) -> str:
    """The layouts of a sweep, one a line."""
    rows = [("mesh", "remat", "batch", "GiB", "fits", "step s", "images/s", "MFU", "bound")]
    for each in lines:
        mesh = " ".join(f"{name}={size}" for name, size in each["mesh"].items() if size > 1)
        speed = ("-", "-", "-", "-")
        if each["step_seconds"]:
            speed = (f"{each['step_seconds']:.3g}", f"{each['images_per_second']:.4g}")
            speed += (f"{100 * each['mfu']:.0f} %", each["bound"])
        memory = f"{each['bytes_per_device'] / GIB:.2f}"
        fits = "yes" if each["fits"] else "no"
        rows.append((mesh or "-", each["remat"], str(each["batch"]), memory, fits, *speed))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
        for row in rows
    )


def picture(plans: list[dict], path: Path) -> None:
    """Stacked bars of memory by kind, one per plan, with the limit as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.55 * len(plans)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(plans)
    largest = max(plan["bytes_per_device"] for plan in plans) / GIB
    names = [_name(plan) for plan in plans]
    for number, kind in enumerate(KINDS):
        sizes = [plan["memory"][kind] / GIB for plan in plans]
        if max(sizes) < 1e-4 * largest:  # too thin to be seen
            continue
        bars = axes.barh(names, sizes, left=left, label=kind, color=f"C{number}", height=0.6)
        total = max(plan["limit_bytes"] for plan in plans) / GIB
        axes.bar_label(
            bars,
            [f"{size:.2f}" if size > 0.04 * total else "" for size in sizes],
            label_type="center",
            fontsize=7,
        )
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for limit in {plan["limit_bytes"] / GIB for plan in plans}:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("GiB per device at the peak of a step (dashed: what a program may use)")
    axes.legend(ncols=5, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=120)


def _name(plan: dict) -> str:
    mesh = " ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1)
    return f"{plan['topology']}\n{mesh}\nbatch {plan['batch']}"


def _update(update: dict) -> list[str]:
    roof = update["roofline"]
    lines = [
        f"{update['name']} update: {update['flops_per_device'] / 1e12:.4g} TFLOP, "
        f"{update['hbm_bytes'] / 1e9:.4g} GB of memory traffic per device; "
        f"peak {update['bytes_per_device'] / GIB:.2f} GiB",
    ]
    for kind, axes in update["collective_bytes"].items():
        for name, size in axes.items():
            count = update["collective_counts"][kind][name]
            lines.append(f"  {kind} over {name}: {size / 1e9:.4g} GB in {count:.0f}")
    parts = ", ".join(f"{name} {_seconds(value)}" for name, value in roof.items() if value)
    lines.append(f"  at least {_seconds(update['seconds'])}, bound by {update['bound']} ({parts})")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
