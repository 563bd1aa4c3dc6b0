"""Names, config and folders of Gemma-2 as transformers writes and reads them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import UserError
from ..models.gemma2 import Gemma2
from ..training.log import write_json_atomic
from .files import Tensors, load_params, open_safetensors, save_safetensors
from .tables import LINEAR, SAME, Entry, make_table

STEM = "model"
CLASSES = ("Gemma2Model", "Gemma2ForCausalLM")

# What the network always does, as the config says it, and transformers' default where it does not.
# Keys that are neither here nor fields of Gemma2 are about training, generation or storage.
_FIXED = {
    "model_type": ("gemma2",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def gemma2_table(gemma: Gemma2) -> dict[str, Entry]:
    """The table of a text encoder, in the names of transformers' Gemma2Model."""
    shapes = jax.eval_shape(gemma.init, jax.random.key(0))
    return make_table(shapes, _name, _layout, stacked="layers")


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path).replace("kernel", "weight")


def _layout(path: tuple[str, ...], shape: tuple[int, ...]):
    return LINEAR if path[-1] == "kernel" else SAME


def load_text_encoder(
    folder: str | Path, dtype: Any = jnp.float32, *, shardings: Callable | None = None
) -> tuple[Gemma2, Any]:
    """The Gemma-2 of a transformers folder (``text_encoder/`` of a pipeline).

    Args:
      folder: has ``config.json`` of a Gemma2Model or a Gemma2ForCausalLM, whose head is ignored, and its
        weights, in one file or by an index.
      dtype: of the parameters and of the network's matmuls.
      shardings: see `files.load_params`.

    Returns:
      ``(gemma, params)``.

    Raises:
      UserError: a file is missing, cut short or of another class; the config asks for something that
        `Gemma2` does not do; a tensor is unknown, missing or misshapen.
    """
    folder = Path(folder)
    gemma = _from_config(_read_config(folder), f"{folder}/config.json", dtype)
    tensors = _without_head(open_safetensors(folder, STEM))
    return gemma, load_params(gemma2_table(gemma), tensors, dtype, shardings)


def save_text_encoder(
    folder: str | Path, gemma: Gemma2, params: Any, dtype: Any = jnp.float32
) -> None:
    """Writes a folder that transformers' ``Gemma2Model.from_pretrained`` loads. Weights come first and
    the config last, so that a folder with a config is whole."""
    folder = Path(folder)
    save_safetensors(folder, STEM, gemma2_table(gemma), params, dtype)
    config = {"architectures": ["Gemma2Model"], "model_type": "gemma2"}
    config |= {"torch_dtype": jnp.dtype(dtype).name, "hidden_activation": "gelu_pytorch_tanh"}
    fields = dataclasses.asdict(gemma)
    del fields["dtype"]
    if gemma.layer_types is None:
        del fields["layer_types"]
    write_json_atomic(folder / "config.json", config | fields)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is this the folder of one text encoder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(found, list) or len(found) != 1 or found[0] not in CLASSES:
        raise UserError(f"{path}: architectures is {found!r}, not one of {', '.join(CLASSES)}")
    return config


def _from_config(config: dict[str, Any], origin: str, dtype: Any) -> Gemma2:
    for key, allowed in _FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{origin}: {key} {config[key]!r} is not supported, only {allowed[0]!r}"
            )
    names = {field.name for field in dataclasses.fields(Gemma2)} - {"dtype"}
    fields = {key: value for key, value in config.items() if key in names}
    if config.get("rope_parameters") is not None:  # where transformers 5 keeps rope_theta
        rope = {"rope_type": "default"} | config["rope_parameters"]
        if set(rope) - {"rope_theta"} != {"rope_type"} or rope["rope_type"] != "default":
            raise UserError(
                f"{origin}: rope_parameters {rope!r} are not supported, only rope_theta"
            )
        fields |= {key: rope[key] for key in ("rope_theta",) if key in rope}
    if fields.get("layer_types") is not None:
        fields["layer_types"] = tuple(fields["layer_types"])
    return Gemma2(**fields, dtype=jnp.dtype(dtype))


def _without_head(tensors: Tensors) -> Tensors:
    """The tensors of the bare model in a file of one with a head, which is tied to the embedding."""
    head, model = "lm_head.weight", "model."
    if not any(name.startswith(model) for name in tensors.shapes):
        return tensors
    names = {name.removeprefix(model): name for name in tensors.shapes if name != head}
    shapes = {short: tensors.shapes[name] for short, name in names.items()}
    return Tensors(tensors.origin, shapes, lambda name: tensors.read(names[name]))
