"""Files of tensors: safetensors, in one file or several with an index, and torch's by its safe loader.

Parameters go from the file to their devices leaf by leaf: beside its own share, the host never holds
more than one leaf and the few tensors of it that are read at once.
"""

import concurrent.futures
import itertools
import math
import re
import threading
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..core.errors import UserError
from ..core.files import read_json, write_json_atomic
from ..core.schema import TEXT, Kind, check
from .tables import Entry, check_names

Tree = Any

FILE_NAME = Kind("a file's name", lambda v: TEXT.holds(v) and v == Path(v).name != "")
READERS = 4  # threads that fill a leaf from the tensors of its layers
SHARD_BYTES = 5 * 10**9  # the largest file that hubs and file systems take without complaint


class Tensors(NamedTuple):
    """The tensors of one model, still in their files.

    Attributes:
      origin: file or folder, for messages.
      shapes: by name.
      read: ``read(name)``, a NumPy array in torch's layout.
    """

    origin: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def open_safetensors(path: Path, stem: str = "model", ignore: str | None = None) -> Tensors:
    """Opens a safetensors file, or a folder's ``stem``.safetensors or ``stem``.safetensors.index.json.

    A folder without these may have the ``bf16`` or ``fp16`` variant alone, as some hub repositories do. What
    matches the pattern ``ignore`` is left out.

    Raises:
      UserError: a file is missing, cut short or no safetensors, a name is in two files, or a tensor is
        not of floating point.
    """
    where: dict[str, Path] = {}
    shapes = {}
    for file in [path] if path.is_file() else _weight_files(path, stem):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if ignore and re.fullmatch(ignore, name):
                    continue
                if name in where:
                    raise UserError(f"{file}: tensor {name} is in another file as well")
                tensor = opened.get_slice(name)
                if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise UserError(f"{file}: tensor {name} is {tensor.get_dtype()}, not a float")
                where[name], shapes[name] = file, tuple(tensor.get_shape())

    def read(name):
        # Opened each time: pages of a mapped file count as this process's memory until it is closed.
        with _open(where[name]) as opened:
            return opened.get_tensor(name)

    return Tensors(str(path), shapes, read)


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no whole safetensors file: {error}") from error


def _weight_files(folder: Path, stem: str) -> list[Path]:
    for variant in ("", ".bf16", ".fp16"):
        single = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if single.exists():
            return [single]
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index} has no weight_map from tensors to files")
            check(weight_map, dict.fromkeys(weight_map, FILE_NAME), f"{index}: weight_map ")
            return [folder / name for name in sorted(set(weight_map.values()))]
    return [folder / f"{stem}.safetensors"]


def open_torch(path: Path, key: str | None = None, ignore: str | None = None) -> Tensors:
    """Opens a ``.pth`` or ``.pt`` file by torch's weights-only loader, which runs no code.

    Args:
      path: the file; mapped, not read at once.
      key: the entry that holds the tensors, e.g. 'state_dict', unless the file is that dict itself.
      ignore: a pattern of names that are left out.

    Raises:
      UserError: torch is not installed; the file is missing, damaged or holds more than tensors; a tensor
        is not of floating point.
    """
    torch = import_torch(path)
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut short, or no file that torch 1.6 or newer wrote")
    found = _map_torch(torch, path, key)
    for name in [name for name in found if ignore and re.fullmatch(ignore, name)]:
        del found[name]
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: entry {name} is no tensor")
        if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{path}: tensor {name} is {value.dtype}, not a float")
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    limit, seen, lock = path.stat().st_size // 8, 0, threading.Lock()

    def read(name):
        nonlocal found, seen
        with lock:
            if seen > limit:
                # Pages that were read count as this process's memory until the file is mapped again.
                found, seen = _map_torch(torch, path, key), 0
            tensor = found[name].detach()
            seen += tensor.nbytes
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type of its own
            return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    return Tensors(str(path), shapes, read)


def _map_torch(torch, path: Path, key: str | None) -> dict[str, Any]:
    """Maps a file of torch into memory; raises UserError unless it is a dict of tensors and plain values."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch, pickle and zip raise a dozen classes
        # Torch's own message advises to load without this protection.
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        if code:
            reason = f"it holds {code[1]}, and such files can run code"
        raise UserError(
            f"{path} was not loaded, since it holds more than tensors: {reason}. If you trust it, save its "
            "tensors alone to another file"
        ) from error
    if isinstance(found, dict) and key in found:
        found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no tensors by name: is it a checkpoint of another kind?")
    return found


def import_torch(path: Path):
    """Returns torch, which only ``.pth`` and ``.pt`` files need; raises UserError if it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: .pth and .pt files need torch: pip install torch, or use safetensors files"
        ) from None
    return torch


