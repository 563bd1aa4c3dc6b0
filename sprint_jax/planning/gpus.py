"""Descriptions of NVIDIA's cards for XLA's compiler, which then needs no such card.

Each is a text of XLA's ``GpuTargetConfigProto`` with the fields that the compiler reads. Source: OpenXLA,
``xla/backends/gpu/target_config/specs/{a100_sxm_80,h100_sxm,h200}.txtpb``. What it could only tune on a card,
the choice among algorithms of matmuls and convolutions, is XLA's default.
"""

import os
from typing import NamedTuple

from ..core.errors import UserError


class Gpu(NamedTuple):
    """A card: its name in `chips.CHIPS`, bytes of its memory as the driver tells them, and its description."""

    chip: str
    memory: int
    target: str


# JAX's own part of a card's memory, unless one of these variables gives another.
FRACTION = 0.75
VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 device_memory_size: {memory} {fields}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_AMPERE = """
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 l2_cache_size: 41943040
  core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
  cuda_compute_capability { major: 8 feature_extension: NONE }"""
_HOPPER = """
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }"""


def _gpu(chip: str, name: str, memory: int, bandwidth: int, fields: str) -> Gpu:
    fields += f" memory_bandwidth: {bandwidth}"
    return Gpu(chip, memory, _TARGET.format(memory=memory, fields=fields, name=name))


GPUS = {
    "a100": _gpu("A100", "NVIDIA A100-SXM4-80GB", 85100068864, 2039040000000, _AMPERE),
    "h100": _gpu("H100", "NVIDIA H100 80GB HBM3", 84942979072, 3352320000000, _HOPPER),
    "h200": _gpu("H200", "NVIDIA H200 141GB HBM3e", 151397597184, 4800000000000, _HOPPER),
}


def usable(memory: float) -> float:
    """Bytes of a card's memory that a JAX program may use: `FRACTION` of it, or what `VARIABLES` say."""
    found = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), str(FRACTION))
    try:
        fraction = float(found)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise UserError(f"{VARIABLES[0]}={found} is not a fraction of a card's memory", exit_code=2)
    return fraction * memory
