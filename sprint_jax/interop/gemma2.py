"""Folders of Gemma-2 in transformers, written and read: names, config and weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..core.errors import UserError
from ..core.files import read_json, write_json_atomic
from ..core.schema import check, with_floats
from ..core.storage import local_copy, local_path
from ..models.gemma2 import KINDS, Gemma2
from .files import Tensors, load_params, open_safetensors, save_safetensors
from .tables import LINEAR, SAME, Entry, make_table

STEM = "model"
CLASSES = ("Gemma2Model", "Gemma2ForCausalLM")

# Config keys with the values that the network supports, transformers' default first. Keys that are neither
# here nor fields of Gemma2 are about training, generation or storage.
_FIXED = {
    "model_type": ("gemma2",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}

_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 0}  # whatever the theta


def gemma2_table(gemma: Gemma2) -> dict[str, Entry]:
    """Returns the table of a text encoder, with the names of transformers' Gemma2Model."""
    return make_table(
        jax.eval_shape(gemma.init, jax.random.key(0)),
        lambda path: ".".join(path).replace("kernel", "weight"),
        lambda path, _: LINEAR if path[-1] == "kernel" else SAME,
        stacked="layers",
    )


def load_text_encoder(
    folder: str | Path,
    dtype: Any = jnp.float32,
    *,
    shardings: Callable | None = None,
    on_host: bool = False,
) -> tuple[Gemma2, Any]:
    """Loads the Gemma-2 of a transformers folder (``text_encoder/`` of a pipeline).

    Args:
      folder: of a Gemma2Model or a Gemma2ForCausalLM, whose head is ignored.
      dtype: of the parameters and of the network's matmuls.
      shardings, on_host: see `files.load_params`.

    Raises:
      UserError: a file is missing, cut short or of another class; `Gemma2` does not support the config; a
        tensor is unknown, missing or misshapen.
    """
    folder = local_copy(folder)
    gemma = read_text_encoder(folder, dtype)
    tensors = _without_head(open_safetensors(folder, STEM))
    how = dict(shardings=shardings, on_host=on_host)
    return gemma, load_params(gemma2_table(gemma), tensors, dtype, **how)


def read_text_encoder(folder: Path, dtype: Any = jnp.float32) -> Gemma2:
    """Reads the config of the Gemma-2 of a transformers folder, without its weights."""
    return _from_config(_read_config(folder), f"{folder}/config.json", dtype)


def save_text_encoder(
    folder: str | Path, gemma: Gemma2, params: Any, dtype: Any = jnp.float32
) -> None:
    """Writes a folder that transformers' ``Gemma2Model.from_pretrained`` loads; the config comes last."""
    folder = local_path(folder)
    (folder / "config.json").unlink(missing_ok=True)
    save_safetensors(folder, STEM, gemma2_table(gemma), params, dtype)
    config = {"architectures": ["Gemma2Model"], "model_type": "gemma2"}
    config |= {"torch_dtype": jnp.dtype(dtype).name, "hidden_activation": "gelu_pytorch_tanh"}
    fields = dataclasses.asdict(gemma)
    del fields["dtype"]
    if gemma.layer_types is None:
        del fields["layer_types"]
    write_json_atomic(folder / "config.json", config | fields)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    found = config.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or found[0] not in CLASSES:
        raise UserError(
            f"{folder}/config.json: architectures is {found!r}, not one of {', '.join(CLASSES)}"
        )
    return config


def _from_config(config: dict[str, Any], origin: str, dtype: Any) -> Gemma2:
    for key, allowed in _FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{origin}: {key} {config[key]!r} is not supported, only {allowed[0]!r}"
            )
    defaults = {field.name: field.default for field in dataclasses.fields(Gemma2)}
    fields = {key: config[key] for key in defaults.keys() & config.keys() - {"dtype"}}
    rope = config.get("rope_parameters")  # transformers 5 keeps rope_theta here
    if rope is not None:
        if not isinstance(rope, dict) or rope | {"rope_theta": 0} != _PLAIN_ROPE:
            raise UserError(f"{origin}: rope_parameters {rope!r} are not supported")
        fields["rope_theta"] = rope.get("rope_theta", defaults["rope_theta"])
    check(fields, KINDS, f"{origin}: ")
    types = tuple(fields.pop("layer_types", None) or ()) or None
    try:
        return Gemma2(**with_floats(Gemma2, fields), layer_types=types, dtype=jnp.dtype(dtype))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


def _without_head(tensors: Tensors) -> Tensors:
    """Returns the bare model's tensors of a file that has a head, which is tied to the embedding."""
    head, model = "lm_head.weight", "model."
    if not any(name.startswith(model) for name in tensors.shapes):
        return tensors
    names = {name.removeprefix(model): name for name in tensors.shapes if name != head}
    shapes = {short: tensors.shapes[name] for short, name in names.items()}
    return Tensors(tensors.origin, shapes, lambda name: tensors.read(names[name]))
