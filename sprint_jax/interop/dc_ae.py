"""The table of DC-AE: names and layouts of its tensors in diffusers' AutoencoderDC."""

import re

import jax
from einops import EinopsError

from ..core.errors import UserError
from ..models.dc_ae import AutoencoderDC
from .tables import CONV, DEPTHWISE, LINEAR, POINTWISE, SAME, Entry, Layout, grouped, make_table


def dc_ae_table(autoencoder: AutoencoderDC) -> dict[str, Entry]:
    """Returns the table of an autoencoder, encoder and decoder.

    Raises:
      UserError: widths do not divide as the shortcuts and the heads of attention want it.
    """
    try:
        shapes = jax.eval_shape(autoencoder.init, jax.random.key(0))
    except (TypeError, ValueError, ZeroDivisionError, EinopsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"autoencoder config: its widths do not fit together: {reason}") from error
    return make_table(shapes, _name, _layout)


def _name(path: tuple[str, ...]) -> str:
    """'encoder', 'down_blocks_0_1', 'conv1', 'kernel' -> 'encoder.down_blocks.0.1.conv1.weight'."""
    half, *modules, leaf = path
    modules = [re.sub(r"_(\d+)(?=_|$)", r".\1", module) for module in modules]
    if leaf in ("proj_in", "proj_out"):
        modules, leaf = [*modules, leaf], "weight"
    leaf = "weight" if leaf == "kernel" else leaf
    return ".".join([half, *modules, leaf]).replace("conv_out_norm", "conv_out.norm")


def _layout(path: tuple[str, ...], shape: tuple[int, ...]) -> Layout:
    module, leaf = path[-2:]
    if leaf in ("weight", "bias"):
        return SAME
    if leaf == "proj_in" or module == "conv_depth":
        return DEPTHWISE
    if leaf == "proj_out":
        return grouped(shape[0])
    if module in ("to_q", "to_k", "to_v", "to_out"):
        return LINEAR
    return POINTWISE if module in ("conv_inverted", "conv_point") else CONV
