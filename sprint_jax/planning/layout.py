"""One layout of a run, compiled for a topology: what each device holds, computes and sends."""

import math
from collections.abc import Callable
from typing import Any

import jax

from ..core.config import Config
from ..core.errors import UserError
from . import compile as plan_compile
from . import hlo
from .chips import roofline
from .compile import Program
from .hlo_text import parse
from .topology import Topology

# In the order of the picture. 'heads' are the discriminator's with their optimizer.
KINDS = ("params", "ema", "optimizer", "heads", "frozen", "batch", "other", "temporaries", "code")


def plan_layout(
    c: Config, topology: Topology, algorithm: Callable[[Config], list[float]], full: bool = False
) -> dict:
    """Compiles all updates of a config for a topology; runs nothing.

    Args:
      c: the resolved config; batch and mesh must fit the topology.
      algorithm: FLOPs per update that the algorithm asks of all devices together (`algorithm_flops`).
      full: compile to machine code, to know its size.

    Returns:
      What ``--out`` holds, see `sprint_jax.plan`. Where an update does not fit, what comes from compiled
      programs is None or empty.

    Raises:
      UserError: for a config that the topology cannot run.
    """
    mesh, (_, *trees) = plan_compile.abstract(c, topology)
    leaves = _leaves(dict(zip(("state", "batch", "frozen"), trees, strict=True)))
    chip, devices = topology.chip, list(mesh.devices.flat)
    programs: list[Program] = []
    if sum(leaves.values()) <= topology.hbm_bytes:  # else not worth compiling
        for number in range(len(plan_compile.names(c))):
            programs.append(plan_compile.compile_update(c, topology, number, full))
            if not programs[-1].fits:
                break
    reports, peaks = [], []
    for program in programs:
        leaves |= {leaf: size for leaf, size in _arguments(program.text).items() if leaf in leaves}
    kinds = _by_kind(leaves)
    for name, program in zip(plan_compile.names(c), programs, strict=False):
        peaks.append(_peak(kinds, program, programs))
        if program.text:
            cost = hlo.analyze(program.text, dict(mesh.shape), (chip.flops, chip.hbm))
            reports.append(_update(name, program, cost, roofline(chip, cost, devices)))
            reports[-1]["bytes_per_device"] = sum(peaks[-1].values())
    empty = {**kinds, "temporaries": 0.0, "code": 0.0}
    peak = max(peaks, key=lambda each: sum(each.values()), default=empty)
    total = sum(peak.values())
    complete = len(reports) == len(plan_compile.names(c))
    fits = complete and all(p.fits for p in programs) and total <= topology.hbm_bytes
    plan = {
        "fits": fits,
        "spare_bytes": topology.hbm_bytes - total,
        "bytes_per_device": total,
        "limit_bytes": topology.hbm_bytes,
        "memory": {kind: peak[kind] for kind in KINDS},
        "batch": c.data.batch_size,
        "mesh": dict(mesh.shape),
        "topology": topology.name,
        "chip": topology.chip_name,
        "devices": len(devices),
        "remat": c.model.remat,
        "code_is_estimated": not all(program.code_is_known for program in programs),
        "involuntary_rematerializations": [line for p in programs for line in p.warnings],
        "replicated_share": _replicated(trees[0], mesh),
        "updates": reports,
    }
    return plan | _totals(c, plan, topology, algorithm, complete)


def _leaves(trees: dict[str, Any]) -> dict[str, float]:
    """Bytes per device of all arrays, by names such as ``state.params['x']``, without padding."""
    return {
        f"{name}{jax.tree_util.keystr(path)}": float(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        )
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _replicated(state, mesh: jax.sharding.Mesh) -> float:
    """The share of a device's state that ``fsdp`` and ``tensor`` could split but do not."""
    leaves = jax.tree.leaves(state)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    whole = sum(
        x.size * x.dtype.itemsize
        for x in leaves
        if x.sharding.is_fully_replicated and mesh.size > 1
    )
    split = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    return whole / held if split and held else 0.0


def algorithm_flops(c: Config, topology: Topology) -> list[float]:
    """FLOPs per update that the algorithm asks for, all devices together: the traced program without remat.

    These are the numerator of MFU. What remat computes again, and what a compiler adds, is not in them.
    """
    updates = plan_compile.lower(c.override({"model.remat": "none"}), topology)
    return [hlo.analyze(each.as_text(dialect="hlo")).total_flops for each in updates]


def cached_algorithm(c: Config, topology: Topology) -> Callable[[Config], list[float]]:
    """`algorithm_flops` of configs that differ from ``c`` in batch, mesh and remat only, traced once.

    They are proportional to the batch but for the spectral norms of the heads, under 0.01 %.
    """
    base: list = []

    def flops(other: Config) -> list[float]:
        if not base:
            base.extend(algorithm_flops(c, topology))
        return [value * other.data.batch_size / c.data.batch_size for value in base]

    return flops


def _update(name: str, program: Program, cost: hlo.Cost, roof) -> dict:
    """What is said of one update."""
    if cost.unknown_loops:
        raise UserError(
            f"{name} update: the length of loop {cost.unknown_loops[0]} cannot be read from the program"
        )
    by_name = cost.bytes_by("op_name", "kind", "axes")
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:12]
    return {
        "name": name,
        "flops_per_device": cost.total_flops,
        "hbm_bytes": cost.traffic,
        "host_bytes": cost.host_traffic,
        "collective_bytes": _nested(cost.bytes_by("kind", "axes")),
        "collective_counts": _nested(_counts(cost)),
        "seconds": roof.seconds,
        "seconds_without_overlap": roof.serial,
        "bound": roof.bound,
        "roofline": roof._asdict(),
        "compile_seconds": round(program.seconds, 1),
        "host_memory_bytes": program.host_bytes,
        "largest_buffers": program.buffers,
        "largest_traffic": [
            {"op_name": op, "bytes": size}
            for op, size in sorted(cost.by_name.items(), key=lambda item: -item[1])[:12]
        ],
        "largest_collectives": [
            {"op_name": op, "kind": kind, "axes": axes, "bytes": size}
            for (op, kind, axes), size in largest
        ],
    }


