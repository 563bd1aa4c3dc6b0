"""Compilation of one update, as far as a plan needs it.

For a TPU the compiler runs in a process of its own, which is this module's command, and writes down the
optimized program and where its buffers lie (``--xla_dump_to``). What follows, machine code, takes 95 % of the
time and changes neither: the process ends itself there, unless the size of the code is wanted (``full``).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ..core.config import Config
from ..core.errors import UserError
from ..training import checks, setup
from ..training.stages import lower_updates
from .topology import Topology, open_topology

# Bytes of machine code per line of an optimized program, if it is not compiled: 3.5 to 3.8 kB were seen.
CODE_PER_LINE = 3700

_OPTIMIZED = "*after_optimizations_after_buffer_assignment.txt"
_TOO_LARGE = "*.oom_intermediate_module.txt"
_MEMORY = "*memory-usage-report.txt"
# Memory spaces by the number that layouts carry too, as in S(5); the report calls the host's "cmem".
_MAIN, _HOST = "0", "5"


class Program(NamedTuple):
    """An update, compiled.

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
    with tempfile.TemporaryDirectory(prefix="sprint_jax_plan_") as name:
        folder = Path(name)
        if topology.name == "local":
            said, words = _compile(lower(c, topology)[number]), ""
        else:
            request = {"config": c.to_dict(), "topology": topology.name, "slices": topology.slices}
            said, words = _compile_apart(request | {"number": number, "dump": name, "full": full})
        needed = out_of_memory(said.get("error", ""))
        dumps = sorted(folder.glob(_TOO_LARGE if needed else _OPTIMIZED))
        text = said.get("text") or (dumps[0].read_text() if dumps else "")
        report = "".join(path.read_text() for path in sorted(folder.glob(_MEMORY)))
    if not needed and ("error" in said or not text):
        reason = " ".join((said.get("error") or words).split())
        raise UserError(
            f"update {number + 1} does not compile for {topology.name}: {reason[-800:]}"
        )
    spaces = dict(re.findall(r"color=(\d+)\)\nTotal bytes: (\d+)", report))
    return Program(
        text=text,
        bytes=said.get("bytes") or max(float(spaces.get(_MAIN, 0)), needed or 0.0),
        code=float(said.get("code", CODE_PER_LINE * text.count("\n"))),
        code_is_known="code" in said,
        host_bytes=float(said.get("host_bytes", spaces.get(_HOST, 0))),
        buffers=_largest(report),
        fits=not needed,
        warnings=[line for line in words.splitlines() if "rematerialization" in line],
    )


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


def _compile(lowered, options: dict | None = None) -> dict[str, Any]:
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
    """Compiles in a process of its own: what `_compile` gave there, if it came so far, and its stderr."""
    # libtpu ends the process at a flag that it does not know, such as one of another device.
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith(("--xla_cpu_", "--xla_gpu_"))]
    ended = subprocess.run(
        [sys.executable, "-m", "sprint_jax.planning.compile"],
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


def _worker(request: dict[str, Any]) -> dict[str, Any]:
    """The compiling process: writes dumps; returns what `_compile` gives, unless it ends before."""
    topology = open_topology(request["topology"], request["slices"])
    lowered = lower(Config(request["config"]), topology)[request["number"]]
    if not request["full"]:
        threading.Thread(target=_end_early, args=(Path(request["dump"]),), daemon=True).start()
    return _compile(lowered, {"xla_dump_to": request["dump"], "xla_dump_hlo_as_text": True})


def _end_early(folder: Path) -> None:
    """Ends this process when the optimized program has been written to its end, which is a lone brace."""
    while True:
        time.sleep(0.2)
        for path in folder.glob(_OPTIMIZED):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 16))
                if file.read().rstrip().endswith(b"\n}"):
                    os._exit(0)


if __name__ == "__main__":
    try:
        answer = _worker(json.load(sys.stdin))
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