def load_params(
    table: dict[str, Entry],
    tensors: Tensors,
    dtype: Any,
    shardings: Callable[[Tree], Tree] | None = None,
    allow_nonfinite: bool = False,
    on_host: bool = False,
) -> Tree:
    """Loads our parameters, each leaf straight to its devices.

    Args:
      table: of the model.
      tensors: names and shapes must be those of the table.
      dtype: of the result.
      shardings: a function of the tree of `jax.ShapeDtypeStruct` that returns the tree of shardings, e.g. a
        partial `parallel.sharding.state_shardings`; None puts all on the default device.
      allow_nonfinite: takes NaN and infinity as well.
      on_host: leaves are NumPy arrays, on no device.

    Raises:
      UserError: a tensor holds NaN or infinity; and see `tables.check_names`.
    """
    check_names(table, tensors.shapes, tensors.origin)
    parts: dict[tuple, list[tuple[str, Entry]]] = {}
    for name, entry in table.items():
        parts.setdefault(entry.path, []).append((name, entry))

    def struct(entries):
        entry = entries[0][1]
        shape = entry.layout.read(np.broadcast_to(np.float32(0), entry.shape)).shape
        layers = () if entry.layer is None else (len(entries),)
        return jax.ShapeDtypeStruct(layers + shape, jnp.dtype(dtype))

    structs = {path: struct(entries) for path, entries in parts.items()}
    places = flatten_dict(shardings(unflatten_dict(structs))) if shardings else {}
    leaves = {}

    def fill(buffer, name, entry):
        place = buffer if entry.layer is None else buffer[entry.layer]
        place[...] = entry.layout.read(tensors.read(name))
        if not allow_nonfinite and not is_finite(place):
            raise UserError(
                f"{tensors.origin}: tensor {name} holds NaN or infinity: it is of a failed run or damaged"
            )

    with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
        # The largest first: its buffer on the host is free before the others are read.
        for path in sorted(structs, key=lambda path: -structs[path].size):
            buffer = np.empty(structs[path].shape, structs[path].dtype)
            # In order, so that of several bad tensors the first is named.
            for _ in readers.map(fill, itertools.repeat(buffer), *zip(*parts[path], strict=True)):
                pass
            if on_host:
                leaves[path] = buffer
                continue
            if shardings:
                piece = buffer.__getitem__
                leaf = jax.make_array_from_callback(buffer.shape, places[path], piece)
            else:
                leaf = jax.device_put(buffer)
            # A transfer runs beside this thread and holds its buffer until it is done.
            leaves[path] = jax.block_until_ready(leaf)
            del buffer
    return unflatten_dict(leaves)


def is_finite(array: np.ndarray) -> bool:
    """Whether an array of floats of any kind holds no NaN and no infinity; makes no copy of it."""
    # Bits of positive numbers grow with them, up to infinity and NaN; negative ones have the top bit as well.
    size = array.dtype.itemsize
    limit = np.asarray([np.inf, -np.inf]).astype(array.dtype)
    signed, unsigned = f"i{size}", f"u{size}"
    if not array.size:
        return True
    positive = array.view(signed).max() < limit.view(signed)[0]
    return bool(positive and array.view(unsigned).max() < limit.view(unsigned)[1])


def to_torch(params: Tree, entry: Entry, dtype: Any = None) -> np.ndarray:
    """Returns the tensor of one entry from our parameters, contiguous and in torch's layout."""
    leaf = params
    for key in entry.path:
        leaf = leaf[key]
    leaf = leaf if entry.layer is None else leaf[entry.layer]
    return np.ascontiguousarray(entry.layout.write(np.asarray(leaf)).astype(dtype or leaf.dtype))


def save_safetensors(
    folder: Path,
    stem: str,
    table: dict[str, Entry],
    params: Tree,
    dtype: Any,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes ``stem``.safetensors, or numbered files of at most ``shard_bytes`` and their index.

    Each file appears under its name when it is whole.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    folder.mkdir(parents=True, exist_ok=True)
    split = split_state_dict_into_shards_factory(
        table,
        get_storage_size=lambda entry: math.prod(entry.shape) * jnp.dtype(dtype).itemsize,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    _remove_old(folder, stem, keep=split.filename_to_tensors)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: table[name] for name in names}, params, dtype)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json_atomic(folder / f"{stem}.safetensors.index.json", index)


def write_safetensors(path: Path, table: dict[str, Entry], params: Tree, dtype: Any) -> None:
    """Writes the tensors of a table to one file, which appears when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    tensors = {name: to_torch(params, entry, dtype) for name, entry in table.items()}
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(path)


def _remove_old(folder: Path, stem: str, keep: Iterable[str]) -> None:
    """Removes files of an earlier save that a loader would read as part of this one."""
    part = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json|\.partial)?")
    for path in folder.iterdir():
        if part.fullmatch(path.name) and path.name not in keep:
            path.unlink()
