"""Pipeline folders of diffusers (SanaSprintPipeline, SanaPipeline, SanaControlNetPipeline) around a network.

Autoencoder, text encoder and tokenizer come from another pipeline folder, the base. Without one the
folder says that they are not there, and diffusers wants them as arguments, or ``None``.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..core.files import read_json, write_json_atomic
from ..core.fingerprint import fingerprint
from ..interop.diffusers import (
    load_control,
    load_transformer,
    read_config,
    save_control,
    save_transformer,
)
from ..interop.sana import control_config, sana_table
from ..models.sana import SanaTransformer, from_fields

PARTS = ("vae", "text_encoder", "tokenizer")  # what a base gives

# The only times that diffusers' Sprint pipelines show a network, whatever its config says.
SPRINT_TIMESTEP_SCALE = 0.001


def check_fields(fields: dict[str, Any], student: bool) -> None:
    """Refuses a transformer that diffusers' pipelines would run otherwise than it was trained.

    Args:
      fields: of SanaTransformer.
      student: whether it goes into a SanaSprintPipeline.

    Raises:
      UserError: a student's times are not those of Sprint, or it is a flow map; a control branch is a
        student's, has QK norm, or sees other times than there.
    """
    sana_table(fields)  # refuses what has no names there
    model = from_fields(fields)
    scale = model.timestep_scale
    if model.control_blocks:
        control_config(fields)
        if student or scale != 1:
            problem = (
                "a student"
                if student
                else f"a network whose model.timestep_scale is {scale}, not 1"
            )
            raise UserError(
                f"diffusers has no pipeline for the control branch of {problem}: "
                "export it with --format stablehlo"
            )
    if student and scale != SPRINT_TIMESTEP_SCALE:
        raise UserError(
            f"model.timestep_scale is {scale}: diffusers' Sprint pipelines show a student times in "
            f"[0, 1], which is {SPRINT_TIMESTEP_SCALE}, so this student would draw something else there; "
            "export it with --format stablehlo"
        )


def check_base(base: Path, index: dict[str, Any], fields: dict[str, Any]) -> None:
    """Refuses a base whose parts are not there, or do not fit the transformer.

    Args:
      base: a pipeline folder of diffusers.
      index: its ``model_index.json``.
      fields: of SanaTransformer.

    Raises:
      UserError: a part or its weights are missing, the autoencoder is no AutoencoderDC or has other latent
        channels, or the text encoder has another width.
    """
    model = from_fields(fields)
    for part in PARTS:
        if not (base / part).is_dir() or None in index.get(part, [None]):
            raise UserError(f"--base {base} has no {part}: give a whole pipeline folder")
        weights = [*(base / part).glob("*.safetensors"), *(base / part).glob("*.bin")]
        if part != "tokenizer" and not weights:
            raise UserError(f"--base {base}: {part} has no weights")
    channels = read_config(base / "vae", "AutoencoderDC").get("latent_channels")
    width = read_json(base / "text_encoder" / "config.json").get("hidden_size")
    check_widths(base, model, channels, width)


def check_widths(folder: Path, model: Any, channels: int, features: int) -> None:
    """Refuses an autoencoder or a text encoder whose width the transformer does not take."""
    if channels != model.in_channels:
        raise UserError(
            f"{folder}: the autoencoder has {channels} latent channels, the transformer {model.in_channels}"
        )
    if features != model.caption_channels:
        raise UserError(
            f"{folder}: the text encoder has {features} features, the transformer takes "
            f"{model.caption_channels}"
        )


def base_bytes(base: Path) -> int:
    """What the parts of a base take on disk."""
    files = (path for part in PARTS for path in (base / part).rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def save_pipeline(
    folder: Path,
    fields: dict[str, Any],
    params: Any,
    dtype: Any,
    *,
    student: bool,
    sigma_d: float,
    shift: float,
    base: Path | None = None,
    base_index: dict[str, Any] | None = None,
) -> None:
    """Writes a folder for ``SanaSprintPipeline.from_pretrained`` or, of a teacher, ``SanaPipeline``'s.

    A teacher with a control branch becomes a ``SanaControlNetPipeline``, see `interop.diffusers.save_control`.

    Args:
      folder: an existing one, empty.
      fields, params: of SanaTransformer; dtype: of the weights written.
      sigma_d: standard deviation of TrigFlow's data, for a student's scheduler.
      shift: resolution shift of flow times, for a teacher's.
      base, base_index: see `check_base`.
    """
    save_transformer(folder / "transformer", fields, params, dtype)
    scheduler = scheduler_config(student, sigma_d, shift)
    name = "SanaSprintPipeline" if student else "SanaPipeline"
    controlnet = {}
    if from_fields(fields).control_blocks:
        save_control(folder / "controlnet", fields, params, dtype)
        name, controlnet = (
            "SanaControlNetPipeline",
            {"controlnet": ["diffusers", "SanaControlNetModel"]},
        )
    (folder / "scheduler").mkdir()
    write_json_atomic(folder / "scheduler" / "scheduler_config.json", scheduler)
    for part in PARTS if base else ():
        # Folders of the hub's cache hold links; what they lead to is copied.
        shutil.copytree(base / part, folder / part)
    index = {
        "_class_name": name,
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        **controlnet,
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    index |= {part: base_index[part] if base else [None, None] for part in PARTS}
    write_json_atomic(folder / "model_index.json", index)


def scheduler_config(student: bool, sigma_d: float, shift: float) -> dict[str, Any]:
    """The config of diffusers' SCMScheduler or, for a teacher, of its DPM-Solver++ on flow sigmas."""
    if student:
        return {
            "_class_name": "SCMScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "trigflow",
            "sigma_data": sigma_d,
        }
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "flow_shift": shift,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "midpoint",
        "use_flow_sigmas": True,
    }


