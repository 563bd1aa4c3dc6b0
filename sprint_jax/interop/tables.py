"""Tables of names: the place and the layout of each tensor of a torch model in our parameters.

A table is a dict from torch's name to an `Entry`. It is made from the shapes of our parameters and so
holds every leaf once. It serves both directions; `files` reads and writes by it.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from ..core.errors import UserError

Tree = Any


class Layout(NamedTuple):
    """``read`` turns torch's array into ours and ``write`` ours into torch's, by transposes and reshapes."""

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
    """A tensor's place in our parameters, its layout, and torch's shape.

    Attributes:
      path: keys of the leaf.
      layer: index on the leaf's leading axis, where the layers of a model are stacked on one; else None.
      layout: between torch's array and ours, or ours at that index.
      shape: of torch's array.
    """

    path: tuple[str, ...]
    layer: int | None
    layout: Layout
    shape: tuple[int, ...]


def make_table(
    shapes: Tree,
    name: Callable[[tuple[str, ...]], str],
    layout: Callable[..., Layout],
    stacked: str | None = None,
) -> dict[str, Entry]:
    """Makes the table of a model.

    Args:
      shapes: our parameters, or their `jax.eval_shape`.
      name: ``name(path)``, torch's name of the leaf at a path of keys; after ``stacked`` comes the layer's
        number.
      layout: ``layout(path, shape)`` of the leaf; below ``stacked``, of one layer.
      stacked: key above leaves [layers, ...], which are one tensor per layer in torch.

    Raises:
      ValueError: two leaves have one name.
    """
    table = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = tuple(key.key for key in keys)
        shape, layers, after = leaf.shape, (None,), 0
        if stacked in path:
            shape, layers, after = leaf.shape[1:], range(leaf.shape[0]), path.index(stacked) + 1
        between = layout(path, shape)
        torch_shape = between.write(np.broadcast_to(np.float32(0), shape)).shape
        for layer in layers:
            middle = () if layer is None else (str(layer),)
            torch_name = name((*path[:after], *middle, *path[after:]))
            if torch_name in table:
                raise ValueError(f"two parameters are called {torch_name}")
            table[torch_name] = Entry(path, layer, between, torch_shape)
    return table


def check_names(table: dict[str, Entry], shapes: dict[str, Iterable[int]], origin: str) -> None:
    """Raises UserError if a tensor is unknown, missing, or of another shape than in the table.

    Args:
      shapes: of the tensors found, by name.
      origin: file or folder, for the message.
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
