"""Folders as diffusers writes and reads them: ``config.json`` beside safetensors files."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from ..errors import UserError
from ..models.dc_ae import AutoencoderDC
from ..training.log import write_json_atomic
from .dc_ae import dc_ae_table
from .tables import Entry, check_names, from_torch, to_torch

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_autoencoder(folder: str | Path, dtype=jnp.float32) -> tuple[AutoencoderDC, Any]:
    """The autoencoder of a diffusers folder (``vae/`` of a pipeline).

    Args:
      folder: has ``config.json`` of an AutoencoderDC and its weights, in one file or by an index.
      dtype: of the parameters returned.

    Returns:
      ``(autoencoder, params)``; ``autoencoder.dtype`` is float32 whatever the parameters are in.

    Raises:
      UserError: a file is missing, cut short or of another class; a config key or a tensor is unknown,
        missing or misshapen.
    """
    folder = Path(folder)
    config = _read_config(folder, "AutoencoderDC")
    fields = {field.name for field in dataclasses.fields(AutoencoderDC)} - {"dtype"}
    unknown = sorted(set(config) - fields)
    if unknown:
        raise UserError(f"{folder}/config.json: key '{unknown[0]}' is unknown")
    autoencoder = AutoencoderDC(**{key: _tuples(value) for key, value in config.items()})
    return autoencoder, _read_tensors(folder, dc_ae_table(autoencoder), dtype)


def save_autoencoder(
    folder: str | Path, autoencoder: AutoencoderDC, params, dtype=jnp.float32
) -> None:
    """Writes a folder that diffusers' ``AutoencoderDC.from_pretrained`` loads. Weights come first and
    the config last, so that a folder with a config is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_torch(dc_ae_table(autoencoder), params)
    tensors = {name: jnp.asarray(tensor, dtype) for name, tensor in tensors.items()}
    partial = folder / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)
    config = dataclasses.asdict(autoencoder)
    del config["dtype"]
    write_json_atomic(folder / "config.json", {"_class_name": "AutoencoderDC"} | config)


def _read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """``config.json`` without the keys that diffusers keeps for itself."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is this the folder of one diffusers model?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != class_name:
        raise UserError(f"{path} is of class {found!r}, not {class_name}")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _read_tensors(folder: Path, table: dict[str, Entry], dtype) -> Any:
    """Parameters from the safetensors files of ``folder``, one tensor at a time."""
    with contextlib.ExitStack() as stack:
        where = {}
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="flax"))
            except FileNotFoundError:
                raise UserError(f"{path} is missing") from None
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is no whole safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in where:
                    raise UserError(f"{path}: tensor {name} is in another file as well")
                where[name] = file
        shapes = {name: file.get_slice(name).get_shape() for name, file in where.items()}
        check_names(table, shapes, str(folder))
        return from_torch(table, lambda name: where[name].get_tensor(name).astype(dtype))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    if not index.exists():
        return [folder / WEIGHTS]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read: {error!r}") from error
