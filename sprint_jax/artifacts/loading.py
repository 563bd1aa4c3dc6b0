"""The parts of a pipeline from where they lie: a training's workdir, or a folder of diffusers."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..checkpoints.locate import locate
from ..checkpoints.workdir import is_student, read_workdir_config
from ..core.errors import UserError
from ..core.files import read_json
from ..core.fingerprint import describe
from ..core.ranges import GUIDANCE, MIDPOINT, MODEL, POSITIVE, SIZE
from ..core.schema import TEXT, check, one_of, optional, several
from ..encoders.load import latent_size, load_encoders, open_autoencoder, open_text_encoder
from ..encoders.text import load_tokenizer
from ..interop.diffusers import load_control, load_transformer
from ..interop.sana import example_inputs
from ..models.sana import SanaTransformer, from_fields
from ..parallel.sharding import state_shardings
from .pipeline_folder import PARTS, check_widths

# Settings for which diffusers has no place; beside model_index.json, from `export`.
SETTINGS = "sprint_jax.json"

# Pipeline classes of diffusers whose parts are those of ours, and whether their transformer is a student.
CLASSES = {
    "SanaSprintPipeline": True,
    "SanaSprintImg2ImgPipeline": True,
    "SanaPipeline": False,
    "SanaControlNetPipeline": False,
}

# Values in files of a pipeline folder; other keys are not read.
INDEX = {"_class_name": one_of(*CLASSES)}
INDEX |= dict.fromkeys(
    ("transformer", "controlnet", *PARTS, "scheduler"), several(optional(TEXT), 2, 2)
)
SCHEDULER = dict.fromkeys(("sigma_data", "flow_shift", "shift"), POSITIVE)
SETTING = {"midpoint": MIDPOINT, "guidance": GUIDANCE, "latents": several(SIZE, 2, 2)}


def load_parts(
    path: str | Path,
    dtype: Any,
    params: str,
    mesh: jax.sharding.Mesh | None,
    allow_nonfinite: bool = False,
    control: str | Path | None = None,
    low_memory: bool = False,
    autoencoder: str | Path | None = None,
    int8: bool = False,
    arranged: bool = False,
) -> dict[str, Any]:
    """Arguments of `pipeline.SprintPipeline`; see its ``from_pretrained``.

    What is to be ``arranged`` stays in the host's memory, from where it is arranged block by block.
    """
    shardings = functools.partial(state_shardings, mesh) if mesh is not None else None
    kind, folder = locate(path, ("workdir", "pipeline"))
    if kind == "workdir":
        if low_memory:
            raise UserError(f"--low_memory is for pipelines of diffusers: {path} is a workdir", 2)
        how = dict(autoencoder=autoencoder, int8=int8)
        parts = _from_workdir(folder, dtype, params, shardings, allow_nonfinite, **how)
    else:
        how = allow_nonfinite, low_memory, autoencoder, int8, arranged
        parts = _from_folder(folder, dtype, shardings, *how)
    if control is None:
        return parts
    if "control" in parts["params"]:
        raise UserError(f"{path} has a control branch of its own: give no other beside it", 2)
    # Imported here, so that other models load without Orbax.
    from ..checkpoints.weights import find_branch

    fields = {key: getattr(parts["model"], key) for key in MODEL} | {"dtype": "float32"}
    branch = find_branch(control, fields, params)
    parts["model"] = _with_branch(parts["model"], branch.fields)
    parts["params"] |= {"control": branch.load(dtype, shardings, allow_nonfinite)}
    return parts


def _with_branch(model: SanaTransformer, fields: dict[str, Any]) -> SanaTransformer:
    names = ("control_blocks", "control_wiring")
    return model.clone(**{name: fields[name] for name in names})


def _from_workdir(
    folder: Path, dtype, params: str, shardings, allow_nonfinite: bool, **how
) -> dict[str, Any]:
    c = read_workdir_config(folder)
    if c.data.source != "digits" and not c.data.encoders:
        raise UserError(
            f"{folder} was trained on {c.data.source} without an autoencoder: run its training line again with "
            "--config.data.encoders=PIPELINE, or export it with --base PIPELINE and use that"
        )
    how |= dict(style=c.data.get("prompt_style", "diffusers"))
    encoders = load_encoders("" if c.data.source == "digits" else c.data.encoders, dtype, **how)
    factor = encoders.autoencoder.factor
    # The published student is its teacher plus an embedding of guidance.
    changes = {"guidance_embeds": True} if is_student(c) else {}
    model = from_fields(c.model, **changes)
    # Imported here, so that other models load without Orbax.
    from ..checkpoints.weights import load_workdir

    tree, meta = load_workdir(folder, c, params, shardings, allow_nonfinite)
    _check_shapes(folder, model, tree)
    return dict(
        model=model.clone(dtype=jnp.dtype(dtype)),
        params=jax.tree.map(lambda leaf: leaf.astype(dtype), tree),
        autoencoder=encoders.autoencoder,
        text_encoder=encoders.text_encoder,
        is_student=is_student(c),
        sigma_d=float(c.sigma_d),
        shift=float(c.flow.shift),
        midpoint=c.sampler.midpoint,
        guidance=c.log.sample_guidance,
        size=tuple(factor * side for side in latent_size(c)),
        meta=meta,
    )


def _check_shapes(folder: Path, model: SanaTransformer, params: Any) -> None:
    """Refuses parameters of a workdir that are not those of the network in its config."""
    inputs = functools.partial(example_inputs, model)
    key = jax.random.key(0)
    wanted = describe(jax.eval_shape(lambda key: model.init(key, *inputs()), key)["params"])
    found = describe({key: params[key] for key in params if key != "logvar_linear"})
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [table.get(name, {}).get("shape", "absent") for table in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{folder}/config.json: the network's {name} is {shapes[0]}, but {shapes[1]} in the checkpoint"
            )


def _from_folder(
    folder: Path,
    dtype: Any,
    shardings: Any,
    allow_nonfinite: bool,
    low_memory: bool,
    autoencoder: str | Path | None,
    int8: bool,
    arranged: bool,
) -> dict[str, Any]:
    """From ``transformer``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler`` of diffusers.

    Raises:
      UserError: something is missing, damaged, of another class, or does not fit the rest.
    """
    index = read_index(folder)
    student = CLASSES[index["_class_name"]]
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    check(scheduler, SCHEDULER, f"{folder}/scheduler/scheduler_config.json: ")
    # The small parts first: a mistake in them should not wait for gigabytes.
    tokenizer = load_tokenizer(folder / "tokenizer")
    autoencoder = open_autoencoder(folder / "vae", dtype, shardings, autoencoder)
    how = dict(shardings=shardings, allow_nonfinite=allow_nonfinite, on_host=arranged)
    fields, tree = load_transformer(folder / "transformer", dtype, **how)
    model = from_fields(fields, dtype=jnp.dtype(dtype).name)
    if model.guidance_embeds != student:
        raise UserError(
            f"{folder}: guidance_embeds is {model.guidance_embeds} in transformer/config.json, which does "
            "not fit the class in model_index.json"
        )
    if index["_class_name"] == "SanaControlNetPipeline":
        fields, branch = load_control(folder / "controlnet", fields, dtype, **how)
        model, tree = _with_branch(model, fields), tree | {"control": branch}
    where = dict(on_host=low_memory, int8=int8)
    text_encoder = open_text_encoder(folder, tokenizer, dtype, shardings, **where)
    check_widths(folder, model, autoencoder.channels, text_encoder.gemma.hidden_size)
    settings = {"midpoint": 1.3, "guidance": 4.5, "latents": [model.sample_size] * 2}
    if (folder / SETTINGS).is_file():
        found = read_json(folder / SETTINGS)
        check(found, SETTING, f"{folder / SETTINGS}: ")
        settings |= found
    return dict(
        model=model,
        params=tree,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        is_student=student,
        sigma_d=float(scheduler.get("sigma_data", 0.5)),
        shift=float(scheduler.get("flow_shift", scheduler.get("shift", 3.0))),
        midpoint=settings["midpoint"],
        guidance=settings["guidance"],
        size=tuple(autoencoder.factor * side for side in settings["latents"]),
        integer_times=True,
        meta={"path": str(folder)},
    )


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder whose class is one of `CLASSES`.

    Raises:
      UserError: it is missing, damaged or of another class.
    """
    index = read_json(folder / "model_index.json")
    check({"_class_name": None} | index, INDEX, f"{folder}/model_index.json: ")
    return index
