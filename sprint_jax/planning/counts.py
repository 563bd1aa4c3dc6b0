"""FLOPs, memory traffic and collectives of a compiled program on one device, instruction by instruction.

XLA's ``cost_analysis`` cannot give them; docs/planning.md compares the two. FLOPs are those of matrix
products and convolutions, 2 per multiply-add. Traffic is what instructions read and write in a device's main
memory (HBM): a fusion once, a slice as its slice, an update in place as its update. Bytes of collectives are
those that a device must send, or receive, in an optimal algorithm over n devices: (n-1)/n of the gathered
array for all-gather, of the array before scattering for reduce-scatter, of the array for all-to-all; 2(n-1)/n
of the array for all-reduce; all of it for collective-permute.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..core.errors import UserError
from .flops import flops_of
from .hlo import Computation, Instruction, parse, replica_group, trip_count

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# TPUs multiply float32 in passes of bfloat16: one, three or six, as jax.lax.Precision documents.
PASSES = {"default": 1, "high": 3, "highest": 6}
_SLICES = {"dynamic-slice", "slice", "gather"}
# Instructions, and targets of custom calls, that name or pass on memory and move nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"}
_FREE |= {"opt-barrier", "add-dependency", "partition-id", "replica-id", "send"}
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "AsyncCollective", "AssumeGather")
# Libraries whose calls have one result, and beside it memory to work in.
_LIBRARIES = ("__cublas$", "__cudnn$")


class Collective(NamedTuple):
    """One transfer over ``size`` devices of the mesh axes ``axes``, "dcn" between slices.

    ``group`` is one group of their numbers, ``moved`` bytes over links per device; the parts of an asynchronous
    one share a ``channel``.
    """

    kind: str
    axes: str
    size: int
    group: tuple[int, ...]
    moved: float
    op_name: str = ""
    channel: str | None = None


class Work(NamedTuple):
    """An instruction that runs ``count`` times: FLOPs, bytes and collectives of each run on one device.

    ``passes`` is the FLOPs times the passes in which they are computed; ``kernels`` 1 if a GPU is given work,
    0 for names of memory and for ends of what runs beside.
    """

    count: float
    flops: float = 0.0
    passes: float = 0.0
    hbm: float = 0.0
    collectives: tuple[Collective, ...] = ()
    kernels: int = 0


def analyze(
    text: str, mesh_shape: dict[str, int] | None = None, passes: dict[str, int] = PASSES
) -> list[Work]:
    """Returns the work of a program on one device. Raises UserError for a loop whose length cannot be read.

    Args:
      text: ``compiled.as_text()``, or ``lowered.as_text(dialect="hlo")`` for the program before it is split
        over devices.
      mesh_shape: axis names and sizes, partition i being number i of the mesh in row-major order; names the
        axes of collectives.
      passes: of a float32 product by its precision, `chips.Chip.passes`.
    """
    computations, entry = parse(text)
    return list(_Program(computations, mesh_shape or {}, passes).work(entry, 1.0))


def total(works: Iterable[Work], field: str) -> float:
    """Returns the sum of ``flops``, ``hbm`` or ``kernels`` over all runs of all instructions."""
    return sum(work.count * getattr(work, field) for work in works)


def collective_sums(works: Iterable[Work]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Returns (bytes over links, number of runs) by (JAX's name of the operation, kind, axes)."""
    found: dict = {}
    for work in works:
        for each in work.collectives:
            key = (each.op_name, each.kind, each.axes)
            moved, count = found.get(key, (0.0, 0.0))
            found[key] = (moved + work.count * each.moved, count + work.count)
    return found


