"""One layout of a run, compiled for a topology: what each device holds, computes and sends."""

import math

import jax

from ..core.config import Config
from ..data.buckets import count_sizes
from ..data.loader import ON_DEVICE
from ..training.stages import stage_of
from .chips import GIB, roofline
from .compile import Program, abstract, compile_update, lower
from .counts import analyze, collective_sums, total
from .hlo import argument_bytes
from .topology import Topology

# Where arrays belong, in the order of the picture; 'heads' (a critic) and 'fake' hold their optimizers too.
_PREFIXES = {
    "params": "state.params",
    "ema": "state.ema",
    "optimizer": "state.opt_state",
    "heads": "state.disc",
    "fake": "state.fake",
    "frozen": "frozen",
    "batch": "batch",
    "other": "",
}
KINDS = (*_PREFIXES, "temporaries", "code")
_LONGEST = 12  # lines of a list of the largest


def plan_layout(c: Config, topology: Topology, flops: dict[str, float], full: bool = False) -> dict:
    """Compiles all updates of a config for a topology; runs nothing.

    Args:
      flops: by update, of `image_flops`.
      full: compile to machine code, to know its size.

    Returns:
      The content of ``--out``, see docs/planning.md. Where an update does not fit, what comes from compiled
      programs is None or empty.

    Raises:
      UserError: for a config that the topology cannot run, or the compiler cannot compile.
    """
    mesh, (_, *trees) = abstract(c, topology)
    limit, devices = topology.hbm_bytes, list(mesh.devices.flat)
    leaves = _leaves(dict(zip(("state", "batch", "frozen"), trees, strict=True)))
    programs: list[Program] = []
    functions = stage_of(c).updates(c)
    if sum(leaves.values()) <= limit:  # else not worth compiling
        for number, function in enumerate(functions):
            first = functions.index(function)  # a step may run a program several times
            again = first < number
            programs.append(programs[first] if again else compile_update(c, topology, number, full))
            if not programs[-1].fits:
                break
    arguments = [argument_bytes(program.text) for program in programs]
    for sizes in arguments:
        leaves |= {name: size for name, size in sizes.items() if name in leaves}
    distinct = list({id(program): program for program in programs}.values())
    held, buckets = _by_kind(leaves), count_sizes(c)
    buckets = min(buckets, c.data.loaded_sizes or buckets)
    held["batch"] *= c.data.prefetch + ON_DEVICE
    # A run holds the programs of many sizes of pictures, which differ by their shapes alone.
    code = buckets * sum(program.code for program in distinct)
    peaks = [held]
    for program, sizes in zip(programs, arguments, strict=True):
        # Arguments that an update does not read, such as the EMA in the discriminator's, are held all the same.
        own = program.bytes - sum((sizes or leaves).values())
        peaks.append(held | {"temporaries": max(0.0, own), "code": code})
    peak = max(peaks, key=lambda each: sum(each.values()))
    used = sum(peak.values())
    updates, works = [], []
    for name, program, sizes in zip(flops, programs, peaks[1:], strict=False):
        if program.text:
            work = analyze(program.text, dict(mesh.shape), topology.chip.passes)
            roof = roofline(topology.chip, work, devices)
            updates.append(
                _update(name, program, work, roof) | {"bytes_per_device": sum(sizes.values())}
            )
            works += work
    plan = {
        "fits": len(updates) == len(flops) and all(p.fits for p in programs) and used <= limit,
        "spare_bytes": limit - used,
        "bytes_per_device": used,
        "limit_bytes": limit,
        "memory": peak,
        "batch": c.data.batch_size,
        "mesh": dict(mesh.shape),
        "topology": topology.name,
        "chip": topology.chip_name,
        "devices": len(devices),
        "remat": c.model.remat,
        "programs": buckets * len(distinct),
        "code_is_estimated": not all(program.code_is_known for program in programs),
        "involuntary_rematerializations": [line for p in distinct for line in p.warnings],
        "replicated_share": _replicated(trees[0], mesh),
        "updates": updates,
        "model_flops_per_device": sum(flops.values()) * c.data.batch_size / len(devices),
    }
    return plan | _totals(plan, topology.chip.flops, works, len(updates) == len(flops))


def image_flops(c: Config, topology: Topology) -> dict[str, float]:
    """Returns FLOPs per image that the algorithm asks for, by update: 'generator', 'fake', 'fake 2', 'flow' ...

    They are those of the traced program without remat, the numerator of MFU. What remat computes again, and
    what a compiler adds, is not in them. An update is named by its function. They do not depend on batch and
    mesh, but for the spectral norms of the heads: under 0.01 %.
    """
    names: list[str] = []
    for update in stage_of(c).updates(c):
        name = update.__name__.removesuffix("_update")
        before = sum(each.split()[0] == name for each in names)
        names.append(f"{name} {before + 1}" if before else name)
    lowered = lower(c.override({"model.remat": "none"}), topology)
    found = [total(analyze(each.as_text(dialect="hlo")), "flops") for each in lowered]
    return {name: each / c.data.batch_size for name, each in zip(names, found, strict=True)}


