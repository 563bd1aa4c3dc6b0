"""Compiles one update as far as a plan needs it.

For a TPU the compiler runs in a process of its own and writes down the optimized program and where its
buffers lie (``--xla_dump_to``). What follows, machine code, takes 95 % of the time and changes neither: the
process is ended there, unless the size of the code is wanted (``full``). It is this module's command, for
`compile_update` alone: ``python -m sprint_jax.planning.compile``, with a request as JSON on stdin.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ..core.config import Config
from ..core.errors import UserError
from ..training import checks, setup
from ..training.stages import lower_updates
from .topology import NOISE, Topology, open_topology, out_of_memory

# Bytes of machine code per line of an optimized program, if it is not compiled: 3.5 to 3.8 kB were seen.
CODE_PER_LINE = 3700

_OPTIMIZED = "*after_optimizations_after_buffer_assignment.txt"
_TOO_LARGE = "*.oom_intermediate_module.txt"
_WHOLE = "compiled.txt"
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
    seconds: float


def names(c: Config) -> list[str]:
    """The updates of one step, in order."""
    if c.stage == "flow":
        return ["flow"]
    if not c.ladd.weight:
        return ["generator"]
    return ["joint"] if c.ladd.reuse_fakes else ["generator", "discriminator"]


def abstract(c: Config, topology: Topology) -> tuple[jax.sharding.Mesh, tuple]:
    """The mesh of a config on a topology, and ``(nets, state, batch, frozen)`` without any array.

    Raises:
      UserError: for a config that the topology cannot run.
    """
    mesh = setup.mesh_from(c, topology.devices)
    checks.check_values(c)
    checks.check_batch(c, mesh)
    return mesh, setup.abstract_run(c, mesh)


def lower(c: Config, topology: Topology) -> list:
    """The updates of a config, traced for a topology."""
    return lower_updates(c, *abstract(c, topology)[1])


def compile_update(c: Config, topology: Topology, number: int, full: bool) -> Program:
    """Compiles update ``number`` of a config.

    Raises:
      JaxRuntimeError, RuntimeError: with the compiler's words, if it fails for another reason than memory.
    """
    started = time.monotonic()
    if topology.name == "local":
        return _compile_here(c, topology, number, started)
    with tempfile.TemporaryDirectory(prefix="sprint_jax_plan_") as folder:
        request = {
            "config": c.to_dict(),
            "topology": topology.name,
            "slices": topology.slices,
            "number": number,
            "dump": folder,
        }
        words, code = _run(request, Path(folder), full)
        return _read(Path(folder), words, code, started)


def _compile_here(c: Config, topology: Topology, number: int, started: float) -> Program:
    """Compiles for this machine's devices, in this process."""
    try:
        compiled = lower(c, topology)[number].compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        seconds = time.monotonic() - started
        return Program("", needed, 0.0, False, 0.0, [], False, [], seconds)
    seconds = time.monotonic() - started
    return Program(
        compiled.as_text(),
        **_memory(compiled),
        code_is_known=True,
        buffers=[],
        fits=True,
        warnings=[],
        seconds=seconds,
    )


def _memory(compiled) -> dict[str, float]:
    """Bytes of a compiled program, as in `Program`."""
    memory = compiled.memory_analysis()
    results = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return {
        "bytes": float(memory.argument_size_in_bytes + memory.temp_size_in_bytes + results),
        "code": float(memory.generated_code_size_in_bytes),
        "host_bytes": float(memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes),
    }


def _run(request: dict[str, Any], folder: Path, full: bool) -> tuple[str, dict]:
    """Starts the compiling process and ends it as soon as all is written that is wanted.

    Returns:
      what it said on stderr, without libtpu's complaints about missing TPUs; what it said on stdout, JSON.
    """
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "sprint_jax.planning.compile"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            cwd=Path(__file__).parent.parent,
        )
        try:
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
            while process.poll() is None:
                if not full and _whole(folder, _OPTIMIZED):
                    break
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    said = (folder / "stdout").read_text()
    lines = (folder / "stderr").read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if not re.search(NOISE, line)), json.loads(said or "{}")


def _whole(folder: Path, pattern: str) -> bool:
    """Whether a dump of a program has been written to its end, which is a lone brace."""
    for path in folder.glob(pattern):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16))
            return file.read().rstrip().endswith(b"\n}")
    return False


def _read(folder: Path, words: str, said: dict, started: float) -> Program:
    """What a compiling process left behind: a whole program, or the dumps of one that it got thus far with."""
    fits = "error" not in said
    needed = None if fits else out_of_memory(said["error"])
    whole = folder / _WHOLE
    programs = (
        [whole] if whole.exists() else sorted(folder.glob(_OPTIMIZED if fits else _TOO_LARGE))
    )
    if (not fits and needed is None) or not (programs or needed):
        raise RuntimeError(
            said.get("error") or f"the compiler ended early and said: {words[-2000:]}"
        )
    text = programs[0].read_text() if programs else ""
    reports = [path.read_text() for path in folder.glob(_MEMORY)]
    totals = re.findall(r"color=(\d+)\)\nTotal bytes: (\d+)", "".join(reports))
    spaces = {color: float(size) for color, size in totals}
    return Program(
        text=text,
        bytes=said.get("bytes") or max(spaces.get(_MAIN, 0.0), needed or 0.0),
        code=float(said.get("code", CODE_PER_LINE * text.count("\n"))),
        code_is_known="code" in said,
        host_bytes=spaces.get(_HOST, 0.0),
        buffers=_largest(reports[0]) if reports else [],
        fits=fits,
        warnings=[line for line in words.splitlines() if "rematerialization" in line],
        seconds=time.monotonic() - started,
    )


def _largest(report: str, count: int = 12) -> list[str]:
    """The first lines of a memory report: size and shapes of the largest buffers."""
    found = re.findall(r"^ +[\d.]+\w+\([ \d]+%\); +([\d.]+\w+); +\d+; +\d+; (.*)$", report, re.M)
    return [f"{size}  {shapes[:120]}" for size, shapes in found[:count]]


def _worker(request: dict[str, Any]) -> dict[str, Any]:
    """The compiling process: writes dumps and program; returns its memory, or why there is none."""
    topology = open_topology(request["topology"], request["slices"])
    lowered = lower(Config(request["config"]), topology)[request["number"]]
    options = {"xla_dump_to": request["dump"], "xla_dump_hlo_as_text": True}
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)}
    (Path(request["dump"]) / _WHOLE).write_text(compiled.as_text())
    return _memory(compiled)


if __name__ == "__main__":
    try:
        answer = _worker(json.load(sys.stdin))
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
