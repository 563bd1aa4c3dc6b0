"""FLOPs and memory traffic of single instructions of `sprint_jax.planning.hlo`."""

import functools
import math

from .hlo_text import Array, Computation, Instruction

_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
}
_FREE |= {"add-dependency", "partition-id", "replica-id", "while", "conditional", "call", "domain"}
# Custom calls that name or pass on memory and move nothing.
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "AsyncCollective", "AssumeGather")
_SLICES = {"dynamic-slice", "slice", "gather"}
_HOST = 5  # a layout's S(5) is memory of the host


def dot_flops(it: Instruction, operands: list[Array]) -> float:
    """2 per multiply-add of a dot."""
    axes = it.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    contracted = math.prod(operands[0].dims[int(axis)] for axis in axes.split(",") if axis)
    return 2.0 * it.arrays[0].elements * contracted


def convolution_flops(it: Instruction, operands: list[Array]) -> float:
    """2 per multiply-add of a convolution, where neither padding nor a hole of dilation stands.

    TPU programs write batched products as convolutions whose padding is most of the window.
    """
    left, right, out = it.attribute(r"dim_labels=(\S+?->\w+)").replace("->", "_").split("_")
    window = it.attribute(r"window=\{([^}]*)\}") or ""
    spatial = sorted(set(right) - set("io"))

    def field(name: str, default: str) -> list[str]:
        found = [part for part in window.split() if part.startswith(f"{name}=")]
        return found[0].partition("=")[2].split("x") if found else [default] * len(spatial)

    pads, strides = field("pad", "0_0"), field("stride", "1")
    dilations, kernels = field("lhs_dilate", "1"), field("rhs_dilate", "1")
    pairs = 1
    for i, axis in enumerate(spatial):
        low = int(pads[i].split("_")[0])
        sizes = (operands[0].dims[left.index(axis)], operands[1].dims[right.index(axis)])
        steps = (int(strides[i]), int(dilations[i]), int(kernels[i]))
        pairs *= _positions(*sizes, it.arrays[0].dims[out.index(axis)], *steps, low)
    others = it.arrays[0].dims[out.index("b")] * it.arrays[0].dims[out.index("f")]
    return 2.0 * pairs * others * operands[1].dims[right.index("i")]


@functools.cache
def _positions(size, kernel, out, stride, dilate, kernel_dilate, low) -> int:
    """Pairs of output and kernel positions that meet an element of the input, along one axis.

    Kernel position k meets an element at output o where o * stride + k * kernel_dilate - low lies inside the
    dilated input and is a multiple of ``dilate``.
    """
    common = math.gcd(stride, dilate)
    period = dilate // common
    total = 0
    for k in range(kernel):
        offset = low - k * kernel_dilate
        if offset % common:
            continue
        first = max(0, -(-offset // stride))
        last = min(out - 1, ((size - 1) * dilate + offset) // stride)
        # The outputs that meet an element are those congruent to this one.
        start = offset // common * pow(stride // common, -1, period) % period if period > 1 else 0
        first += (start - first) % period
        total += max(0, (last - first) // period + 1)
    return total


def traffic(
    computations: dict[str, Computation], caller: Computation, it: Instruction
) -> tuple[float, float]:
    """Bytes that a top-level instruction reads and writes: (in the device's main memory, in the host's)."""
    target = it.attribute(r'custom_call_target="([^"]*)"') or ""
    if it.opcode in _FREE or it.opcode.endswith(("-done", "-update")):
        return 0.0, 0.0
    if target.startswith(_FREE_TARGETS):
        return 0.0, 0.0
    operands = [caller[name].arrays for name in it.operands]
    reads = [sum(array.padded_bytes for array in arrays) for arrays in operands]
    writes, results = [array.padded_bytes for array in it.arrays], it.arrays
    if it.opcode == "fusion":
        inner = computations[it.called[0]]
        reads = [_read(computations, inner, i, read) for i, read in enumerate(reads)]
        writes = _written(computations, inner, inner.root.name)
    elif it.opcode.endswith("-start"):
        # Such a shape holds operands, results and flags; a copy's result comes first.
        results = it.arrays[:1] if it.opcode == "copy-start" else it.arrays[1:2]
        writes = [array.padded_bytes for array in results]
        reads = writes if it.opcode in ("copy-start", "slice-start") else reads
    elif it.opcode in _SLICES:
        reads = [writes[0], *[0] * (len(reads) - 1)]
    elif it.opcode == "dynamic-update-slice":
        operands, reads, writes = operands[1:2], reads[1:2], reads[1:2]
    sides = [(arrays[0], size) for arrays, size in zip(operands, reads, strict=False) if arrays]
    sides += list(zip(results, writes, strict=False))
    device = sum(size for array, size in sides if array.space == 0)
    return float(device), float(sum(size for array, size in sides if array.space == _HOST))


def _read(computations, inner: Computation, number: int, whole: int) -> int:
    """Bytes that a fusion reads of parameter ``number``: of a sliced one, the slices."""
    name = next(
        each.name
        for each in inner.values()
        if each.opcode == "parameter" and each.operands == (str(number),)
    )
    return min(whole, _used(computations, inner, name, whole))


def _used(computations, inner: Computation, name: str, whole: int) -> int:
    total = 0
    for user in inner.users.get(name, []):
        if user.opcode in _SLICES and user.operands[0] == name:
            total += sum(array.padded_bytes for array in user.arrays)
        elif user.opcode in ("bitcast", "reshape"):
            total += _used(computations, inner, user.name, whole)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        elif user.opcode == "fusion":
            nested = computations[user.called[0]]
            total += _read(computations, nested, user.operands.index(name), whole)
        elif user.opcode != "tuple" and not _asynchronous(user):
            return whole
    return total


def _asynchronous(it: Instruction) -> bool:
    """Whether it is a part, though not the end, of a collective spread over fusions (see `hlo.analyze`)."""
    return it.opcode in ("all-gather", "all-reduce") or "AsyncCollectiveStart" in it.attributes


def _written(computations, inner: Computation, name: str) -> list[int]:
    """Bytes that a fusion writes, by result: what is passed on costs nothing, an update its part."""
    root = inner[name]
    if root.opcode == "tuple":
        return [size for each in root.operands for size in _written(computations, inner, each)]
    if root.opcode == "parameter" or _asynchronous(root):
        return [0] * len(root.arrays)
    if root.opcode in ("bitcast", "reshape") and root.operands[0] in inner:
        return _written(computations, inner, root.operands[0])
    if root.opcode == "dynamic-update-slice":
        return [inner[root.operands[1]].arrays[0].padded_bytes]
    if root.opcode == "fusion":
        nested = computations[root.called[0]]
        return _written(computations, nested, nested.root.name)
    return [array.padded_bytes for array in root.arrays]
