"""The process that compiles one program for devices that need not exist: a JSON request in, a JSON answer out.

    python -m sprint_jax.planning.worker < request.json

It writes XLA's dumps to the request's folder and ends, without an answer, when the optimized program and its
memory are there, unless ``full`` asks for machine code too.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..core.config import Config
from ..core.errors import UserError
from .compile import CUDA_OPTIONS, compile_lowered, is_written, lower
from .inference import Run, lower_part, open_model
from .topology import open_topology


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles what a request of `compile.compile_program` asks for; returns what `compile_lowered` gives."""
    topology = open_topology(request["topology"], request["slices"])
    if "sample" in request:
        run, device = Run(**request["sample"]), topology.devices[0]
        pipe = open_model(request["model"], request["dtype"], device)
        lowered = lower_part(pipe, request["part"], run, device)
    else:
        lowered = lower(Config(request["config"]), topology)[request["number"]]
    options = {"xla_dump_to": request["dump"], "xla_dump_hlo_as_text": True}
    if topology.devices[0].platform == "gpu":
        named = os.environ.get("XLA_FLAGS", "")  # a user's own choice stays
        options |= {key: value for key, value in CUDA_OPTIONS.items() if key not in named}
    if not request["full"]:
        threading.Thread(target=_end_early, args=(Path(request["dump"]),), daemon=True).start()
    return compile_lowered(lowered, options)


def _end_early(folder: Path) -> None:
    """Ends this process when what a plan reads has been written."""
    while not is_written(folder):
        time.sleep(0.2)
    time.sleep(0.2)  # the report is short, and begun
    os._exit(0)


if __name__ == "__main__":
    try:
        answer = work(json.load(sys.stdin))
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
