"""What one device does in a compiled program: FLOPs, memory traffic, bytes over links.

`analyze` reads ``compiled.as_text()``. ``compiled.cost_analysis()`` counts the body of a loop once; here bodies
count as often as they run, so a scan over blocks costs what its blocks cost.

FLOPs are those of matrix products and convolutions, 2 per multiply-add, positions in the padding left out.
Elementwise arithmetic and reductions are not counted: they run on other units and are bound by memory.

Traffic counts what top-level instructions read and write in a device's main memory (HBM): a fusion once, a
slice as its slice, an update in place as its update, VMEM of a TPU (layouts with S(1)) not at all.

Collectives count once each, however many fusions hold the same one: TPU programs spread an asynchronous one
over several fusions of one channel. Bytes are those that a device must send, or receive, in an optimal
algorithm over n devices: (n-1)/n of the gathered array for all-gather, of the array before scattering for
reduce-scatter, of the array for all-to-all; 2(n-1)/n of the array for all-reduce; all of it for
collective-permute. Between slices, where a TPU program hands data to its host, the axes are called "dcn".
CPU programs reduce gradients by all-reduce and a slice where TPU programs have reduce-scatter, so their
bytes are twice as many. All numbers are per device.
"""

import dataclasses
import itertools
import math

import numpy as np

from .hlo_count import convolution_flops, dot_flops, traffic
from .hlo_text import Computation, Instruction, parse, replica_groups, trip_count

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# TPUs multiply float32 in passes of bfloat16: one, three or six, as jax.lax.Precision documents.
PASSES = {"default": 1, "high": 3, "highest": 6}
_CONTROL = {"while", "conditional", "call", "async-start"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective that runs ``count`` times, each time over ``size`` devices of the mesh axes ``axes``.

    ``moved`` is bytes over links per run and device, ``raw`` those of its result; ``group`` is one of its
    groups of partition numbers.
    """

    kind: str
    axes: str
    size: int
    group: tuple[int, ...]
    moved: float
    raw: float
    op_name: str
    channel: str | None
    count: float = 1.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Costs of a computation.

    ``flops`` by (operand type, precision). ``compute_seconds`` and ``memory_seconds`` add up the instructions,
    each at what limits it, where `analyze` was given rates; ``unknown_loops`` were counted as one turn.
    ``by_name`` is ``traffic`` by JAX's names of operations.
    """

    flops: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    traffic: float = 0.0
    host_traffic: float = 0.0
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    by_name: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()
    unknown_loops: tuple[str, ...] = ()

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            _sum(self.flops, other.flops),
            self.traffic + other.traffic,
            self.host_traffic + other.host_traffic,
            self.compute_seconds + other.compute_seconds,
            self.memory_seconds + other.memory_seconds,
            _sum(self.by_name, other.by_name),
            self.collectives + other.collectives,
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, count: float) -> "Cost":
        """The cost of running it so often."""
        return Cost(
            {key: count * value for key, value in self.flops.items()},
            count * self.traffic,
            count * self.host_traffic,
            count * self.compute_seconds,
            count * self.memory_seconds,
            {key: count * value for key, value in self.by_name.items()},
            tuple(dataclasses.replace(c, count=count * c.count) for c in self.collectives),
            self.unknown_loops,
        )

    def bytes_by(self, *fields: str) -> dict[tuple, float]:
        """Bytes over links by fields of `Collective`, such as ``("kind", "axes")``."""
        found: dict[tuple, float] = {}
        for each in self.collectives:
            key = tuple(getattr(each, field) for field in fields)
            found[key] = found.get(key, 0.0) + each.count * each.moved
        return found


def analyze(
    text: str,
    mesh_shape: dict[str, int] | None = None,
    rates: tuple[float, float] = (math.inf, math.inf),
) -> Cost:
    """The cost of a program on one device.

    Args:
      text: ``compiled.as_text()``, or ``lowered.as_text(dialect="hlo")`` for the program before it is split
        over devices.
      mesh_shape: axis names and sizes, partition i being number i of the mesh in row-major order; names the
        axes of collectives.
      rates: FLOP/s and bytes/s of the device's memory, for the seconds.

    Raises:
      ValueError: for text of another kind.
    """
    computations, entry = parse(text)
    return _Analysis(computations, mesh_shape or {}, rates).cost(entry, fused=False)


