"""Name tables: where each tensor of a torch model lies in our parameters, and in which layout.

A table is a dict from torch's name to an `Entry`, made from the shapes of our parameters, so that it
is total: every tensor and every leaf is in it once. It serves both directions.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from ..errors import UserError

Tree = Any


class Layout(NamedTuple):
    """``read`` turns torch's array into ours, ``write`` ours into torch's; transposes and reshapes only."""

    read: Callable
    write: Callable


SAME = Layout(lambda a: a, lambda a: a)
# [out, in] and [in, out]
LINEAR = Layout(lambda a: a.T, lambda a: a.T)
# [out, in, kh, kw] and [kh, kw, in, out]
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
# [out, in, 1, 1] and [in, out]
POINTWISE = Layout(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])
# [channels, 1, kh, kw] and [kh, kw, channels]
DEPTHWISE = Layout(lambda a: a[:, 0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None])


def grouped(groups: int) -> Layout:
    """[groups * out, in, 1, 1] and [groups, in, out]."""

    def read(a):
        return a.reshape(groups, -1, a.shape[1]).transpose(0, 2, 1)

    def write(a):
        return a.transpose(0, 2, 1).reshape(-1, a.shape[1])[:, :, None, None]

    return Layout(read, write)


class Entry(NamedTuple):
    """A tensor's path in our parameters, its layout, and torch's shape."""

    path: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]


def make_table(
    shapes: Tree, name: Callable[[tuple[str, ...]], str], layout: Callable[..., Layout]
) -> dict[str, Entry]:
    """The table of a model.

    Args:
      shapes: our parameters, or their `jax.eval_shape`.
      name: torch's name of the leaf at a path of keys.
      layout: ``layout(path, shape)`` of it.

    Raises:
      ValueError: two leaves have one name.
    """
    table = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = tuple(key.key for key in keys)
        entry = layout(path, leaf.shape)
        torch_shape = jax.eval_shape(
            entry.write, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        ).shape
        if name(path) in table:
            raise ValueError(f"two parameters are called {name(path)}")
        table[name(path)] = Entry(path, entry, torch_shape)
    return table


def check_names(table: dict[str, Entry], shapes: dict[str, Iterable[int]], origin: str) -> None:
    """Refuses tensors other than those of the table, before any of them is read.

    Args:
      shapes: of the tensors found, by name.
      origin: file or folder, for the message.

    Raises:
      UserError: a tensor is unknown, missing, or of another shape.
    """
    unknown, missing = sorted(set(shapes) - set(table)), sorted(set(table) - set(shapes))
    if unknown:
        raise UserError(f"{origin}: tensor {unknown[0]} has no place in this model{_more(unknown)}")
    if missing:
        raise UserError(f"{origin}: tensor {missing[0]} is missing{_more(missing)}")
    for name, shape in shapes.items():
        if tuple(shape) != table[name].shape:
            raise UserError(
                f"{origin}: tensor {name} has shape {tuple(shape)}, but the config makes it "
                f"{table[name].shape}"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def from_torch(table: dict[str, Entry], read: Callable[[str], Any]) -> Tree:
    """Our parameters from torch's tensors; ``read(name)`` gives one of them, checked already."""
    params: dict = {}
    for name, entry in table.items():
        node = params
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
        node[entry.path[-1]] = entry.layout.read(read(name))
    return params


def to_torch(table: dict[str, Entry], params: Tree) -> dict[str, np.ndarray]:
    """Torch's tensors, contiguous NumPy arrays, from our parameters; dtypes are kept."""
    tensors = {}
    for name, entry in table.items():
        leaf = params
        for key in entry.path:
            leaf = leaf[key]
        tensors[name] = np.ascontiguousarray(entry.layout.write(np.asarray(leaf)))
    return tensors
