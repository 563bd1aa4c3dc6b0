"""Folders of diffusers, written and read: ``config.json`` beside safetensors files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ..core.errors import UserError
from ..core.files import read_json, write_json_atomic
from ..core.schema import with_floats
from ..core.storage import local_copy, local_path
from ..models.control import EMBEDDERS
from ..models.dc_ae import AutoencoderDC
from ..models.sana import from_fields
from .dc_ae import dc_ae_table
from .files import load_params, open_safetensors, save_safetensors, write_safetensors
from .sana import (
    config_from_fields,
    control_config,
    control_fields,
    control_table,
    fields_from_config,
    sana_table,
)
from .tables import LINEAR, SAME, Entry

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
LOGVAR = "logvar_linear.safetensors"  # beside the weights, where diffusers does not look


def load_transformer(
    path: str | Path,
    dtype: Any = jnp.float32,
    *,
    fields: dict[str, Any] | None = None,
    shardings: Callable | None = None,
    allow_nonfinite: bool = False,
    on_host: bool = False,
) -> tuple[dict[str, Any], Any]:
    """Loads the transformer of a diffusers folder (``transformer/`` of a pipeline) or one safetensors file.

    Args:
      path: a folder with ``config.json`` and weights, in one file or by an index; or one file.
      dtype: of the parameters returned.
      fields: of SanaTransformer, e.g. one of ``SIZES``, for a file that has no ``config.json`` beside it.
      shardings, allow_nonfinite, on_host: see `files.load_params`.

    Returns:
      ``(fields, params)``: fields for ``SanaTransformer(**fields)``, with ``logvar`` where
      `save_transformer` wrote a logvar head.

    Raises:
      UserError: a file is missing, cut short or of another class; a config key or a tensor is unknown,
        missing or misshapen, or not finite.
    """
    path = local_copy(path)
    folder = path.parent if path.is_file() else path
    if fields is None:
        config = read_config(folder, "SanaTransformer2DModel")
        fields = fields_from_config(config, f"{folder}/config.json")
    fields = {key: value for key, value in fields.items() if key != "logvar"}
    how = dtype, shardings, allow_nonfinite, on_host
    params = load_params(sana_table(fields), open_safetensors(path, STEM), *how)
    if (folder / LOGVAR).is_file():
        params |= load_params(logvar_table(fields), open_safetensors(folder / LOGVAR), *how)
        fields["logvar"] = True
    return fields, params


def save_transformer(
    folder: str | Path, fields: dict[str, Any], params: Any, dtype: Any = jnp.float32
) -> None:
    """Writes a folder that diffusers' ``SanaTransformer2DModel.from_pretrained`` loads.

    An old config is removed first and the new one written last, so that a folder with a config is whole.
    The logvar head, if there is one, goes into a file of its own, in float32: training can go on from the
    folder.

    Args:
      folder: made if missing.
      fields: of SanaTransformer; params: its parameters.
      dtype: of the weights written.
    """
    folder = local_path(folder)
    for old in ("config.json", LOGVAR):
        (folder / old).unlink(missing_ok=True)
    save_safetensors(folder, STEM, sana_table(fields), params, dtype)
    if "logvar_linear" in params:
        write_safetensors(folder / LOGVAR, logvar_table(fields), params, jnp.float32)
    config = {"_class_name": "SanaTransformer2DModel"} | config_from_fields(fields)
    write_json_atomic(folder / "config.json", config)


def logvar_table(fields: dict[str, Any]) -> dict[str, Entry]:
    """Returns the table of the logvar head of a transformer with these fields."""
    path, width = ("logvar_linear", "kernel"), from_fields(fields).features
    return {
        "logvar_linear.weight": Entry(path, None, LINEAR, (1, width)),
        "logvar_linear.bias": Entry(("logvar_linear", "bias"), None, SAME, (1,)),
    }


def load_control(
    path: str | Path,
    fields: dict[str, Any],
    dtype: Any = jnp.float32,
    *,
    shardings: Callable | None = None,
    allow_nonfinite: bool = False,
    on_host: bool = False,
) -> tuple[dict[str, Any], Any]:
    """Loads the control branch of a diffusers folder (``controlnet/`` of a SanaControlNetPipeline).

    Args:
      fields: of the SanaTransformer that it belongs to; the rest as of `load_transformer`.

    Returns:
      ``(fields, params)``: the fields with those of the branch, which is wired as in diffusers, and its
      parameters, which go under ``control`` of the transformer's.

    Raises:
      UserError: as `load_transformer`; or the branch is of another transformer.
    """
    folder = local_copy(path)
    config = read_config(folder, "SanaControlNetModel")
    fields = control_fields(config, fields, f"{folder}/config.json")
    how = dtype, shardings, allow_nonfinite, on_host
    return fields, load_params(control_table(fields), open_safetensors(folder, STEM), *how)


def save_control(
    folder: str | Path, fields: dict[str, Any], params: Any, dtype: Any = jnp.float32
) -> None:
    """Writes a folder that diffusers' ``SanaControlNetModel.from_pretrained`` loads; the config comes last.

    A branch without embedders of its own gets copies of the transformer's, as in published folders. Diffusers
    runs it in its own wiring all the same (`models.control`), and its pictures differ from ours.

    Args:
      fields, params: of a SanaTransformer with its control branch.

    Raises:
      UserError: there is no branch, or its copies have QK norm, which the class does not know.
    """
    folder = local_path(folder)
    config = control_config(fields)
    branch = params["control"]
    if "time_embed" not in branch:
        branch = branch | {name: params[name] for name in EMBEDDERS}
    table = control_table(dict(fields) | {"control_wiring": "diffusers"})
    (folder / "config.json").unlink(missing_ok=True)
    save_safetensors(folder, STEM, table, branch, dtype)
    write_json_atomic(folder / "config.json", {"_class_name": "SanaControlNetModel"} | config)


def load_autoencoder(
    folder: str | Path, dtype: Any = jnp.float32, *, shardings: Callable | None = None
) -> tuple[AutoencoderDC, Any]:
    """Loads the autoencoder of a diffusers folder (``vae/`` of a pipeline).

    Arguments and errors are those of `load_transformer`.

    Returns:
      ``(autoencoder, params)``; ``autoencoder.dtype`` is float32 whatever the parameters are in.
    """
    folder = local_copy(folder)
    autoencoder = read_autoencoder(folder)
    try:
        table = dc_ae_table(autoencoder)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    tensors = open_safetensors(folder, STEM)
    return autoencoder, load_params(table, tensors, dtype, shardings)


def read_autoencoder(folder: Path) -> AutoencoderDC:
    """Reads the config of the autoencoder of a diffusers folder, without its weights."""
    config = read_config(folder, "AutoencoderDC")
    fields = {field.name for field in dataclasses.fields(AutoencoderDC)} - {"dtype"}
    unknown = sorted(set(config) - fields)
    if unknown:
        raise UserError(f"{folder}/config.json: key '{unknown[0]}' is unknown")
    try:
        config = {key: _tuples(value) for key, value in config.items()}
        return AutoencoderDC(**with_floats(AutoencoderDC, config))
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error


def save_autoencoder(
    folder: str | Path, autoencoder: AutoencoderDC, params: Any, dtype: Any = jnp.float32
) -> None:
    """Writes a folder that diffusers' ``AutoencoderDC.from_pretrained`` loads; the config comes last."""
    folder = local_path(folder)
    (folder / "config.json").unlink(missing_ok=True)
    save_safetensors(folder, STEM, dc_ae_table(autoencoder), params, dtype)
    config = dataclasses.asdict(autoencoder)
    del config["dtype"]
    write_json_atomic(folder / "config.json", {"_class_name": "AutoencoderDC"} | config)


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """Reads ``config.json`` without diffusers' private keys.

    Raises:
      UserError: the file is missing, damaged, or of another class.
    """
    config = read_json(folder / "config.json")
    found = config.get("_class_name")
    if found != class_name:
        raise UserError(f"{folder}/config.json is of class {found!r}, not {class_name}")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
