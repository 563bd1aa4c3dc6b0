"""The devices that a plan is for: TPU slices and GPUs that need not exist, or this machine's own devices.

A topology is ``v5e:16x16``, ``v6e:8x8``, ``v5p:4x4x4``: a kind of chip and how many stand along each axis of
the torus; ``h200:8``, ``h100:2x8``: a kind of card, hosts if there are several, and cards in each; or
``local``.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from ..core.errors import UserError
from .chips import CHIPS, Chip, chip_of
from .gpus import GPUS, usable

# The package that holds XLA's compiler for CUDA, as it is imported.
CUDA_PLUGIN = "jax_plugins.xla_cuda13"
TPUS = tuple(name for name in CHIPS if name.startswith("v"))

# libtpu takes these from a TPU's own machine. Elsewhere it asks a metadata server that only Google Cloud has,
# for minutes, and complains on stderr. What is described does not depend on them.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Compiling takes no device, so that several such processes need not exclude one another.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """Devices to compile for, one per chip; ``hbm_bytes`` is what a program may use of each.

    Of a GPU, that is the part that JAX takes by default (`gpus.usable`).
    """

    name: str
    slices: int
    devices: Sequence
    chip_name: str
    chip: Chip
    hbm_bytes: float


def open_topology(name: str, slices: int = 1) -> Topology:
    """Returns the devices of a topology; JAX runs on CPU from here on unless it is ``local``.

    Raises:
      UserError: exit code 2 for a name of no topology; 1 where the compiler for it is not installed.
    """
    if name == "local":
        if slices != 1:
            raise UserError("--slices is for TPU topologies, not for local", exit_code=2)
        devices = jax.devices()
        chip_name = chip_of(devices[0])
        chip = CHIPS[chip_name]
        return Topology(name, 1, devices, chip_name, chip, _local_memory(devices, chip))
    kind, _, shape = name.partition(":")
    if kind in GPUS and re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape) and slices == 1:
        return _gpus(name, kind, shape)
    if kind not in TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape) or slices < 1:
        raise UserError(
            f"--topology {name} with {slices} slice(s) is not one of "
            f"{', '.join(f'{tpu}:AxB[xC]' for tpu in TPUS)}, {', '.join(f'{gpu}:[HOSTSx]N' for gpu in GPUS)}, "
            "local; for example v5e:16x16, v5p:4x4x4, h100:8",
            exit_code=2,
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name} needs TPU's compiler: pip install 'sprint_jax[plan]' (Linux on x86-64)"
        )
    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    options = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on v5p
    if shape in ("1x1", "1x2", "2x1"):
        options["chips_per_host_bounds"] = [*map(int, shape.split("x")), 1]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--topology {name}: libtpu knows {', '.join(TPUS)} in shapes such as v5e:2x4, v5e:16x16, "
            f"v6e:8x8, v5p:2x2x1, v5p:4x4x4, but not this one ({reason:.160})",
            exit_code=2,
        ) from error
    return Topology(name, slices, found.devices, kind, CHIPS[kind], CHIPS[kind].hbm_bytes)


def _gpus(name: str, kind: str, shape: str) -> Topology:
    """Cards of ``HOSTSxN`` or ``N``, as XLA's compiler for CUDA sees them."""
    if not has_cuda_compiler():
        raise UserError(
            f"--topology {name} needs XLA's compiler for CUDA: pip install 'sprint_jax[plan-cuda]' "
            "(Linux; no GPU is needed)"
        )
    jax.config.update("jax_platforms", "cpu")
    hosts, _, cards = shape.rpartition("x")
    gpu, sizes = GPUS[kind], f"1x{hosts or 1}x{cards}"
    how = dict(target_config=gpu.target, topology=sizes)
    found = topologies.get_topology_desc(platform="cuda", topology_name=name, **how)
    return Topology(name, 1, found.devices, gpu.chip, CHIPS[gpu.chip], usable(gpu.memory))


def has_cuda_compiler() -> bool:
    """Whether JAX's plugin for CUDA is installed, for version 13 as in the extra 'plan-cuda'."""
    try:
        return importlib.util.find_spec(CUDA_PLUGIN) is not None
    except ModuleNotFoundError:  # not even the package above it
        return False


def _local_memory(devices: Sequence, chip: Chip) -> float:
    """Bytes that a program may use of each local device."""
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    return float((devices[0].memory_stats() or {}).get("bytes_limit", chip.hbm_bytes))
