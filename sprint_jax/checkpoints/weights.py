"""A transformer from where it lies: a workdir, a folder of diffusers, a hub id, a file of NVlabs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import UserError
from ..interop import diffusers, hub, nvlabs
from ..interop.sana import fields_from_config
from .checkpoint import load_params
from .workdir import read_workdir_config

Tree = Any
TRANSFORMER_FILES = ["transformer/*", "config.json", "*.safetensors", "*.index.json"]


class Weights(NamedTuple):
    """A transformer that was found, its parameters not read yet.

    Attributes:
      path: as the user gave it.
      kind: 'workdir', 'diffusers' or 'nvlabs'.
      fields: of SanaTransformer, without ``logvar``.
      is_teacher: whether its velocity is of stage 'flow': no guidance embedding.
      load: ``load(shardings) -> (params, step)``; shardings as in `checkpoint.load_params`, step None for
        all but workdirs. A logvar head comes with the parameters where there is one.
    """

    path: str
    kind: str
    fields: dict[str, Any]
    is_teacher: bool
    load: Callable[[Any], tuple[Tree, int | None]]


def find_weights(path: str, like: dict[str, Any] | None = None) -> Weights:
    """Says what lies at ``path``, and its architecture.

    Args:
      path: a training's workdir (its EMA is meant), a diffusers folder of a pipeline or of one transformer,
        a hub id of either, or a ``.pth`` file of NVlabs/Sana.
      like: SanaTransformer's fields of about such a network. A ``.pth`` file says its depth, its QK norm
        and whether it embeds guidance; all else, ``timestep_scale`` included, is taken from here.

    Raises:
      UserError: there is nothing of the kind, or it is damaged.
    """
    folder = Path(path)
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        return _workdir(path)
    if folder.is_file() and folder.suffix == ".pth":
        if like is None:
            raise UserError(
                f"{path} does not say its architecture: bring it with sprint_jax.prepare_teacher"
            )
        fields = nvlabs.read_fields(folder, like)

        def load(shardings=None):
            return nvlabs.load_transformer(folder, fields, shardings=shardings)[1], None

        return Weights(path, "nvlabs", fields, not fields["guidance_embeds"], load)
    if hub.is_hub_id(path):
        folder = hub.download(path, TRANSFORMER_FILES)
    elif not folder.exists():
        raise UserError(
            f"{path} does not exist: give a training workdir, a diffusers folder, a hub id or a .pth file"
        )
    return _diffusers(path, folder)


def _workdir(path: str) -> Weights:
    config = read_workdir_config(path)
    try:
        student = config.stage != "flow"
        fields = dict(config.model) | {"guidance_embeds": student}
    except AttributeError as error:
        raise UserError(f"{path}/config.json is not of a training: {error}") from None

    def load(shardings=None):
        params, meta = load_params(path, "ema", shardings=shardings)
        return params, meta["step"]

    return Weights(path, "workdir", fields, not student, load)


def _diffusers(path: str, folder: Path) -> Weights:
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{path} is neither a training workdir (config.json and checkpoints) nor a diffusers folder of a "
            "pipeline (transformer/) or of a transformer (config.json)"
        )
    config = diffusers.read_config(folder, "SanaTransformer2DModel")
    fields = fields_from_config(config, f"{folder}/config.json")

    def load(shardings=None):
        return diffusers.load_transformer(folder, shardings=shardings)[1], None

    return Weights(path, "diffusers", fields, not fields.get("guidance_embeds"), load)