class _Analysis:
    """The computations of one module, with what is known of each."""

    def __init__(self, computations: dict, mesh_shape: dict[str, int], rates: tuple[float, float]):
        self.computations = computations
        self.rates = rates
        self.axes = axes_of_groups(mesh_shape)
        self.devices = math.prod(mesh_shape.values())
        self.known: dict[tuple[str, bool], Cost] = {}

    def cost(self, name: str, fused: bool) -> Cost:
        """What a computation costs; inside a fusion nothing touches main memory."""
        if (name, fused) not in self.known:
            computation, parts, nested = self.computations[name], [], []
            for each in computation.values():
                cost = self.instruction(computation, each, fused)
                if each.opcode in _CONTROL:
                    nested.append(cost)
                else:
                    parts.append(cost if fused else self._timed(cost))
            own = sum(parts, Cost())
            own = dataclasses.replace(own, collectives=_once(own.collectives))
            self.known[name, fused] = sum(nested, own)
        return self.known[name, fused]

    def _timed(self, cost: Cost) -> Cost:
        """With its seconds: one instruction computes while it reads and writes."""
        flops = sum(
            value * (PASSES.get(precision, 1) if dtype == "f32" else 1)
            for (dtype, precision), value in cost.flops.items()
        )
        compute, memory = flops / self.rates[0], cost.traffic / self.rates[1]
        if compute >= memory:
            return dataclasses.replace(cost, compute_seconds=compute)
        return dataclasses.replace(cost, memory_seconds=memory)

    def instruction(self, computation: Computation, it: Instruction, fused: bool) -> Cost:
        kind = it.opcode.removesuffix("-start")
        if it.opcode == "while":
            trips = trip_count(self.computations, computation, it)
            unknown = Cost(unknown_loops=(it.op_name or it.name,)) if trips is None else Cost()
            body = self.cost(it.attribute(r"body=%?([^\s,}]+)"), fused)
            return body.times(1 if trips is None else trips) + unknown
        if it.opcode == "conditional":
            branches = [self.cost(name, fused) for name in it.called]
            return max(branches, key=lambda cost: (cost.total_flops, cost.traffic))
        if it.opcode in ("call", "async-start"):
            return sum((self.cost(name, fused) for name in it.called), Cost())
        if it.opcode == "fusion":
            inner = sum((self.cost(name, True) for name in it.called), Cost())
            if any(c.kind == "all-reduce" for c in inner.collectives) and self._scatters(it):
                inner = dataclasses.replace(
                    inner, collectives=tuple(map(_scattered, inner.collectives))
                )
            return inner + (Cost() if fused else self._traffic(computation, it))
        if kind in KINDS:
            found = self._collective(computation, it, kind)
            cost = Cost(collectives=(found,) if found else ())
            return cost if fused else cost + self._traffic(computation, it)
        if it.opcode == "send" and "_xla_megascale_transfer_type" in it.attributes:
            return Cost(collectives=(self._between_slices(computation, it),))
        flops = {}
        if it.opcode in ("dot", "convolution"):
            arrays = [computation[name].arrays[0] for name in it.operands]
            count = dot_flops(it, arrays) if it.opcode == "dot" else convolution_flops(it, arrays)
            dtype = max(
                (a.dtype for a in arrays),
                key=lambda name: int("0" + "".join(filter(str.isdigit, name))),
            )
            precision = it.attribute(r"operand_precision=\{(\w+)") or "default"
            flops = {(dtype, precision): count}
        return Cost(flops=flops) + (Cost() if fused else self._traffic(computation, it))

    def _scatters(self, it: Instruction) -> bool:
        """Whether a fusion is TPU's reduce-scatter: an all-reduce of which it keeps a slice."""
        inner = [each.opcode for name in it.called for each in self.computations[name].values()]
        return "dynamic-slice" in inner and "dot" not in inner and "convolution" not in inner

    def _collective(self, computation, it: Instruction, kind: str) -> Collective | None:
        operands = sum(computation[name].arrays[0].bytes for name in it.operands)
        arrays = it.arrays
        if it.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(it.operands) : 2 * len(it.operands)]  # (operands, results, flags)
        result = sum(array.bytes for array in arrays)
        if kind == "collective-permute":
            pairs = it.attribute(r"source_target_pairs=\{(.*?\})\}") or ""
            groups = [
                tuple(map(int, pair.split(","))) for pair in pairs.strip("{}").split("},{") if pair
            ]
            groups = [pair for pair in groups if len(set(pair)) == 2]
            if not groups:
                return None
            axes, size = self._permuted(groups), 2
            moved = float(result)
        else:
            groups = replica_groups(it.attributes, self.devices)
            size = len(groups[0])
            if size == 1:
                return None
            axes = self._named(groups)
            share = (size - 1) / size
            moved = {
                "all-gather": share * result,
                "reduce-scatter": share * operands,
                "all-reduce": 2 * share * operands,
                "all-to-all": share * operands,
            }[kind]
        channel = it.attribute(r"channel_id=(\d+)")
        return Collective(kind, axes, size, groups[0], moved, float(result), it.op_name, channel)

    def _named(self, groups: list[tuple[int, ...]]) -> str:
        """The mesh axes of a collective's groups; a program for one of several slices lists its own alone."""
        key = _key(groups)
        if key in self.axes:
            return self.axes[key]
        return next((axes for whole, axes in self.axes.items() if key <= whole), "other")

    def _between_slices(self, computation, it: Instruction) -> Collective:
        """A collective over the data centre's network, which TPU programs hand to their host."""
        kind = it.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
        target = it.attribute(r'_xla_megascale_target="\{([^}]*)\}') or ""
        size = max(2, target.count(",") + 1)
        held = float(computation[it.operands[0]].arrays[0].bytes)
        # What is sent is what a device holds: of a gathered array its part.
        share = {"all-reduce": 2 * (size - 1) / size, "all-gather": size - 1, "one-to-one": 1}
        moved = share.get(kind, (size - 1) / size) * held
        kind = {"one-to-one": "collective-permute"}.get(kind, kind)
        return Collective(kind, "dcn", size, (0,), moved, held, it.op_name, None)

    def _traffic(self, computation: Computation, it: Instruction) -> Cost:
        device, host = traffic(self.computations, computation, it)
        return Cost(traffic=device, host_traffic=host, by_name={it.op_name: device})

    def _permuted(self, pairs: list[tuple[int, int]]) -> str:
        """The fewest axes within whose groups all pairs lie."""
        for key, axes in sorted(self.axes.items(), key=lambda item: len(next(iter(item[0])))):
            if all(any(pair <= group for group in key) for pair in map(frozenset, pairs)):
                return axes
        return "other"