class _Program(NamedTuple):
    """The computations of one module, the mesh that it is split over, and passes of float32 products."""

    computations: dict[str, Computation]
    mesh_shape: dict[str, int]
    passes: dict[str, int]

    def work(self, name: str, count: float) -> Iterator[Work]:
        """The instructions of a computation that runs ``count`` times."""
        computation, seen = self.computations[name], set()
        for it in computation.values():
            if it.opcode == "while":
                trips = trip_count(self.computations, computation, it)
                if trips is None:
                    loop = it.op_name or it.name
                    raise UserError(f"the length of loop {loop} cannot be read from the program")
                yield from self.work(it.called[0], count * trips)
            elif it.opcode == "conditional":
                branches = [list(self.work(each, count)) for each in it.called]
                yield from max(branches, key=lambda b: (total(b, "flops"), total(b, "hbm")))
            elif it.opcode in ("call", "async-start"):
                for each in it.called:
                    yield from self.work(each, count)
            else:
                flops, passes, found = self.arithmetic(computation, it)
                # A TPU program spreads an asynchronous collective over several fusions of one channel.
                keys = [
                    (each.kind, each.channel or f"{it.name} {i}") for i, each in enumerate(found)
                ]
                new = {key: each for key, each in zip(keys, found, strict=True) if key not in seen}
                seen |= new.keys()
                hbm = traffic(self.computations, computation, it)
                yield Work(count, flops, passes, hbm, tuple(new.values()), int(not _is_free(it)))

    def arithmetic(self, computation: Computation, it: Instruction) -> tuple[float, float, list]:
        """FLOPs, FLOPs times passes, and collectives of an instruction and of all that is fused in it."""
        kind = it.opcode.removesuffix("-start")
        if it.opcode in ("fusion", "call"):
            inner = [self.computations[name] for name in it.called]
            parts = [self.arithmetic(each, part) for each in inner for part in each.values()]
            found = [each for part in parts for each in part[2]]
            opcodes = {each.opcode for part in inner for each in part.values()}
            if "dynamic-slice" in opcodes and not opcodes & {"dot", "convolution"}:
                # TPU's reduce-scatter: an all-reduce of which the fusion keeps a slice.
                for i, each in enumerate(found):
                    if each.kind == "all-reduce":
                        found[i] = each._replace(kind="reduce-scatter", moved=each.moved / 2)
            return sum(part[0] for part in parts), sum(part[1] for part in parts), found
        if kind in KINDS:
            return 0.0, 0.0, self.collective(computation, it, kind)
        if it.opcode == "send" and "_xla_megascale_transfer_type" in it.attributes:
            return 0.0, 0.0, [_between_slices(computation, it)]
        if it.opcode not in ("dot", "convolution", "custom-call"):
            return 0.0, 0.0, []
        arrays = [array for name in it.operands for array in computation[name].arrays[:1]]
        flops, precision = flops_of(it, arrays)
        wide = any(array.dtype == "f32" for array in arrays[:2])
        return flops, flops * (self.passes.get(precision, 1) if wide else 1), []

    def collective(self, computation: Computation, it: Instruction, kind: str) -> list[Collective]:
        """A collective, or none where each device keeps what it has."""
        operands = sum(computation[name].arrays[0].bytes for name in it.operands)
        arrays = it.arrays
        if it.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(it.operands) : 2 * len(it.operands)]  # (operands, results, flags)
        result = sum(array.bytes for array in arrays)
        names = it.op_name, it.attribute(r"channel_id=(\d+)")
        if kind == "collective-permute":
            found = it.attribute(r"source_target_pairs=\{\{(.*?)\}\}") or ""
            pairs = [tuple(map(int, pair.split(","))) for pair in found.split("},{") if pair]
            pairs = [pair for pair in pairs if pair[0] != pair[1]]
            return (
                [Collective(kind, self.axes(pairs), 2, *pairs[:1], result, *names)] if pairs else []
            )
        group = replica_group(it.attributes, math.prod(self.mesh_shape.values()))
        size = len(group)
        array = {"all-gather": result, "all-reduce": 2 * operands}.get(kind, operands)
        moved = (size - 1) / size * array
        return [Collective(kind, self.axes([group]), size, group, moved, *names)] if moved else []

    def axes(self, groups: list[tuple[int, ...]]) -> str:
        """The mesh axes along which devices of a group differ: ``data``, ``data+fsdp``."""
        names, shape = tuple(self.mesh_shape), tuple(self.mesh_shape.values())
        places = [np.unravel_index(group, shape) for group in groups if shape]
        varied = [any(len(set(place[i])) > 1 for place in places) for i in range(len(shape))]
        return "+".join(name for name, is_in in zip(names, varied, strict=True) if is_in)


