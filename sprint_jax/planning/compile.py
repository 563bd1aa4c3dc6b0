"""Compilation of one program, as far as a plan needs it.

For TPUs and GPUs that need not exist the compiler runs in a process of its own, `planning.worker`, and writes
down the optimized program and where its buffers lie (``--xla_dump_to``). What follows, machine code, takes most
of the time and changes neither: the process ends itself there, unless the code's size is wanted (``full``).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ..core.config import Config
from ..core.errors import UserError
from ..training import checks, setup
from ..training.stages import lower_updates
from .gpus import GPUS
from .topology import Topology

# Bytes of machine code per line of an optimized program, if it is not compiled. Seen: 3.5 to 3.8 kB for TPUs;
# for GPUs 135 bytes of PTX, from which a driver makes about as much.
CODE_PER_LINE = {"tpu": 3700, "gpu": 140}
# Without a card to try them on, XLA's own matmul kernels (Triton) get tile sizes that do not suit, and
# compiling fails; with cuBLAS alone it does not.
CUDA_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# Files of TPU's compiler, then of CUDA's.
_OPTIMIZED = (
    "*after_optimizations_after_buffer_assignment.txt",
    "*gpu_after_optimizations.txt",
)
_TOO_LARGE = "*.oom_intermediate_module.txt"
_MEMORY = "*memory-usage-report.txt"
# Memory spaces by the number that layouts carry too, as in S(5); the report calls the host's "cmem".
_MAIN, _HOST = "0", "5"


class Program(NamedTuple):
    """A program, compiled.

    Attributes:
      text: the optimized program, empty if the compiler gave none.
      bytes: of main memory that it takes while it runs, arguments included, code not.
      code: bytes of machine code; ``code_is_known`` tells a compiled from an estimated one.
      host_bytes: of the host's memory. buffers: the largest buffers as ``"size  shapes"``.
      fits: whether the compiler found room for it.
      warnings: of the partitioner, about tensors that it had to replicate.
    """

    text: str
    bytes: float
    code: float
    code_is_known: bool
    host_bytes: float
    buffers: list[str]
    fits: bool
    warnings: list[str]


def abstract(c: Config, topology: Topology) -> tuple[jax.sharding.Mesh, tuple]:
    """Returns the mesh of a config on a topology, and ``(nets, state, batch, frozen)`` without any array.

    Raises UserError for a config that the topology cannot run.
    """
    mesh = setup.mesh_from(c, topology.devices)
    checks.check_values(c)
    checks.check_batch(c, mesh)
    return mesh, setup.abstract_run(c, mesh)


def lower(c: Config, topology: Topology) -> list:
    """Returns the updates of a config, in order, traced for a topology."""
    return lower_updates(c, *abstract(c, topology)[1])


def compile_update(c: Config, topology: Topology, number: int, full: bool) -> Program:
    """Compiles update ``number`` of a config.

    Raises UserError with the compiler's words if it fails for another reason than memory.
    """
    request = {"config": c.to_dict(), "number": number}
    how = request, lambda: lower(c, topology)[number], topology, full
    return compile_program(f"update {number + 1}", *how)


def compile_program(
    name: str, request: dict[str, Any], lowered: Callable, topology: Topology, full: bool
) -> Program:
    """Compiles what ``lowered()`` gives, or `planning.worker` makes of a request; see `compile_update`."""
    with tempfile.TemporaryDirectory(prefix="sprint_jax_plan_") as scratch:
        folder = Path(scratch)
        if topology.name == "local":
            said, words = compile_lowered(lowered()), ""
        else:
            request = request | {"topology": topology.name, "slices": topology.slices}
            said, words = _compile_apart(request | {"dump": scratch, "full": full})
        needed = out_of_memory(said.get("error", ""))
        dumps = _dumps(folder, (_TOO_LARGE,) if needed else _OPTIMIZED)
        text = said.get("text") or (dumps[0].read_text() if dumps else "")
        report = "".join(path.read_text() for path in sorted(folder.glob(_MEMORY)))
    spaces = dict(re.findall(r"color=(\d+)\)\nTotal bytes: (\d+)", report))
    if not needed and ("error" in said or not text or not (said or spaces)):
        reason = " ".join((said.get("error") or words).split())
        raise UserError(f"{name} does not compile for {topology.name}: {reason[-800:]}")
    is_gpu = topology.devices[0].platform == "gpu"
    known = "code" in said and not is_gpu  # memory_analysis knows none of GPUs' code
    code = said["code"] if known else CODE_PER_LINE["gpu" if is_gpu else "tpu"] * text.count("\n")
    return Program(
        text=text,
        bytes=said.get("bytes") or max(float(spaces.get(_MAIN, 0)), needed or 0.0),
        code=float(code),
        code_is_known=known,
        host_bytes=float(said.get("host_bytes", spaces.get(_HOST, 0))),
        buffers=_largest(report),
        fits=not needed,
        # CUDA's compiler speaks of rematerialization of its own as well.
        warnings=[line for line in words.splitlines() if "nvoluntary full remat" in line],
    )


def _dumps(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def out_of_memory(text: str) -> float | None:
    """Bytes that a program would need on a device, if that is what the compiler complains of.

    libtpu says "Used 20.1G of 15.75G hbm", or, where even the largest part does not fit, "memory required for
    HLO temporaries (384.00G) exceeds available HBM".
    """
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    found = re.search(
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|temporaries \(([\d.]+)([KMGT]?)\)"
        r"|([\d.]+)([KMGT]?)i?B? ?(?:bytes)? exceeds available",
        text,
    )
    if found is None:
        return None
    number, unit = [group for group in found.groups() if group is not None]
    return float(number) * 1024.0 ** " KMGT".index(unit or " ")


def compile_lowered(lowered, options: dict | None = None) -> dict[str, Any]:
    """Compiles to the end: a program and its memory, as in `Program`, or the ``error``."""
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)}
    memory = compiled.memory_analysis()
    results = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return {
        "text": compiled.as_text(),
        "bytes": float(memory.argument_size_in_bytes + memory.temp_size_in_bytes + results),
        "code": memory.generated_code_size_in_bytes,
        "host_bytes": memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
    }


def _compile_apart(request: dict[str, Any]) -> tuple[dict, str]:
    """Compiles in a process of its own: what `compile_lowered` gave, if it came so far, and its stderr."""
    # libtpu ends the process at a flag that it does not know, such as one of another device.
    is_gpu = request["topology"].startswith(tuple(GPUS))
    others = "--xla_cpu_" if is_gpu else ("--xla_cpu_", "--xla_gpu_")
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith(others)]
    ended = subprocess.run(
        [sys.executable, "-m", "sprint_jax.planning.worker"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        errors="replace",
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": " ".join(flags)},
    )
    return json.loads(ended.stdout or "{}") if ended.returncode == 0 else {}, ended.stderr


def _largest(report: str, count: int = 12) -> list[str]:
    """The first lines of a memory report: size and shapes of the largest buffers."""
    found = re.findall(r"^ +[\d.]+\w+\([ \d]+%\); +([\d.]+\w+); +\d+; +\d+; (.*)$", report, re.M)
    return [f"{size}  {shapes[:120]}" for size, shapes in found[:count]]


def is_written(folder: Path) -> bool:
    """Whether the optimized program and, after it, the report of its memory have been written."""
    for path in _dumps(folder, _OPTIMIZED):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16))
            whole = file.read().rstrip().endswith(b"\n}")  # a lone brace
        if whole and any(report.stat().st_size for report in folder.glob(_MEMORY)):
            return True
    return False