def axes_of_groups(mesh_shape: dict[str, int]) -> dict[frozenset, str]:
    """Every set of device groups that axes of a mesh make, and their names: ``data``, ``data+fsdp``."""
    names = [name for name, size in mesh_shape.items() if size > 1]
    shape = [mesh_shape[name] for name in names]
    ids = np.arange(math.prod(shape)).reshape(shape)
    found = {}
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), count):
            rest = [axis for axis in range(len(names)) if axis not in chosen]
            width = math.prod(shape[axis] for axis in chosen)
            rows = ids.transpose([*rest, *chosen]).reshape(-1, width)
            found[_key(rows.tolist())] = "+".join(names[axis] for axis in chosen)
    return found


def _sum(a: dict, b: dict) -> dict:
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in a | b}


def _key(groups) -> frozenset:
    return frozenset(map(frozenset, groups))


def _once(collectives: tuple[Collective, ...]) -> tuple[Collective, ...]:
    """Without the repetitions of an asynchronous collective, which have one channel and run as often."""
    found: dict = {}
    for number, each in enumerate(collectives):
        found.setdefault((each.kind, each.channel or f"no channel {number}", each.count), each)
    return tuple(found.values())


def _scattered(each: Collective) -> Collective:
    if each.kind != "all-reduce":
        return each
    return dataclasses.replace(
        each, kind="reduce-scatter", moved=each.moved / 2, raw=each.raw / each.size
    )
