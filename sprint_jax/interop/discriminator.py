"""Files of LADD heads: those of NVlabs/Sana, of diffusers' training script (``disc_heads.pt``), and ours.

All hold the same tensors: convolutions as torch's spectral norm keeps them (``weight_orig`` and its two
singular vectors) and norms. NVlabs' names begin with ``heads.``, the script's do not.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from ..core.errors import UserError
from ..models.discriminator import init_heads
from .files import Tensors, load_params, open_safetensors, open_torch, write_safetensors
from .tables import SAME, Entry, Layout, make_table

# [out, in, k] and [k, in, out]
CONV1D = Layout(lambda a: a.transpose(2, 1, 0), lambda a: a.transpose(2, 1, 0))


def heads_table(width: int, heads: int) -> dict[str, Entry]:
    """Returns the table of ``{'params', 'spectral'}`` of heads on feature maps of ``width`` channels."""
    features = (jax.ShapeDtypeStruct((1, 1, 1, width), jnp.float32),) * heads
    return make_table(jax.eval_shape(init_heads, features, jax.random.key(0)), _name, _layout)


def load_heads(path: str | Path, *, shardings: Callable | None = None) -> dict:
    """Loads ``{'params', 'spectral'}`` of `models.discriminator.DiscriminatorHeads`, float32.

    Args:
      path: a ``.safetensors`` file; any other is read by torch, which must be installed.
      shardings: see `files.load_params`.

    Raises:
      UserError: the file is missing, damaged or holds code; a tensor is unknown, missing or misshapen.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        tensors = open_torch(path, "state_dict")
    elif path.is_file():
        tensors = open_safetensors(path)
    else:
        raise UserError(f"{path} is missing")
    if not any(name.startswith("heads.") for name in tensors.shapes):
        shapes = {f"heads.{name}": shape for name, shape in tensors.shapes.items()}
        read = tensors.read
        tensors = Tensors(str(path), shapes, lambda name: read(name.removeprefix("heads.")))
    shape = tensors.shapes.get("heads.0.main.0.0.weight_orig")
    if shape is None:
        raise UserError(f"{path} has no LADD heads: tensor heads.0.main.0.0.weight_orig is missing")
    count = len({name.split(".")[1] for name in tensors.shapes if name.startswith("heads.")})
    return load_params(heads_table(shape[0], count), tensors, jnp.float32, shardings)


def save_heads(path: str | Path, heads: dict) -> None:
    """Writes ``{'params', 'spectral'}`` in float32 to a safetensors file, under NVlabs' names."""
    params = heads["params"]
    width = params["heads_0"]["main_0_conv"]["bias"].shape[0]
    write_safetensors(Path(path), heads_table(width, len(params)), heads, jnp.float32)


_MODULES = {
    "main_0_conv": "main.0.0",
    "main_0_norm": "main.0.1",
    "main_1_conv": "main.1.fn.0",
    "main_1_norm": "main.1.fn.1",
    "cls": "cls",
}
_LEAVES = {"kernel": "weight_orig", "u": "weight_u", "v": "weight_v"}


def _name(path: tuple[str, ...]) -> str:
    """'spectral', 'heads_0', 'main_1_conv', 'u' -> 'heads.0.main.1.fn.0.weight_u'."""
    _, head, module, leaf = path
    return f"{head.replace('_', '.')}.{_MODULES[module]}.{_LEAVES.get(leaf, leaf)}"


def _layout(path: tuple[str, ...], shape: tuple[int, ...]) -> Layout:
    if path[-1] == "kernel":
        return CONV1D
    return _vector(shape[0]) if path[-1] == "v" else SAME


def _vector(k: int) -> Layout:
    """[in * k] and [k, in]: torch's norm is that of the kernel as a matrix [out, in * k]."""
    return Layout(lambda a: a.reshape(-1, k).T, lambda a: a.T.reshape(-1))
