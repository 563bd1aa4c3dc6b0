"""A transformer from where it lies: a workdir, a folder of diffusers, a hub id, a file of NVlabs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import UserError
from ..interop import diffusers, nvlabs
from ..interop.sana import fields_from_config
from .checkpoint import load_params
from .locate import locate
from .workdir import is_student, read_workdir_config

Tree = Any
TRANSFORMER_FILES = ("transformer/*", "config.json", "*.safetensors", "*.index.json")


class Weights(NamedTuple):
    """A transformer that was found, its parameters not read yet.

    Attributes:
      path: as the user gave it.
      kind: 'workdir', 'diffusers' or 'nvlabs'.
      fields: of SanaTransformer, without ``logvar``.
      is_teacher: whether it embeds no guidance.
      load: ``load(shardings) -> (params, step)``; shardings as in `checkpoint.load_params`, step None for
        all but workdirs. A logvar head comes with the parameters where there is one.
    """

    path: str
    kind: str
    fields: dict[str, Any]
    is_teacher: bool
    load: Callable[[Any], tuple[Tree, int | None]]


def find_weights(path: str, like: dict[str, Any] | None = None) -> Weights:
    """Finds the transformer at ``path`` and its architecture; reads no parameters.

    Args:
      path: a training's workdir (its EMA is meant), a diffusers folder of a pipeline or of one transformer,
        a hub id of either, or a ``.pth`` file of NVlabs/Sana.
      like: SanaTransformer's fields of about such a network. A ``.pth`` file says its depth, its QK norm
        and whether it embeds guidance; all else, ``timestep_scale`` included, is taken from here.

    Raises:
      UserError: there is nothing of the kind, or it is damaged.
    """
    kinds = ("workdir", "pipeline", "transformer", "nvlabs")
    kind, place = locate(path, kinds, TRANSFORMER_FILES)
    if kind == "workdir":
        return _workdir(path)
    if kind == "nvlabs":
        return _nvlabs(path, place, like)
    return _diffusers(path, place / "transformer" if kind == "pipeline" else place)


def _workdir(path: str) -> Weights:
    config = read_workdir_config(path)
    student = is_student(config)
    fields = dict(config.model) | {"guidance_embeds": student}

    def load(shardings=None):
        params, meta = load_params(path, "ema", shardings=shardings)
        return params, meta["step"]

    return Weights(path, "workdir", fields, not student, load)


def _nvlabs(path: str, file: Path, like: dict[str, Any] | None) -> Weights:
    if like is None:
        raise UserError(
            f"{path} does not say its architecture: bring it with sprint_jax.prepare_teacher"
        )
    fields = nvlabs.read_fields(file, like)

    def load(shardings=None):
        return nvlabs.load_transformer(file, fields, shardings=shardings)[1], None

    return Weights(path, "nvlabs", fields, not fields["guidance_embeds"], load)


def _diffusers(path: str, folder: Path) -> Weights:
    config = diffusers.read_config(folder, "SanaTransformer2DModel")
    fields = fields_from_config(config, f"{folder}/config.json")

    def load(shardings=None):
        return diffusers.load_transformer(folder, shardings=shardings)[1], None

    return Weights(path, "diffusers", fields, not fields.get("guidance_embeds"), load)
