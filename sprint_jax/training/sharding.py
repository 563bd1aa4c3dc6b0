"""One mesh, one rule: how state and batches lie on the devices.

Axes: ``data`` replicates parameters, ``fsdp`` also splits them. Batches are split over both. The
axes are Auto, so GSPMD propagates shardings through any Linen module; `jax.make_mesh` defaults to
Explicit axes, under which Linen's Dense raises.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..errors import UserError


def make_mesh(data: int, fsdp: int, devices=None) -> Mesh:
    """A (data, fsdp) mesh over all devices; one of the two sizes may be -1, "what is left".

    Raises:
      UserError: if the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp}
    unknown = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(unknown) == 1 and known > 0 and len(devices) % known == 0:
        sizes[unknown[0]] = len(devices) // known
    if unknown[1:] or min(sizes.values()) < 1 or sizes["data"] * sizes["fsdp"] != len(devices):
        raise UserError(
            f"mesh data={data} x fsdp={fsdp} does not cover {len(devices)} devices; use -1 for one",
            exit_code=2,
        )
    return jax.make_mesh(
        (sizes["data"], sizes["fsdp"]),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(mesh: Mesh, state):
    """Shardings for params, EMA and optimizer state: kernels are split over ``fsdp``.

    A matmul kernel ``[..., in, out]`` is split along the larger of its last two axes that ``fsdp``
    divides. Everything else (norms, biases, modulation tables, factored moments, counters) is small
    and replicated: splitting the 6 x d tables costs an all-to-all in every block.

    Args:
      state: pytree of arrays or ShapeDtypeStructs.
    """
    size = mesh.shape["fsdp"]

    def rule(path, leaf):
        name = getattr(path[-1], "key", None) if path else None
        if size == 1 or name != "kernel" or leaf.ndim < 2:
            return replicated(mesh)
        axes = sorted((leaf.ndim - 1, leaf.ndim - 2), key=lambda axis: -leaf.shape[axis])
        for axis in axes:
            if leaf.shape[axis] % size == 0:
                return NamedSharding(
                    mesh,
                    PartitionSpec(*(["fsdp" if i == axis else None for i in range(leaf.ndim)])),
                )
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(rule, state)


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows of a global batch as global arrays, split over all devices."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
