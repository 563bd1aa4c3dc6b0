"""A transformer, or a control branch, from where it lies: a workdir, diffusers, a hub id, a file of NVlabs."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core.config import Config
from ..core.errors import UserError
from ..core.fingerprint import fingerprint
from ..core.storage import as_path
from ..interop import diffusers, nvlabs
from ..interop.sana import control_fields, fields_from_config
from ..models.sana import from_fields
from .checkpoint import load_params
from .locate import locate
from .workdir import is_student, read_workdir_config

Tree = Any
# Fields in which a transformer may differ from the one that a control branch was trained with.
FREE = {
    "num_layers",
    "sample_size",
    "guidance_embeds",
    "flow_map",
    "logvar",
    "dtype",
    "remat",
    "scan",
}
FREE |= {"control_blocks", "control_wiring"}
CONTROL_FILES = ("controlnet/*", "config.json", "*.safetensors", "*.index.json")
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
        params, meta = load_workdir(path, config, "ema", shardings)
        return params, meta["step"]

    return Weights(path, "workdir", fields, not student, load)


def load_workdir(
    path: str | Path,
    config: Config,
    which: str,
    shardings: Any = None,
    allow_nonfinite: bool = False,
) -> tuple[Tree, dict[str, Any]]:
    """`checkpoint.load_params`, with the frozen trunk of a training that learnt a control branch alone.

    Args:
      config: of the workdir; the rest as of `load_params`.

    Raises:
      UserError: as `load_params`; or the trunk is missing, or another one than the branch was trained with.
    """
    how = dict(shardings=shardings, allow_nonfinite=allow_nonfinite)
    params, meta = load_params(str(path), which, **how)
    if not getattr(config, "trunk", ""):
        return params, meta
    place = config.trunk
    if "trunk" not in meta:
        raise UserError(
            f"{path}/config.json: trunk={place}, but the checkpoint is of a training without a frozen trunk"
        )
    if not as_path(place).exists() and as_path(meta["trunk"]["path"]).exists():
        place = meta["trunk"]["path"]  # from the root, wherever this process runs
    trunk, _ = load_trunk(place, shardings)
    if fingerprint(trunk) != meta["trunk"]["hash"]:
        raise UserError(
            f"{path} holds the control branch of another network than the one in {place}, which was at "
            f"step {meta['trunk']['step']} then"
        )
    return trunk | params, meta


def load_trunk(path: str, shardings: Any = None) -> tuple[Tree, int | None]:
    """The parameters of a network without its control branch and its logvar head, and its step if any."""
    params, step = find_weights(path).load(shardings)
    return {name: params[name] for name in params if name not in ("control", "logvar_linear")}, step


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


class Branch(NamedTuple):
    """A control branch that was found, its parameters not read yet.

    Attributes:
      fields: of the SanaTransformer that it was looked for, with those of the branch.
      load: ``load(dtype, shardings, allow_nonfinite) -> params``, as of `files.load_params`; they go under
        ``control`` of the transformer's.
    """

    fields: dict[str, Any]
    load: Callable[..., Tree]


def find_branch(path: str | Path, fields: dict[str, Any], params: str = "ema") -> Branch:
    """Finds the control branch at ``path`` for a transformer; reads no parameters.

    Args:
      path: the workdir of a training with a control branch, a diffusers folder (SanaControlNetModel, or a
        pipeline that has one), a hub id of either, or a ``.pth`` file of NVlabs/Sana.
      fields: of the SanaTransformer.
      params: of a workdir, 'ema' or 'raw'.

    Raises:
      UserError: there is none, it is of another transformer, or it is damaged.
    """
    kind, place = locate(path, ("workdir", "pipeline", "transformer", "nvlabs"), CONTROL_FILES)
    if kind == "workdir":
        return _workdir_branch(path, fields, params)
    if kind == "nvlabs":
        found = dict(fields) | nvlabs.read_control_fields(place)
        return Branch(found, functools.partial(nvlabs.load_control, place, found))
    folder = place / "controlnet" if kind == "pipeline" else place
    config = diffusers.read_config(folder, "SanaControlNetModel")
    found = control_fields(config, fields, f"{folder}/config.json")

    def load(dtype=jnp.float32, shardings=None, allow_nonfinite=False):
        how = dict(shardings=shardings, allow_nonfinite=allow_nonfinite)
        return diffusers.load_control(folder, fields, dtype, **how)[1]

    return Branch(found, load)


def _workdir_branch(path: str | Path, fields: dict[str, Any], params: str) -> Branch:
    model = dict(read_workdir_config(path).model)
    if not model.get("control_blocks"):
        raise UserError(f"{path} has no control branch: its config.model.control_blocks is 0")
    theirs, mine = from_fields(model), from_fields(fields)
    for name in sorted(model.keys() - FREE):
        if getattr(theirs, name) != getattr(mine, name):
            raise UserError(
                f"the control branch in {path} is of a network with {name} {getattr(theirs, name)}, not "
                f"{getattr(mine, name)}"
            )
    names = ("control_blocks", "control_wiring")
    found = dict(fields) | {name: getattr(theirs, name) for name in names}
    from_fields(found)

    def load(dtype=jnp.float32, shardings=None, allow_nonfinite=False):
        tree, _ = load_params(path, params, shardings, allow_nonfinite)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree["control"])

    return Branch(found, load)
