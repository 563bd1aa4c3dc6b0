"""StableHLO artifacts of `jax.export`: sampling and decoding for runtimes without this package.

A folder holds, for cpu, cuda and tpu in one, with a batch of any size b and one latent size (h, w):

* ``denoise_N.stablehlo`` for N steps: of a student (params, text, mask, noise, step_noise, guidance), of a
  teacher (params, text, mask, noise, null_text, null_mask, guidance), to latents; with a control branch
  (..., control, control_scale), condition latents and a scale for each sample;
* ``decode.stablehlo``: latents to pixels in [-1, 1], with the decoder's params first if it has any; with a
  control branch ``encode.stablehlo``, which makes condition latents of pixels, likewise;
* ``params.safetensors``, ``decoder.safetensors``, ``encoder.safetensors``: params, flat dicts whose names
  join ours with dots;
* ``manifest.json``: shapes, dtypes, schedules, versions; ``example.safetensors``: inputs and results;
* ``load.py``: runs all of it. It needs jax, flatbuffers, numpy and safetensors.

The text encoder is not among the functions: text features and their mask are inputs.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from safetensors.numpy import load_file, save_file

from .. import __version__
from ..core.errors import UserError
from ..core.files import write_json_atomic
from ..encoders.autoencoder import Autoencoder
from ..models.control import Control
from ..sampling import student_schedule
from . import load_stablehlo

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = 2  # of the example; the smallest in which samples could be mixed up

# Largest difference from the pipeline's own results over their largest value. The programs are equal but for
# the symbolic batch, which may make XLA add in another order; in bfloat16 that moves single roundings.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


def export_pipeline(
    pipe: Any,
    folder: Path,
    *,
    steps: tuple[int, ...],
    height: int | None = None,
    width: int | None = None,
    source: dict[str, Any],
) -> dict[str, float]:
    """Writes the artifacts of a `SprintPipeline`, and compares what they compute with it.

    Args:
      pipe: it decides the dtype of params and of matmuls.
      folder: an existing one, empty.
      steps: one denoising function for each; 1 to 4 for a student.
      height, width: of the pictures, in pixels; default the pipeline's.
      source: for the manifest: where the parameters come from.

    Returns:
      For each function max|a - b| / max|b| to the pipeline's own result.

    Raises:
      UserError: for a size or step count that cannot be, or results that differ.
    """
    shape = pipe.latent_shape(height, width)
    example = _example_inputs(pipe, shape, max(steps))
    params = {k: v for k, v in pipe.params.items() if k != "logvar_linear"}
    save_file(_host(flatten_dict(params, sep=".")), folder / "params.safetensors")
    functions = {}
    for n in steps:
        denoise = denoiser(pipe, n)
        names = _input_names(pipe, n)
        entry = _write(
            folder, f"denoise_{n}", denoise, params, "params.safetensors", names, example
        )
        if pipe.is_student:
            entry["schedule"] = list(student_schedule(n, pipe.midpoint))
        functions[f"denoise_{n}"] = entry
        example[f"denoise_{n}"] = _pipeline_result(pipe, n, example)
    latents = f"denoise_{steps[0]}"
    halves = {"decode": (decoder(pipe), {"latents": latents})}
    example["decode"] = np.asarray(pipe.decode(example[latents]))
    if "control" in params:
        halves["encode"] = encoder(pipe), {"pixels": "pixels"}
        example["encode"] = np.asarray(pipe.autoencoder.encode(example["pixels"]))
    for name, ((function, weights, file), inputs) in halves.items():
        if file:
            save_file(_host(flatten_dict(weights, sep=".")), folder / file)
        functions[name] = _write(folder, name, function, weights, file, inputs, example)
    for name, entry in functions.items():
        entry["output"] = _described(example[name], name)
    save_file(_host(example), folder / "example.safetensors")
    write_json_atomic(
        folder / "manifest.json",
        {
            "functions": functions,
            "kind": "student" if pipe.is_student else "teacher",
            "text": "features and mask of the training's text encoder, which is not in this folder",
            "guidance": f"CFG scale; the training's own samples have {pipe.guidance}",
            "platforms": list(PLATFORMS),
            "versions": {
                "jax": jax.__version__,
                "flax": flax.__version__,
                "sprint_jax": __version__,
            },
            "source": source,
        },
    )
    shutil.copyfile(load_stablehlo.__file__, folder / "load.py")
    return _check(folder, functions, example, params)


def denoiser(pipe: Any, steps: int) -> Callable:
    """`SprintPipeline.latents` with the arguments of an artifact in order; see the module."""

    def student(params, text, mask, noise, step_noise, guidance, *control):
        how = dict(step_noise=step_noise, control=Control(*control) if control else None)
        return pipe.latents(params, text, mask, noise, guidance, steps=steps, **how)

    def teacher(params, text, mask, noise, null_text, null_mask, guidance, *control):
        how = dict(null=(null_text, null_mask), control=Control(*control) if control else None)
        return pipe.latents(params, text, mask, noise, guidance, steps=steps, **how)

    return student if pipe.is_student else teacher


def decoder(pipe: Any) -> tuple[Callable, Any, str | None]:
    """``((params, latents) -> pixels, params, their file)``; params are None where there are none, and then
    the function takes latents alone."""
    autoencoder = pipe.autoencoder
    if not isinstance(autoencoder, Autoencoder):
        return lambda latents: jnp.clip(autoencoder.decode(latents), -1, 1), None, None

    def decode(params, latents):
        return jnp.clip(autoencoder.config.decode(params, latents), -1, 1)

    return decode, {"decoder": autoencoder.params["decoder"]}, "decoder.safetensors"


def encoder(pipe: Any) -> tuple[Callable, Any, str | None]:
    """As `decoder`, from pixels to latents."""
    autoencoder = pipe.autoencoder
    if not isinstance(autoencoder, Autoencoder):
        return autoencoder.encode, None, None
    weights = {"encoder": autoencoder.params["encoder"]}
    return autoencoder.config.encode, weights, "encoder.safetensors"


def _input_names(pipe: Any, steps: int) -> dict[str, str]:
    """Arguments of a denoising function behind its params, and their names among the examples."""
    names = {name: name for name in ("text", "mask", "noise")}
    if pipe.is_student:
        names["step_noise"] = f"step_noise_{steps}"
    else:
        names |= {"null_text": "null_text", "null_mask": "null_mask"}
    control = ("control", "control_scale") if "control" in pipe.params else ()
    return names | {name: name for name in ("guidance", *control)}


def _example_inputs(pipe: Any, shape: tuple[int, int, int], most: int) -> dict[str, np.ndarray]:
    """Random inputs of one batch by name; the null text is the text encoder's own."""
    null_text, null_mask = map(np.asarray, pipe.text_encoder.encode_plain([""]))
    tokens, width = null_text.shape[1:]
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    mask = np.ones((BATCH, tokens), np.int32)
    mask[1, tokens // 2 :] = 0
    example = {
        "text": normal(BATCH, tokens, width),
        "mask": mask,
        "noise": normal(BATCH, *shape),
        "guidance": pipe.guidance + np.arange(BATCH, dtype=np.float32),
    }
    if "control" in pipe.params:
        factor = pipe.autoencoder.factor
        pixels = np.tanh(normal(BATCH, factor * shape[0], factor * shape[1], 3))
        example |= {"pixels": pixels, "control": np.asarray(pipe.autoencoder.encode(pixels))}
        example["control_scale"] = np.array([1.0, 0.5], np.float32)
    if pipe.is_student:
        later = normal(most - 1, BATCH, *shape)
        return example | {f"step_noise_{n}": later[: n - 1] for n in range(1, most + 1)}
    return example | {"null_text": null_text[0], "null_mask": null_mask[0]}


def _pipeline_result(pipe: Any, steps: int, example: dict[str, np.ndarray]) -> np.ndarray:
    later = example[f"step_noise_{steps}"] if pipe.is_student and steps > 1 else None
    run = dict(steps=steps, guidance=example["guidance"], step_noise=later)
    if "control" in example:
        run |= dict(control=example["control"], control_scale=example["control_scale"])
    return np.asarray(pipe.denoise(example["text"], example["mask"], example["noise"], **run))


def _write(folder, name, function, params, file, inputs, example) -> dict[str, Any]:
    """Exports one function to ``name``.stablehlo; returns its entry of the manifest."""
    (batch,) = export.symbolic_shape("b")

    def struct(leaf, key=None):
        shape = leaf.shape
        if key is not None:
            shape = _symbolic(key, shape, batch)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    def flat(*arguments):
        if params is None:
            return function(*arguments)
        return function(unflatten_dict(arguments[0], sep="."), *arguments[1:])

    arguments = [struct(example[key], key) for key in inputs.values()]
    if params is not None:
        arguments.insert(0, jax.tree.map(struct, flatten_dict(params, sep=".")))
    exported = export.export(jax.jit(flat), platforms=PLATFORMS)(*arguments)
    (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
    return {
        "file": f"{name}.stablehlo",
        "params": file,
        "inputs": [{"name": n} | _described(example[key], key) for n, key in inputs.items()],
    }


def _symbolic(key: str, shape: tuple[int, ...], batch: Any) -> tuple:
    """The shape of an example with ``batch`` in the place of its batch size."""
    if key.startswith("null_"):
        return shape
    if key.startswith("step_noise"):
        return (shape[0], batch, *shape[2:])
    return (batch, *shape[1:])


def _described(array: np.ndarray, key: str) -> dict[str, Any]:
    shape = list(_symbolic(key, array.shape, "b"))
    return {"shape": shape, "dtype": jnp.dtype(array.dtype).name, "example": key}


def _host(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in tensors.items()}


def _check(folder, functions, example, params) -> dict[str, float]:
    """Errors of the functions as they lie in the folder; UserError if one is too large."""
    dtype = jnp.dtype(jax.tree.leaves(params)[0].dtype).name
    errors = {}
    for name, entry in functions.items():
        loaded = export.deserialize(bytearray((folder / entry["file"]).read_bytes()))
        arguments = [load_file(folder / entry["params"])] if entry["params"] else []
        arguments += [example[value["example"]] for value in entry["inputs"]]
        found, expected = np.asarray(loaded.call(*arguments)), example[name]
        errors[name] = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not errors[name] <= TOLERANCE[dtype]:
            raise UserError(
                f"{entry['file']} differs from the pipeline by {errors[name]:.1g} of its largest value, "
                f"where {TOLERANCE[dtype]} is allowed"
            )
    return errors
