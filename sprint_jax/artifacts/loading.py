"""The parts of a SprintPipeline from where they lie: a training's workdir, or a folder of diffusers."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..checkpoints.checkpoint import load_params
from ..checkpoints.workdir import read_workdir_config
from ..core.config import Config
from ..core.errors import UserError
from ..data.feed import latent_size
from ..encoders.load import load_encoders, open_autoencoder, open_text_encoder
from ..encoders.text import load_tokenizer
from ..interop import hub
from ..interop.diffusers import load_transformer
from ..models.sana import from_fields
from ..parallel.sharding import state_shardings

# What a pipeline folder of diffusers has no place for; beside its model_index.json, from `export`.
SETTINGS = "sprint_jax.json"

# Pipeline classes of diffusers whose parts are those of ours, and the stage of their transformer.
STAGES = {
    "SanaSprintPipeline": "distill",
    "SanaSprintImg2ImgPipeline": "distill",
    "SanaPipeline": "flow",
}


def load_parts(
    path: str | Path, dtype: Any, params: str, mesh: jax.sharding.Mesh | None
) -> dict[str, Any]:
    """Arguments of `pipeline.SprintPipeline`; see its ``from_pretrained``."""
    folder = Path(path)
    shardings = functools.partial(state_shardings, mesh) if mesh is not None else None
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        return _from_workdir(folder, dtype, params, shardings)
    if (folder / "model_index.json").is_file():
        return from_folder(folder, dtype, shardings)
    if hub.is_hub_id(path):
        return from_folder(hub.download(str(path)), dtype, shardings)
    if not folder.exists():
        raise UserError(
            f"{path} does not exist: give a training workdir, a diffusers folder or a hub id"
        )
    raise UserError(
        f"{path} is neither a training workdir (config.json and checkpoints) nor a pipeline folder "
        "of diffusers (model_index.json)"
    )


def _from_workdir(folder: Path, dtype, params: str, shardings) -> dict[str, Any]:
    config = read_workdir_config(folder)
    try:
        model, parts = _read_training(config, folder, dtype)
    except AttributeError as error:
        raise UserError(f"{folder / 'config.json'} is not of a training: {error}") from None
    tree, meta = load_params(str(folder), params, shardings=shardings)
    tree = jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    return parts | dict(model=model.clone(dtype=jnp.dtype(dtype)), params=tree, meta=meta)


def _read_training(c: Config, folder: Path, dtype) -> tuple[Any, dict[str, Any]]:
    if c.data.source != "digits" and not c.data.encoders:
        raise UserError(
            f"{folder} was trained on {c.data.source} without an autoencoder: run its training line again with "
            "--config.data.encoders=PIPELINE, or export it with --base PIPELINE and use that"
        )
    encoders = load_encoders("" if c.data.source == "digits" else c.data.encoders, dtype)
    autoencoder, text_encoder = encoders.autoencoder, encoders.text_encoder
    height, width = (autoencoder.factor * side for side in latent_size(c))
    # The published student is its teacher plus an embedding of guidance.
    changes = {"guidance_embeds": True} if c.stage == "distill" else {}
    return from_fields(c.model, **changes), dict(
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        stage=c.stage,
        sigma_d=c.sigma_d,
        shift=c.flow.shift,
        midpoint=c.sampler.midpoint,
        guidance=c.log.sample_guidance,
        size=(height, width),
    )


def from_folder(folder: Path, dtype: Any, shardings: Any = None) -> dict[str, Any]:
    """The same from a pipeline folder of diffusers, with ``transformer``, ``vae``, ``text_encoder``,
    ``tokenizer`` and ``scheduler``, and with the settings of an `export` if it is one.

    Raises:
      UserError: something is missing, damaged, of another class, or does not fit the rest.
    """
    index = read_index(folder)
    stage = STAGES[index["_class_name"]]
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    # The small parts first: a mistake in them should not wait for gigabytes.
    tokenizer = load_tokenizer(folder / "tokenizer")
    autoencoder = open_autoencoder(folder, dtype, shardings)
    fields, tree = load_transformer(folder / "transformer", dtype, shardings=shardings)
    model = from_fields(fields, dtype=jnp.dtype(dtype).name)
    if model.guidance_embeds != (stage == "distill"):
        raise UserError(
            f"{folder}: a transformer {'with' if model.guidance_embeds else 'without'} guidance embedding "
            f"in a {index['_class_name']}"
        )
    if autoencoder.channels != model.in_channels:
        raise UserError(
            f"{folder}: the autoencoder has {autoencoder.channels} latent channels, the "
            f"transformer {model.in_channels}"
        )
    text_encoder = open_text_encoder(folder, tokenizer, dtype, shardings)
    features = text_encoder.gemma.hidden_size
    if features != model.caption_channels:
        raise UserError(
            f"{folder}: the text encoder has {features} features, the transformer takes "
            f"{model.caption_channels}"
        )
    settings = {"midpoint": 1.3, "guidance": 4.5, "latents": [model.sample_size] * 2}
    if (folder / SETTINGS).is_file():
        settings |= _read_json(folder / SETTINGS)
    height, width = (autoencoder.factor * side for side in settings["latents"])
    return dict(
        model=model,
        params=tree,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        stage=stage,
        sigma_d=scheduler.get("sigma_data", 0.5),
        shift=scheduler.get("flow_shift", scheduler.get("shift", 3.0)),
        midpoint=settings["midpoint"],
        guidance=settings["guidance"],
        size=(height, width),
        integer_times=True,
        meta={"path": str(folder)},
    )


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder whose class is one of `STAGES`.

    Raises:
      UserError: it is missing, damaged or of another class.
    """
    index = _read_json(folder / "model_index.json")
    found = index.get("_class_name")
    if found not in STAGES:
        raise UserError(
            f"{folder}/model_index.json is of class {found!r}, not one of {', '.join(STAGES)}"
        )
    return index


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a dict")
    return value