def _counts(cost: hlo.Cost) -> dict[tuple, float]:
    found: dict[tuple, float] = {}
    for each in cost.collectives:
        found[each.kind, each.axes] = found.get((each.kind, each.axes), 0.0) + each.count
    return found


def _nested(values: dict[tuple, float]) -> dict[str, dict[str, float]]:
    """{(kind, axes): value} as {kind: {axes: value}}."""
    found: dict[str, dict[str, float]] = {}
    for (kind, axes), value in values.items():
        found.setdefault(kind, {})[axes] = value
    return found


def _totals(c, plan: dict, topology: Topology, algorithm, compiled: bool) -> dict:
    """Sums over the updates of one step; a step consumes one batch per update."""
    model = [value / plan["devices"] for value in algorithm(c)]
    totals = {
        "model_flops_per_device": sum(model),
        "flops_per_device": None,
        "hbm_bytes": None,
        "collective_bytes": {},
        "step_seconds": None,
        "images_per_second": None,
        "mfu": None,
        "bound": None,
        "warnings": _warnings(plan),
    }
    if not compiled:
        return totals
    updates = plan["updates"]
    seconds = sum(update["seconds"] for update in updates)
    summed: dict[tuple, float] = {}
    for update in updates:
        for kind, axes in update["collective_bytes"].items():
            for name, size in axes.items():
                summed[kind, name] = summed.get((kind, name), 0.0) + size
    slowest = max(updates, key=lambda update: update["seconds"])
    return totals | {
        "flops_per_device": sum(update["flops_per_device"] for update in updates),
        "hbm_bytes": sum(update["hbm_bytes"] for update in updates),
        "collective_bytes": _nested(summed),
        "step_seconds": seconds,
        "step_seconds_without_overlap": sum(u["seconds_without_overlap"] for u in updates),
        "images_per_second": c.data.batch_size / seconds,
        "mfu": sum(model) / topology.chip.flops / seconds,
        "bound": slowest["bound"],
    }


def _warnings(plan: dict) -> list[str]:
    """What a user should know before paying for the run."""
    found = []
    for update in plan["updates"]:
        roof, name = update["roofline"], update["name"]
        links = roof["ici"] + roof["dcn"]
        if links > roof["compute"]:
            found.append(
                f"{name}: links take {links:.3g} s, more than the {roof['compute']:.3g} s of arithmetic"
            )
        for kind in update["collective_bytes"].get("all-to-all", {}).items():
            found.append(f"{name}: all-to-all over {kind[0]} moves {kind[1] / 1e9:.3g} GB")
    if plan["replicated_share"] > 0.05:
        found.append(
            f"{100 * plan['replicated_share']:.0f} % of a device's state is whole on every device: "
            f"mesh.fsdp={plan['mesh']['fsdp']} divides neither axis of these arrays; a smaller one may"
        )
    if plan["involuntary_rematerializations"]:
        count = len(plan["involuntary_rematerializations"])
        found.append(f"the partitioner replicated {count} tensor(s) whole to reshard them")
    return found


def _arguments(text: str) -> dict[str, float]:
    """Bytes of a program's arguments by name, with the padding of their layouts."""
    if not text:
        return {}
    computations, entry = parse(text)
    return {
        each.op_name.replace("\\'", "'"): float(each.arrays[0].padded_bytes)
        for each in computations[entry].values()
        if each.opcode == "parameter" and each.op_name
    }


def _by_kind(leaves: dict[str, float]) -> dict[str, float]:
    """Sums of leaf bytes; every device holds all of it between updates."""
    prefixes = {
        "state.params": "params",
        "state.ema": "ema",
        "state.opt_state": "optimizer",
        "state.disc": "heads",
        "frozen": "frozen",
        "batch": "batch",
    }
    kinds = dict.fromkeys(KINDS[:-2], 0.0)
    for name, size in leaves.items():
        kind = next(
            (kinds_ for prefix, kinds_ in prefixes.items() if name.startswith(prefix)), "other"
        )
        kinds[kind] += size
    return kinds


def _peak(kinds: dict[str, float], program: Program, programs: list[Program]) -> dict[str, float]:
    """Bytes by kind while one update runs: what is held anyway, its temporaries, all programs' code.

    Arguments that an update does not read, such as the EMA in the discriminator's, are held all the same.
    """
    arguments = sum(_arguments(program.text).values())
    if not program.text:
        arguments = sum(kinds.values())
    temporaries = max(0.0, program.bytes - arguments)
    return {**kinds, "temporaries": temporaries, "code": sum(each.code for each in programs)}