def check_saved(folder: Path, fields: dict[str, Any], params: Any, dtype: Any) -> None:
    """Loads the transformer of a written pipeline, and its control branch, and compares them with ours.

    Every bit of the parameters, and the network's outputs on fixed random inputs, must be those of
    ``params`` rounded to ``dtype``.

    Raises:
      UserError: they are not, or outputs are not finite.
    """
    pipeline, folder = folder, folder / "transformer"
    loaded_fields, loaded = load_transformer(folder, dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    fields = dict(fields) | {"control_blocks": 0}
    if "control" in params:
        branch = params["control"]
        params = {name: params[name] for name in params if name != "control"}
        _, found = load_control(pipeline / "controlnet", fields, dtype)
        if fingerprint({name: found[name] for name in branch}) != fingerprint(branch):
            raise UserError(f"{pipeline}/controlnet does not read back as it was written")
    if fingerprint(loaded) != fingerprint(params):
        raise UserError(f"{folder} does not read back as it was written; is the disk sound?")
    # Memory and compilation choices, which diffusers' config does not hold: they move roundings.
    loaded_fields |= {key: fields[key] for key in ("scan", "remat") if key in fields}
    expected = _outputs(from_fields(fields, dtype="float32", logvar=False), params)
    found = _outputs(from_fields(loaded_fields, dtype="float32", logvar=False), loaded)
    if not np.isfinite(expected).all():
        raise UserError("the network's outputs are not finite: the checkpoint is of a failed run")
    if not np.array_equal(found, expected):
        raise UserError(
            f"{folder} holds another network than the workdir: its config is not the same"
        )


def _outputs(model: SanaTransformer, params: Any) -> np.ndarray:
    random = np.random.default_rng(0)
    size = (2, 2 * model.patch_size, 3 * model.patch_size, model.in_channels)
    x = jnp.asarray(random.standard_normal(size), jnp.float32)
    text = jnp.asarray(random.standard_normal((2, 5, model.caption_channels)), jnp.float32)
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], jnp.int32)
    guidance = jnp.asarray([0.45, 0.3]) if model.guidance_embeds else None
    inputs = (x, jnp.asarray([0.3, 1.0]), text, mask, guidance)
    return np.asarray(jax.jit(model.apply)({"params": params}, *inputs))
