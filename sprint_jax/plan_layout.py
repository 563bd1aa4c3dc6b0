"""One layout of a run, compiled for a topology: what each device holds, computes and sends."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax

from . import hlo, train
from .chips import roofline
from .config import Config
from .errors import UserError
from .hlo_text import parse
from .topology import Topology, out_of_memory, quiet_libtpu
from .training import checks, setup, sharding

# In the order of the picture. 'heads' are the discriminator's with their optimizer.
KINDS = ("params", "ema", "optimizer", "heads", "frozen", "batch", "other", "temporaries", "code")


def plan_layout(c: Config, topology: Topology, algorithm: Callable[[Config], list[float]]) -> dict:
    """Compiles all updates of a config for a topology; runs nothing.

    Args:
      c: the resolved config; batch and mesh must fit the topology.
      algorithm: FLOPs per update that the algorithm asks of all devices together (`algorithm_flops`).

    Returns:
      What ``--out`` holds, see `sprint_jax.plan`. Where an update does not fit, what comes from compiled
      programs is None or empty.

    Raises:
      UserError: for a config that the topology cannot run.
    """
    mesh, updates, leaves = lower(c, topology)
    chip, devices = topology.chip, list(mesh.devices.flat)
    reports, programs, needed, rematerialized = [], [], None, []
    if sum(leaves.values()) > topology.hbm_bytes:
        # Not worth compiling: what is held between updates is too much already.
        needed, updates = sum(leaves.values()), []
    for name, lowered in updates:
        started = time.monotonic()
        with quiet_libtpu() as warnings:
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                needed = out_of_memory(error)
                if needed is None:
                    raise
                break
        rematerialized += warnings
        text = compiled.as_text()
        cost = hlo.analyze(text, dict(mesh.shape), (chip.flops, chip.hbm))
        leaves |= {leaf: size for leaf, size in _arguments(text).items() if leaf in leaves}
        programs.append(compiled.memory_analysis())
        reports.append(_update(name, cost, roofline(chip, cost, devices)))
        reports[-1]["compile_seconds"] = round(time.monotonic() - started, 1)
    kinds = _by_kind(leaves)
    if needed is None:
        peaks = [_peak(kinds, memory, programs) for memory in programs]
        peak = max(peaks, key=lambda each: sum(each.values()))
        for report, each in zip(reports, peaks, strict=True):
            report["bytes_per_device"] = sum(each.values())
    else:
        # What the compiler names counts the failed program alone, and at times only a part of it.
        peak = {**kinds, "temporaries": max(0.0, needed - sum(kinds.values())), "code": 0.0}
    total = sum(peak.values())
    fits = needed is None and total <= topology.hbm_bytes
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
        "involuntary_rematerializations": rematerialized,
        "updates": reports,
    }
    return plan | _totals(c, plan, topology, algorithm, needed is None)


def lower(c: Config, topology: Topology) -> tuple[jax.sharding.Mesh, list[tuple[str, Any]], dict]:
    """The updates of a config, traced for a topology, and bytes per device of all that they are given.

    Returns:
      mesh; [(name, lowered)]; bytes by leaf name, such as ``state.params['x']``, without padding.
    """
    mesh = sharding.make_mesh(**dict(c.mesh), devices=topology.devices)
    checks.check_values(c)
    checks.check_batch(c, mesh)
    nets, state, batch, frozen = setup.abstract_run(c, mesh)
    lowered = train.lower_updates(c, nets, state, batch, frozen)
    leaves = {
        f"{name}{jax.tree_util.keystr(path)}": math.prod(leaf.sharding.shard_shape(leaf.shape))
        * leaf.dtype.itemsize
        for name, tree in (("state", state), ("batch", batch), ("frozen", frozen))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    names = ["generator", "discriminator"] if c.stage == "distill" else ["flow"]
    if c.stage == "distill" and nets.heads is not None and len(lowered) == 1:
        names = ["joint"]  # of generator and discriminator, config.ladd.reuse_fakes
    return mesh, list(zip(names, lowered, strict=False)), leaves


def algorithm_flops(c: Config, topology: Topology) -> list[float]:
    """FLOPs per update that the algorithm asks for, all devices together: the traced program without remat.

    These are the numerator of MFU. What remat computes again, and what a compiler adds, is not in them.
    """
    _, updates, _ = lower(c.override({"model.remat": "none"}), topology)
    return [hlo.analyze(each.as_text(dialect="hlo")).total_flops for _, each in updates]


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


def _update(name: str, cost: hlo.Cost, roof) -> dict:
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
    if plan["involuntary_rematerializations"]:
        count = len(plan["involuntary_rematerializations"])
        found.append(f"the partitioner replicated {count} tensor(s) whole to reshard them")
    return found


def _arguments(text: str) -> dict[str, float]:
    """Bytes of a program's arguments by name, with the padding of their layouts."""
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


def _peak(kinds: dict[str, float], memory, programs: list) -> dict[str, float]:
    """Bytes by kind while one update runs: what is held anyway, its temporaries, all programs' code.

    Results that reuse no argument's memory count as temporaries.
    """
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = sum(program.generated_code_size_in_bytes for program in programs)
    temporaries = float(memory.temp_size_in_bytes + max(0, results))
    return {**kinds, "temporaries": temporaries, "code": float(code)}
