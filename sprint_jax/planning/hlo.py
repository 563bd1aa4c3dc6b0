"""Reader of XLA's program text, as instructions for `sprint_jax.planning.counts`.

It reads what ``compiled.as_text()`` and ``lowered.as_text(dialect="hlo")`` print on CPU, GPU and TPU. Syntax:
"HLO" in OpenXLA's documentation, and the tests of XLA's ``hlo_parser``.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

import numpy as np

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([^\s(=]+) (?:\(.*\) -> .*)?\{$")
# name = shape opcode(operands), attributes
_LINE = re.compile(r"\s+(ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, ([\w-]+=.*))?$")
_SAME_VALUE = {"copy", "bitcast", "convert", "reshape", "copy-done", "copy-start"}


class Array(NamedTuple):
    """One array of a shape, with its layout as it is printed."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def space(self) -> int:
        """The number in a layout's S(n): 0 is a device's main memory, 1 a TPU's VMEM, 5 the host's memory."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found[1]) if found else 0

    @property
    def bytes(self) -> int:
        """Bytes of the elements alone."""
        return self._size(self.dims)

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory: TPU layouts round the last dimensions up to tiles such as T(8,128)."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if not tile or not self.dims:
            return self.bytes
        dims = [self.dims[axis] for axis in reversed(_numbers(self.layout.partition(":")[0]))]
        for i, size in enumerate(reversed(_numbers(tile[1])[-len(dims) :]), start=1):
            # A single row is kept as such, whatever the tile's height.
            if i == 1 or dims[-i] > 1:
                dims[-i] = -(-dims[-i] // size) * size
        return self._size(dims)

    def _size(self, dims) -> int:
        """Bytes of so many elements; those of four bits and less are packed."""
        bits = {"pred": 8, "token": 0, "opaque": 0}.get(self.dtype)
        if bits is None:
            bits = int(re.search(r"\d+", self.dtype)[0])  # bf16, s32, u4, f8e4m3fn
        return (math.prod(dims) * bits + 7) // 8


class Instruction(NamedTuple):
    """``name = arrays opcode(operands), attributes``; ``arrays`` are the leaves of its shape."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of ``pattern`` in the attributes, or None."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    @property
    def target(self) -> str:
        """What a custom call calls, such as ``__cublas$lt$matmul``; else empty."""
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    @property
    def op_name(self) -> str:
        """JAX's name of what this came from, such as ``jit(step)/while/body/dot_general``."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def called(self) -> list[str]:
        """Computations that it runs, in the order of the text; reducers and sort orders are not among them."""
        called = r"calls|body|true_computation|false_computation"
        if self.opcode == "call":
            called += "|to_apply"
        found = re.findall(rf"\b(?:{called})=%?([^\s,}}]+)", self.attributes)
        branches = self.attribute(r"branch_computations=\{([^}]*)\}")
        return found + [name.strip().lstrip("%") for name in (branches or "").split(",") if name]


class Computation(dict):
    """Instructions by name, in order."""

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.values() if instruction.root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read a result, by its name."""
        found = collections.defaultdict(list)
        for instruction in self.values():
            for name in set(instruction.operands):
                found[name].append(instruction)
        return found

    def source(self, name: str) -> Instruction:
        """The instruction behind copies, which change no value."""
        instruction = self[name]
        while instruction.opcode in _SAME_VALUE:
            instruction = self[instruction.operands[0]]
        return instruction

    def constant(self, name: str) -> int | None:
        """The value of a whole number, or None."""
        source = self.source(name)
        is_number = source.opcode == "constant" and re.fullmatch(r"-?\d+", source.operands[0])
        return int(source.operands[0]) if is_number else None


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Reads a module's text: computations by name, and the entry's name. Raises ValueError without an entry."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            if match := _LINE.match(line):
                root, name, shape, opcode, operands, attributes = match.groups(default="")
                words = (part.split() for part in re.sub(r"/\*.*?\*/", "", operands).split(","))
                names = tuple(part[-1].lstrip("%") for part in words if part)
                arrays = tuple(
                    Array(dtype, tuple(_numbers(dims)), layout)
                    for dtype, dims, layout in _ARRAY.findall(shape)
                )
                current[name] = Instruction(name, arrays, opcode, names, attributes, bool(root))
        elif (header := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations.setdefault(header[2], Computation())
            entry = header[2] if header[1] else entry
    if entry is None:
        raise ValueError("this is no text of an HLO module: it has no ENTRY computation")
    return computations, entry


def argument_bytes(text: str) -> dict[str, float]:
    """Returns bytes of a program's arguments by their names in JAX, with the padding of their layouts."""
    computations, entry = parse(text) if text else ({"": {}}, "")
    return {
        each.op_name.replace("\\'", "'"): float(each.arrays[0].padded_bytes)
        for each in computations[entry].values()
        if each.opcode == "parameter" and each.op_name
    }


def trip_count(computations: dict, caller: Computation, loop: Instruction) -> int | None:
    """How often a while loop's body runs, or None if the text does not tell.

    CPU and GPU programs print it. Those of TPUs do not: there it comes from the counter, which starts at a
    constant, grows by a constant in the body, and is compared with a constant in the condition.
    """
    known = loop.attribute(r'known_trip_count[^\d]*?"?n"?:"?(\d+)')
    if known:
        return int(known)
    condition = computations[loop.attribute(r"condition=%?([^\s,}]+)")]
    body = computations[loop.attribute(r"body=%?([^\s,}]+)")]
    compare, initial = condition.root, caller.source(loop.operands[0])
    if compare.attribute(r"direction=(LT)") is None or initial.opcode != "tuple":
        return None
    counter, bound = condition.source(compare.operands[0]), condition.constant(compare.operands[1])
    if counter.opcode != "get-tuple-element" or body.root.opcode != "tuple":
        return None
    index = int(counter.attribute(r"index=(\d+)"))
    start = caller.constant(initial.operands[index])
    add = body.source(body.root.operands[index])
    steps = [body.constant(name) for name in add.operands] if add.opcode == "add" else []
    step = next((step for step in steps if step), None)
    if None in (start, bound, step):
        return None
    return max(0, -(-(bound - start) // step))


def replica_group(attributes: str, count: int) -> tuple[int, ...]:
    """The first of the groups of device numbers that a collective works in, from any of the printed forms.

    ``{{0,1},{2,3}}``; ``[2,2]<=[4]`` with an optional transpose T(1,0); ``mesh['a'=2,'b'=2] {'b'}`` with
    optional parts of axes, ``{'b':(1)2}``, and ``device_ids=([2,2]T(1,0))`` where devices are permuted. No
    groups, or ``{}``: all ``count`` devices are one.
    """
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^{}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", match[1])}
        ids = np.arange(math.prod(sizes.values()))
        if listed := re.search(r"device_ids=\((.*)\)", match[2]):
            ids = _iota(listed[1]) if "[" in listed[1] else np.array(_numbers(listed[1]))
        # Of a part (before)size of an axis, and else of the whole: before, size, what is after.
        parts = {name: () for name in sizes}
        for name, before, size in re.findall(r"'?([^',:{}]+)'?(?::\((\d+)\)(\d+))?", match[3]):
            parts[name] = (int(before or 1), int(size or sizes[name]))
        shape, inside = [], []
        for name, whole in sizes.items():
            before, size = parts[name] or (whole, 1)
            shape += [before, size, whole // (before * size)]
            inside += [0, slice(None), 0]
        return tuple(map(int, ids.reshape(shape)[tuple(inside)].ravel()))
    if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return tuple(map(int, _iota(match[1])[0]))
    if match := re.search(r"replica_groups=\{\{([\d, ]*)\}", attributes):
        return tuple(_numbers(match[1]))
    return tuple(range(count))


def _numbers(text: str) -> list[int]:
    """All numbers in a text."""
    return [int(word) for word in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """``[2,2]<=[4]``, ``[4]<=[2,2]T(1,0)`` or ``[2,2]T(1,0)`` (without a shape of its own) as numbers."""
    *shape, source = (_numbers(part) for part in re.findall(r"\[([\d,]+)\]", text))
    transpose = re.search(r"T\(([\d,]+)\)", text)
    ids = np.arange(math.prod(source)).reshape(source)
    if transpose:
        ids = ids.transpose(_numbers(transpose[1]))
    return ids.reshape(shape[0]) if shape else ids
