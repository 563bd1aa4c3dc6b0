"""Programs that XLA compiles for an H200 that is not there, and counts of what is in them.

JAX's CUDA plugin compiles without a device when it is told what the device is like. Nothing is tuned then, so
algorithms of matmuls and convolutions are XLA's defaults; fusions, layouts and copies are real.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from sprint_jax.planning.hlo import Computation, Instruction, parse, trip_count

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None

# The fields of OpenXLA's description of an H200 SXM that its compiler reads.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""

# Instructions that run no kernel.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_MATHS = {"dot", "convolution", "custom-call"}


class Kernel(NamedTuple):
    """One kernel of a program.

    Attributes:
      name, opcode: of its instruction; opcode is 'gemm', 'conv' or 'triton' where that is known.
      source: JAX's name of what it came from.
      shape: of its results, as text.
      times: how often it runs.
      bytes: that it reads and writes in one run.
      weights: bytes of parameters named ``params`` that it reads in one run.
      constant: whether it reads nothing but parameters named ``params`` and literals.
      moves: whether it only copies, transposes, slices or converts.
    """

    name: str
    opcode: str
    source: str
    shape: str
    times: int
    bytes: float
    weights: float
    constant: bool
    moves: bool


def compile_for_h200(function: Callable, *shapes: Any, options: dict | None = None):
    """Compiles ``function(params, ...)`` for one H200 from shapes, trees of `jax.ShapeDtypeStruct`."""
    kwargs = dict(platform="cuda", topology_name="any", target_config=H200, topology="1x1x1")
    device = topologies.get_topology_desc(**kwargs).devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    put = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here)  # noqa: E731
    lowered = jax.jit(function).lower(*jax.tree.map(put, shapes))
    return lowered.compile(compiler_options=options)


def kernels(text: str) -> list[Kernel]:
    """The kernels of a program's text, in order; ``params`` is its first argument."""
    computations, entry = parse(text)
    found: list[Kernel] = []
    main = computations[entry]
    fixed = {i.name for i in main.values() if i.opcode == "parameter" and "params" in i.op_name}
    _walk(computations, main, fixed, 1, found)
    return found


def _walk(computations: dict, main: Computation, fixed: set[str], times: int, found: list) -> None:
    for each in main.values():
        reads = [main[name] for name in each.operands if name in main]
        constant = each.opcode == "constant" or (
            bool(reads) and all(r.name in fixed or r.opcode == "constant" for r in reads)
        )
        if constant and each.opcode != "parameter":
            fixed.add(each.name)
        if each.opcode in ("while", "call", "conditional"):
            count = trip_count(computations, main, each) or 1 if each.opcode == "while" else 1
            for name in each.called:
                inner = computations[name]
                _walk(computations, inner, set(), times * count, found)
            continue
        if each.opcode in _FREE or each.opcode.endswith("-done"):
            continue
        found.append(_kernel(computations, main, each, reads, times, constant))


def _kernel(
    computations, main: Computation, each: Instruction, reads, times: int, constant: bool
) -> Kernel:
    body = computations[each.called[0]] if each.called else None
    opcode, target = each.opcode, each.attribute(r'custom_call_target="([^"]*)"') or ""
    if "conv" in target or "__cudnn$conv" in each.attributes:
        opcode = "conv"
    elif "gemm" in target or "matmul" in target:
        opcode = "gemm"
    elif "__triton" in each.attributes:
        opcode = "triton"
    inside = {i.opcode for i in body.values()} if body else {each.opcode}
    moves = inside <= _FREE | {
        *("copy", "transpose", "slice", "dynamic-slice", "convert", "reshape", "broadcast", "pad"),
        *("concatenate", "dynamic-update-slice", "compare", "select", "clamp", "subtract", "add"),
    } and "add" not in _floats(body)
    read = sum(_read_bytes(body, n, r) for n, r in enumerate(reads))
    written = sum(a.bytes for a in each.arrays if a.dtype not in ("u8", "s8"))
    shape = " ".join(f"{a.dtype}{list(a.dims)}" for a in each.arrays)
    weights = sum(
        _read_bytes(body, number, r) for number, r in enumerate(reads) if _is_weight(main, r)
    )
    size = read + written
    return Kernel(each.name, opcode, each.op_name, shape, times, size, weights, constant, moves)


def _is_weight(main: Computation, read: Instruction) -> bool:
    while read.opcode == "bitcast":
        read = main[read.operands[0]]
    return read.opcode == "parameter" and "params" in read.op_name


def _floats(body) -> set[str]:
    """Opcodes of a fusion that work on floating point numbers."""
    return (
        {i.opcode for i in body.values() if i.arrays and "f" in i.arrays[0].dtype}
        if body
        else set()
    )


def _read_bytes(body, number: int, read: Instruction) -> float:
    """Bytes of an operand that a kernel reads: of what it slices, if it only slices."""
    whole = float(sum(a.bytes for a in read.arrays[:1]))
    if body is None:
        return whole
    parameter = next(
        i for i in body.values() if i.opcode == "parameter" and i.operands == (str(number),)
    )
    users = body.users[parameter.name]
    while len(users) == 1 and users[0].opcode == "bitcast":
        users = body.users[users[0].name]
    if users and all(u.opcode in ("dynamic-slice", "slice") for u in users):
        return min(whole, float(sum(u.arrays[0].bytes for u in users)))
    return whole


def count(found: list[Kernel]) -> int:
    """How many kernels run."""
    return sum(each.times for each in found)


def traffic(found: list[Kernel]) -> float:
    """Bytes that kernels read and write, together."""
    return sum(each.times * each.bytes for each in found)
