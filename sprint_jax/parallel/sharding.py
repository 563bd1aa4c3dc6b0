"""One mesh and one rule for the places of state, weights in use and batches on the devices.

Mesh axes: ``data`` replicates parameters, ``fsdp`` splits them between uses, ``tensor`` splits the work
of each layer as well (heads of the attentions, hidden channels of the MLP). Batches are split over
``data`` and ``fsdp``. Each axis is a product of two parts: one between slices, over the data-center
network (DCN), and one inside a slice, over its own interconnect (ICI). The axes are Auto, so GSPMD
propagates shardings through any Linen module; `jax.make_mesh` defaults to Explicit axes, under which
Linen's Dense raises.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..core.errors import UserError

Tree = Any

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Megatron's pairs: the first of two layers splits its outputs over ``tensor``, the second its inputs.
SPLITS_OUTPUTS = ("to_q", "to_k", "to_v", "conv_inverted", "conv_depth")
SPLITS_INPUTS = ("to_out_0", "conv_point")
GLU = ("conv_inverted", "conv_depth")  # whose outputs are [values | gates]

SMALLEST = 16  # numbers in an array that is worth splitting; counters are not
SHARED = (
    1 << 28
)  # bytes that are on a device at once while processes tell one another what they have


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    dcn_data: int = -1,
    dcn_fsdp: int = 1,
    dcn_tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with axes ``data, fsdp, tensor``; one size of each three may be -1, "what is left".

    Args:
      data, fsdp, tensor: sizes inside a slice; their product is the number of devices of a slice.
      dcn_data, dcn_fsdp, dcn_tensor: sizes between slices; their product is the number of slices.
      devices: all by default. Those that tell a ``slice_index`` form slices by it, others are one.

    Raises:
      UserError: exit code 2, naming the sizes, if a product is not the number to be covered.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    inner = _fill({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices) // slices, "devices")
    outer = _fill(
        {"dcn_data": dcn_data, "dcn_fsdp": dcn_fsdp, "dcn_tensor": dcn_tensor}, slices, "slices"
    )
    # A size need not be that of a physical axis: 64 of 16x16 chips are one and a quarter of the other.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        placed = mesh_utils.create_device_mesh(inner, devices, **split)
    else:
        placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fill(sizes: dict[str, int], count: int, what: str) -> tuple[int, ...]:
    """Returns the sizes with -1 replaced; raises UserError unless their product is ``count``."""
    unknown = [name for name, size in sizes.items() if size == -1]
    wrong = [name for name, size in sizes.items() if size < 1 and size != -1]
    known = math.prod(size for size in sizes.values() if size > 0)
    wanted = f"mesh {' x '.join(f'{name}={size}' for name, size in sizes.items())}"
    if wrong:
        raise UserError(f"{wanted}: {wrong[0]} must be at least 1, or -1 for what is left", 2)
    if len(unknown) > 1:
        raise UserError(f"{wanted}: only one of {' and '.join(unknown)} may be -1", 2)
    if count % known or not (unknown or known == count):
        # The axis at which the product stops dividing, or the one to fill up with.
        products = np.cumprod([max(size, 1) for size in sizes.values()])
        at = next((n for n, product in zip(sizes, products, strict=True) if count % product), None)
        hint = f"{at} does not fit" if at else f"set {next(iter(sizes))}=-1 to use all of them"
        raise UserError(f"{wanted} does not cover {count} {what}: {hint}", 2)
    return tuple(count // known if size == -1 else size for size in sizes.values())


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding by which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: Mesh) -> int:
    """Returns the number of parts into which a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def state_shardings(mesh: Mesh, state: Tree) -> Tree:
    """Returns shardings for params, EMA and optimizer state at rest, split as far as they can be.

    ``tensor`` takes the axis along which the layer's work is split (`SPLITS_OUTPUTS`,
    `SPLITS_INPUTS`), ``fsdp`` the larger of the last two axes that is free and that it divides; what is
    left of ``tensor`` goes to another axis. The layers' axis of stacked blocks is never split, nor are
    arrays of fewer than `SMALLEST` numbers. What no size divides is replicated.

    Args:
      state: pytree of arrays or ShapeDtypeStructs.
    """
    sizes = _sizes(mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _at_rest(_names(path), leaf.shape, sizes)), state
    )


def _names(path) -> list[str]:
    return [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]


def _sizes(mesh: Mesh) -> dict[str, int]:
    """Returns the sizes of the axes that have more than one device."""
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def _split_axis(names: Sequence[str], rank: int) -> int | None:
    """Returns the axis of a leaf along which ``tensor`` splits its layer's work, or None."""
    if any(name in SPLITS_OUTPUTS for name in names):
        return rank - 1
    if any(name in SPLITS_INPUTS for name in names) and names[-1] == "kernel":
        return rank - 2
    return None