def _between_slices(computation: Computation, it: Instruction) -> Collective:
    """A collective over the data centre's network, which TPU programs hand to their host."""
    kind = it.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
    target = it.attribute(r'_xla_megascale_target="\{([^}]*)\}') or ""
    size = max(2, target.count(",") + 1)
    # What is sent is what a device holds: of a gathered array its part.
    share = {"all-reduce": 2 * (size - 1) / size, "all-gather": size - 1, "one-to-one": 1}
    moved = share.get(kind, (size - 1) / size) * computation[it.operands[0]].arrays[0].bytes
    kind = "collective-permute" if kind == "one-to-one" else kind
    return Collective(kind, "dcn", size, (0,), moved)


def _is_free(it: Instruction) -> bool:
    """Whether an instruction moves nothing by itself: it names memory, or ends what was started."""
    ends = it.opcode.endswith(("-done", "-update"))
    return it.opcode in _FREE or ends or it.target.startswith(_FREE_TARGETS)


def traffic(computations: dict, caller: Computation, it: Instruction) -> float:
    """Bytes that a top-level instruction reads and writes in the device's main memory."""
    if _is_free(it):
        return 0.0
    operands, results = [caller[name].arrays for name in it.operands], it.arrays
    if it.target.startswith(_LIBRARIES) or it.opcode == "copy-start":
        results = results[:1]  # a copy's result comes first, then its operand and flags
    elif it.opcode.endswith("-start") and len(results) > (count := len(operands)) > 0:
        results = results[count : 2 * count]  # operands, results and flags
    reads = [sum(array.padded_bytes for array in arrays) for arrays in operands]
    writes = [array.padded_bytes for array in results]
    if it.opcode == "fusion":
        inner = computations[it.called[0]]
        reads = [_read(computations, inner, i, read) for i, read in enumerate(reads)]
        writes = _written(computations, inner, inner.root.name)
    elif it.opcode in _SLICES | {"copy-start", "slice-start"}:
        reads = [writes[0], *[0] * (len(reads) - 1)]
    elif it.opcode == "dynamic-update-slice":
        operands, reads, writes = operands[1:2], reads[1:2], reads[1:2]
    sides = [(arrays[0], size) for arrays, size in zip(operands, reads, strict=False) if arrays]
    sides += zip(results, writes, strict=False)
    return float(sum(size for array, size in sides if array.space == 0))


def _read(computations: dict, inner: Computation, number: int, whole: int) -> int:
    """Bytes that a fusion reads of parameter ``number``: of a sliced one, the slices."""
    parameters = (each for each in inner.values() if each.opcode == "parameter")
    name = next(each.name for each in parameters if each.operands == (str(number),))
    return min(whole, _used(computations, inner, name, whole))


def _used(computations: dict, inner: Computation, name: str, whole: int) -> int:
    used = 0
    for user in inner.users[name]:
        if user.opcode in _SLICES and user.operands[0] == name:
            used += sum(array.padded_bytes for array in user.arrays)
        elif user.opcode in ("bitcast", "reshape"):
            used += _used(computations, inner, user.name, whole)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        elif user.opcode == "fusion":
            nested = computations[user.called[0]]
            used += _read(computations, nested, user.operands.index(name), whole)
        elif user.opcode != "tuple" and not _is_asynchronous(user):
            return whole
    return used


def _written(computations: dict, inner: Computation, name: str) -> list[int]:
    """Bytes that a fusion writes, by result: what is passed on costs nothing, an update its part."""
    root = inner[name]
    if root.opcode == "tuple":
        return [size for each in root.operands for size in _written(computations, inner, each)]
    if root.opcode == "parameter" or _is_asynchronous(root):
        return [0] * len(root.arrays)
    if root.opcode in ("bitcast", "reshape") and root.operands[0] in inner:
        return _written(computations, inner, root.operands[0])
    if root.opcode == "dynamic-update-slice":
        return [inner[root.operands[1]].arrays[0].padded_bytes]
    if root.opcode == "fusion":
        nested = computations[root.called[0]]
        return _written(computations, nested, nested.root.name)
    return [array.padded_bytes for array in root.arrays]


def _is_asynchronous(it: Instruction) -> bool:
    """Whether it is a part, though not the end, of a collective that is spread over fusions."""
    return it.opcode in ("all-gather", "all-reduce") or "AsyncCollectiveStart" in it.attributes