def _leaves(trees: dict) -> dict[str, float]:
    """Bytes per device of all arrays, by names such as ``state.params['x']``, without padding."""
    return {
        f"{name}{jax.tree_util.keystr(path)}": _bytes(leaf)
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _bytes(leaf: jax.ShapeDtypeStruct) -> float:
    """Bytes of an array on each device."""
    return float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)


def _by_kind(leaves: dict[str, float]) -> dict[str, float]:
    """Sums of leaf bytes; every device holds all of it between updates."""
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, size in leaves.items():
        kinds[next(kind for kind, prefix in _PREFIXES.items() if name.startswith(prefix))] += size
    return kinds


def _replicated(state, mesh: jax.sharding.Mesh) -> float:
    """The share of a device's state that ``fsdp`` and ``tensor`` could split but do not."""
    leaves = jax.tree.leaves(state)
    whole = sum(_bytes(leaf) for leaf in leaves if leaf.sharding.is_fully_replicated)
    split = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    return whole / sum(map(_bytes, leaves)) if split else 0.0


def _update(name: str, program: Program, works: list, roof) -> dict:
    """The entry of one update in a plan."""
    sums = collective_sums(works)
    largest = sorted(sums.items(), key=lambda item: -item[1][0])[:_LONGEST]
    return {
        "name": name,
        "flops_per_device": total(works, "flops"),
        "hbm_bytes": total(works, "hbm"),
        "kernels": total(works, "kernels"),
        "collective_bytes": _nested(sums, 0),
        "collective_counts": _nested(sums, 1),
        "seconds": roof.seconds,
        "seconds_without_overlap": sum(roof),
        "bound": roof.bound,
        "roofline": roof._asdict(),
        "host_memory_bytes": program.host_bytes,
        "largest_buffers": program.buffers,
        "largest_collectives": [
            {"op_name": op, "kind": kind, "axes": axes, "bytes": moved}
            for (op, kind, axes), (moved, _) in largest
        ],
    }


def _nested(sums: dict[tuple, tuple], which: int) -> dict[str, dict[str, float]]:
    """Adds up {(name, kind, axes): values} to {kind: {axes: value}}."""
    found: dict[str, dict[str, float]] = {}
    for (_, kind, axes), values in sums.items():
        sizes = found.setdefault(kind, {})
        sizes[axes] = sizes.get(axes, 0.0) + values[which]
    return found


def _totals(plan: dict, peak: float, works: list, complete: bool) -> dict:
    """Sums over the updates of one step; a step counts as one batch, though each update takes one."""
    updates = plan["updates"]
    seconds = sum(update["seconds"] for update in updates)
    found = {
        "flops_per_device": total(works, "flops"),
        "hbm_bytes": total(works, "hbm"),
        "kernels": total(works, "kernels"),
        "step_seconds": seconds,
        "step_seconds_without_overlap": sum(each["seconds_without_overlap"] for each in updates),
        "images_per_second": plan["batch"] / seconds if complete else None,
        "mfu": plan["model_flops_per_device"] / peak / seconds if complete else None,
        "bound": max(updates, key=lambda each: each["seconds"])["bound"] if complete else None,
    }
    found = found if complete else dict.fromkeys(found)
    collectives = _nested(collective_sums(works if complete else []), 0)
    return found | {"collective_bytes": collectives, "warnings": _warnings(plan)}


def _warnings(plan: dict) -> list[str]:
    """Lines that a user should read before paying for the run."""
    found = []
    for update in plan["updates"]:
        roof, name = update["roofline"], update["name"]
        links = roof["ici"] + roof["dcn"]
        if links > roof["compute"]:
            found.append(
                f"{name}: links take {links:.3g} s, more than the {roof['compute']:.3g} s of arithmetic"
            )
        for axes, size in update["collective_bytes"].get("all-to-all", {}).items():
            found.append(f"{name}: all-to-all over {axes} moves {size / 1e9:.3g} GB")
    if plan["replicated_share"] > 0.05:
        found.append(
            f"{100 * plan['replicated_share']:.0f} % of a device's state is whole on every device: "
            f"mesh.fsdp={plan['mesh']['fsdp']} divides neither axis of these arrays; a smaller one may"
        )
    if plan["memory"]["code"] > 0.1 * plan["limit_bytes"]:
        found.append(
            f"the code of {plan['programs']} programs takes {plan['memory']['code'] / GIB:.1f} GiB: load those "
            "of fewer sizes at once (data.loaded_sizes), or train on fewer sizes (data.most_sizes)"
        )
    if count := len(plan["involuntary_rematerializations"]):
        found.append(f"the partitioner replicated {count} tensor(s) whole to reshard them")
    return found
