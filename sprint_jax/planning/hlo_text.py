"""XLA's program text, read into instructions; see `sprint_jax.planning.hlo` for what is counted of them.

Understands what ``compiled.as_text()`` and ``lowered.as_text(dialect="hlo")`` print on CPU, GPU and TPU:
computations, shapes with layouts, attributes, loops' trip counts and the three forms of replica groups.
Syntax: "Operation semantics" and "HLO" of the OpenXLA documentation, and XLA's ``hlo_parser`` tests.
Nothing here needs jax.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Bits of an element; s4 and the like are packed on every backend.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_BITS |= {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([^\s(=]+)\s*(?:\(.*\)\s*->.*)?\{\s*$")
_LINE = re.compile(r"^\s+(ROOT\s+)?%?([^\s=]+)\s+=\s+(.*)$")


class Array(NamedTuple):
    """One array of a shape: ``space`` is the number in a layout's S(n), 0 is a device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    layout: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements alone."""
        return (self.elements * _bits(self.dtype) + 7) // 8

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory: TPU layouts round the last dimensions up to tiles such as T(8,128)."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if not tile or not self.dims:
            return self.bytes
        order = [int(axis) for axis in self.layout.partition(":")[0].split(",") if axis]
        dims = [self.dims[axis] for axis in reversed(order)]
        tiles = [int(size) for size in tile[1].split(",")]
        count = min(len(dims), len(tiles))
        for i in range(1, count + 1):
            # A single row is kept as such, whatever the tile's height.
            if i == 1 or dims[-i] > 1:
                dims[-i] = -(-dims[-i] // tiles[-i]) * tiles[-i]
        return (math.prod(dims) * _bits(self.dtype) + 7) // 8


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
    def op_name(self) -> str:
        """JAX's name of what this came from, such as ``jit(step)/while/body/dot_general``."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def called(self) -> list[str]:
        """Computations it runs, in the order of the text; reducers and sort orders are not among them."""
        found = re.findall(r"\b(?:calls|body|condition)=%?([^\s,}]+)", self.attributes)
        for listed in re.findall(r"branch_computations=\{([^}]*)\}", self.attributes):
            found += [name.strip().lstrip("%") for name in listed.split(",")]
        found += re.findall(r"\b(?:true|false)_computation=%?([^\s,}]+)", self.attributes)
        if self.opcode == "call":
            found += re.findall(r"\bto_apply=%?([^\s,}]+)", self.attributes)
        return found


class Computation(dict):
    """Instructions by name, in order."""

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.values() if instruction.root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads an instruction."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.values():
            for name in set(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Reads a module's text.

    Returns:
      Computations by name, and the entry's name.

    Raises:
      ValueError: if there is no entry computation in it.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations.setdefault(header[2], Computation())
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _LINE.match(line):
            current[match[2]] = _instruction(match[2], match[3], bool(match[1]))
    if entry is None:
        raise ValueError("this is no text of an HLO module: it has no ENTRY computation")
    return computations, entry


def trip_count(computations: dict, caller: Computation, loop: Instruction) -> int | None:
    """How often a while loop's body runs, or None if the text does not tell.

    From XLA's own ``known_trip_count`` where it is printed, else from the comparison of a counter with a
    constant: its start is the loop's operand, its step what the body adds.
    """
    known = loop.attribute(r'known_trip_count[^\d]*?"?n"?:"?(\d+)')
    if known:
        return int(known)
    condition = computations[loop.attribute(r"condition=%?([^\s,}]+)")]
    body = computations[loop.attribute(r"body=%?([^\s,}]+)")]
    compare, inside, values = condition.root, condition, {}
    if compare.opcode == "fusion":
        inside = computations[compare.called[0]]
        values = dict(zip(_parameters(inside), compare.operands, strict=True))
        compare = inside.root
    if compare.opcode != "compare":
        return None
    # Each side as (computation, name): a fusion's parameters stand for instructions of the condition.
    sides = [
        (condition, values[name]) if name in values else (inside, name) for name in compare.operands
    ]
    direction = compare.attribute(r"direction=(\w+)")
    bounds = [_constant(*side) for side in sides]
    if bounds[0] is not None:
        sides, bounds = sides[::-1], bounds[::-1]
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    counter = _through(*sides[0])
    initial = _through(caller, loop.operands[0])
    if counter.opcode != "get-tuple-element" or initial.opcode != "tuple":
        return None
    index = int(counter.attribute(r"index=(\d+)"))
    if bounds[1] is None:
        # A bound that the loop carries along unchanged.
        bound = _through(*sides[1])
        if bound.opcode != "get-tuple-element":
            return None
        bounds[1] = _constant(caller, initial.operands[int(bound.attribute(r"index=(\d+)"))])
    start = _constant(caller, initial.operands[index])
    step = _step(computations, body, index)
    if None in (start, step, bounds[1]) or step == 0:
        return None
    distance = (bounds[1] - start) / step
    if direction in ("LE", "GE"):
        return max(0, math.floor(distance) + 1)
    return max(0, math.ceil(distance)) if direction in ("LT", "GT", "NE") else None


def replica_groups(attributes: str, count: int) -> list[tuple[int, ...]]:
    """Groups of device numbers that a collective works in, from any of the three printed forms.

    ``{{0,1},{2,3}}``; ``[2,2]<=[4]`` with an optional transpose T(1,0); ``mesh['a'=2,'b'=2] {'b'}`` with
    optional parts of axes, ``{'b':(1)2}``, and ``device_ids=([2,2]T(1,0))`` where devices are permuted. No
    groups, or ``{}``: all ``count`` devices are one.
    """
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^{}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", match[1])}
        ids = np.arange(math.prod(sizes.values()))
        if listed := re.search(r"device_ids=\((.*)\)", match[2]):
            ids = _iota(listed[1]) if "[" in listed[1] else np.array(_numbers(listed[1]))
        return _mesh_groups(
            ids, sizes, re.findall(r"'?([^',:{}]+)'?(?::\((\d+)\)(\d+))?", match[3])
        )
    if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return [tuple(map(int, row)) for row in _iota(match[1])]
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return [tuple(_numbers(group)) for group in re.findall(r"\{([\d, ]*)\}", match[1])]
    return [tuple(range(count))]


def _numbers(text: str) -> list[int]:
    """All numbers in a text."""
    return [int(word) for word in re.findall(r"\d+", text)]


def _mesh_groups(ids, sizes: dict[str, int], chosen: list) -> list[tuple[int, ...]]:
    """Rows of device numbers that differ along the chosen axes, or parts (before, size) of them."""
    parts = {name: (int(before or 1), int(size or 0)) for name, before, size in chosen}
    shape, inside = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        part = part or size
        shape += [before, part, size // (before * part)]
        inside += [False, name in parts, False]
    axes = [axis for axis in range(len(shape)) if not inside[axis]]
    axes += [axis for axis in range(len(shape)) if inside[axis]]
    width = math.prod(shape[axis] for axis in axes if inside[axis])
    rows = ids.reshape(shape).transpose(axes).reshape(-1, width)
    return [tuple(map(int, row)) for row in rows]


def _iota(text: str) -> np.ndarray:
    """``[2,2]<=[4]``, ``[4]<=[2,2]T(1,0)`` or ``[2,2]T(1,0)`` (without a shape of its own) as numbers."""
    *shape, source = (_numbers(part) for part in re.findall(r"\[([\d,]+)\]", text))
    transpose = re.search(r"T\(([\d,]+)\)", text)
    ids = np.arange(math.prod(source)).reshape(source)
    if transpose:
        ids = ids.transpose(_numbers(transpose[1]))
    return ids.reshape(shape[0]) if shape else ids


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.match(r"[a-z]+(\d+)", dtype)[1])  # s32, u4, f8e4m3fn


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _end(rest, 0, " ")
    opcode, _, tail = rest[end:].strip().partition("(")
    close = _end(tail, 0, ")")
    operands = [
        part.split()[-1].lstrip("%") for part in _split(tail[:close]) if part and part[0] != "{"
    ]
    return Instruction(name, _arrays(rest[:end]), opcode, tuple(operands), tail[close + 1 :], root)


def _arrays(shape: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout or "")
        sizes = tuple(_numbers(dims))
        found.append(Array(dtype, sizes, int(space[1]) if space else 0, layout or ""))
    return tuple(found)


def _end(text: str, start: int, stop: str) -> int:
    """Where ``stop`` first stands outside all brackets."""
    depth = 0
    for i in range(start, len(text)):
        if depth == 0 and text[i] == stop:
            return i
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
    return len(text)


def _split(text: str) -> Iterator[str]:
    """The parts between commas that stand outside all brackets, without comments."""
    text = re.sub(r"/\*.*?\*/", "", text)
    while text:
        end = _end(text, 0, ",")
        yield text[:end].strip()
        text = text[end + 1 :]


def _parameters(computation: Computation) -> list[str]:
    """Names of the parameters, by number."""
    found = [each for each in computation.values() if each.opcode == "parameter"]
    return [each.name for each in sorted(found, key=lambda each: int(each.operands[0]))]


def _through(computation: Computation, name: str) -> Instruction:
    """The instruction behind copies, which change no value."""
    instruction = computation[name]
    while instruction.opcode in (
        "copy",
        "bitcast",
        "convert",
        "reshape",
        "copy-done",
        "copy-start",
    ):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    instruction = _through(computation, name)
    if instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.operands[0]):
        return None
    return int(instruction.operands[0])


def _step(computations: dict, body: Computation, index: int) -> int | None:
    """What one turn of a loop adds to element ``index`` of its state."""
    if body.root.opcode != "tuple":
        return None
    change, values = _through(body, body.root.operands[index]), {}
    scope = body
    if change.opcode == "fusion":
        scope = computations[change.called[0]]
        values = dict(zip(_parameters(scope), change.operands, strict=True))
        change = _through(scope, scope.root.name)
    if change.opcode not in ("add", "subtract") or len(change.operands) != 2:
        return None
    for name in change.operands:
        behind = _through(scope, name)
        if behind.opcode == "parameter" and behind.name in values:
            behind = _through(body, values[behind.name])
        if behind.opcode == "constant":
            step = int(behind.operands[0])
            return -step if change.opcode == "subtract" else step
    return None