def _at_rest(names: Sequence[str], shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """Applies the rule of `state_shardings` to one leaf; ``names`` are the keys on the way to it."""
    rank = len(shape)
    first = 1 if "transformer_blocks" in names else 0
    free = list(range(max(first, rank - 2), rank)) if np.prod(shape) >= SMALLEST else []
    placed: dict[int, str] = {}

    def place(axis: str, choices: Sequence[int]) -> None:
        for choice in choices if axis in sizes and axis not in placed.values() else ():
            if choice in free and shape[choice] % sizes[axis] == 0:
                placed[choice] = axis
                free.remove(choice)
                return

    # The halves of a GLU are regrouped before use (`Partition.gather`): their axis is no place for it.
    if not set(GLU) & set(names):
        place("tensor", [_split_axis(names, rank)])
    # Of equal axes the last.
    place("fsdp", sorted(free, key=lambda axis: (-shape[axis], -axis)))
    place("tensor", list(free))
    return PartitionSpec(*(placed.get(axis) for axis in range(rank))) if placed else PartitionSpec()


def _while_used(
    names: Sequence[str], shape: tuple[int, ...], sizes: dict[str, int]
) -> PartitionSpec:
    """Returns the place of a block's leaf while it is used: split over ``tensor`` alone, if its layer is."""
    axis = _split_axis(names, len(shape))
    if "tensor" not in sizes or axis is None:
        return PartitionSpec()
    halves = 2 if set(GLU) & set(names) else 1
    if shape[axis] % (halves * sizes["tensor"]):
        return PartitionSpec()
    return PartitionSpec(*("tensor" if i == axis else None for i in range(len(shape))))


class Partition(NamedTuple):
    """Sharding constraints that a network puts on its weights and activations; a static field of its module.

    Without them, GSPMD keeps the weights where they lie and moves the far larger activations.
    """

    mesh: Mesh

    def batch(self, x: jax.Array) -> jax.Array:
        """Splits an activation [B, ...] over its batch alone."""
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def ways(self, hidden: int) -> int:
        """Returns the number of parts into which ``tensor`` splits a GLU of this width; 1 if it cannot."""
        size = self.mesh.shape["tensor"]
        return 1 if hidden % size else size

    def gather(self, params: Tree) -> Tree:
        """Moves parameters to where their use needs them, and their gradients back to the state's places.

        Weights are gathered over ``fsdp`` for this use only, and their gradients leave it summed and
        scattered (ZeRO 3). Stacked blocks are left alone: the scan gathers one block at a time. The
        last axis of a GLU's first layers, [values | gates], is regrouped into ``ways`` parts that
        hold values and gates of the same channels, so that no product crosses devices.
        """
        sizes = _sizes(self.mesh)

        def move(path, leaf):
            names = _names(path)
            if "transformer_blocks" in names:
                return leaf
            home = NamedSharding(self.mesh, _at_rest(names, leaf.shape, sizes))
            there = NamedSharding(self.mesh, _while_used(names, leaf.shape, sizes))
            if not set(GLU) & set(names) or there.spec == PartitionSpec():
                return _there_and_back(leaf, there, home)
            leaf = _there_and_back(leaf, replicated(self.mesh), home)
            ways = self.ways(leaf.shape[-1] // 2)
            leaf = rearrange(leaf, "... (two n c) -> ... (n two c)", two=2, n=ways)
            return jax.lax.with_sharding_constraint(leaf, there)

        return jax.tree_util.tree_map_with_path(move, params)


def in_use(model, params: Tree) -> Tree:
    """Gathers ``params`` before their use, as ``model.partition`` says; the model's scan gathers the blocks."""
    return model.partition.gather(params) if model.partition is not None else params


def _there_and_back(x: jax.Array, there: NamedSharding, home: NamedSharding) -> jax.Array:
    """Lays ``x`` out as ``there``, and its cotangent as ``home``; the transpose of a plain sharding
    constraint would keep the cotangent ``there``, whole on every device."""
    constrain = jax.lax.with_sharding_constraint
    return jax.custom_derivatives.linear_call(
        lambda _, x: constrain(x, there), lambda _, x: constrain(x, home), (), x
    )


def place_shapes(tree: Tree, shardings: Tree) -> Tree:
    """Returns ShapeDtypeStructs of a tree's leaves with their shardings, or with the one for all of them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )


def same_everywhere(array: np.ndarray) -> np.ndarray:
    """Returns the array of process 0 on every process; what each computes may differ in its last bits."""
    return array if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(array)


def from_everyone(array: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, of one shape, stacked in their order; all call it together."""
    return array[None] if jax.process_count() == 1 else multihost_utils.process_allgather(array)


def bytes_from_everyone(mine: bytes) -> list[bytes]:
    """Returns the bytes of all processes, of any lengths, in their order; all call it together."""
    length = np.frombuffer(np.int64(len(mine)).tobytes(), np.uint8)  # devices hold no int64
    lengths = np.ascontiguousarray(from_everyone(length)).view(np.int64)[:, 0]
    found, part = [bytearray() for _ in lengths], max(1, SHARED // len(lengths))
    for start in range(0, int(lengths.max()), part):
        block = np.zeros(min(part, int(lengths.max()) - start), np.uint8)
        own = np.frombuffer(mine[start : start + len(block)], np.uint8)
        block[: len(own)] = own
        for whole, length, row in zip(found, lengths, from_everyone(block), strict=True):
            whole += row[: max(0, length - start)].tobytes()
    return [bytes(whole) for whole in found]


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process' devices hold, as increasing numbers."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = {row for (part,) in indices.values() for row in range(*part.indices(batch_size))}
    return np.asarray(sorted(rows))


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays, split over the devices, from this host's rows of a batch (`local_rows`)."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)
