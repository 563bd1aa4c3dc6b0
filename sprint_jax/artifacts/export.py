"""Exports of a trained model, written beside their place, compared with the model, and then named."""

import contextlib
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..checkpoints.locate import locate
from ..checkpoints.weights import load_workdir
from ..checkpoints.workdir import is_student, read_workdir_config
from ..core.config import Config
from ..core.errors import UserError
from ..core.files import check_writable, try_lock, write_json_atomic
from ..core.fingerprint import fingerprint
from ..core.storage import AnyPath, in_bucket, local_output
from ..encoders.load import latent_size
from . import pipeline_folder
from .loading import SETTINGS, read_index
from .stablehlo import export_pipeline

LAST = ("model_index.json", "manifest.json")  # what readers begin with


def export_diffusers(
    workdir: str, folder: Path, *, params: str = "ema", dtype: Any, base: str | None
) -> list[str]:
    """Writes a pipeline folder of diffusers and compares it with the workdir.

    Args:
      workdir: of a training; params: 'ema' or 'raw'.
      folder: an existing one, empty.
      base: a pipeline folder or hub id that gives autoencoder, text encoder and tokenizer; None: they are
        left out, as in the digits world.

    Returns:
      Lines for the user.
    """
    c = read_workdir_config(workdir)
    student = is_student(c)
    fields = dict(c.model) | {"guidance_embeds": student}
    pipeline_folder.check_fields(fields, student)
    source, index = _open_base(base, fields)
    tree, meta = load_workdir(workdir, c, params)
    needed = jnp.dtype(dtype).itemsize * sum(leaf.size for leaf in jax.tree.leaves(tree))
    require_space(folder, needed + (pipeline_folder.base_bytes(source) if source else 0))
    how = dict(student=student, sigma_d=c.sigma_d, shift=c.flow.shift)
    parts = dict(base=source, base_index=index)
    pipeline_folder.save_pipeline(folder, fields, tree, dtype, **how, **parts)
    pipeline_folder.check_saved(folder, fields, tree, dtype)
    settings = {
        "midpoint": c.sampler.midpoint,
        "guidance": c.log.sample_guidance,
        "latents": list(latent_size(c)),
    }
    write_json_atomic(folder / SETTINGS, settings)
    origin = origin_of(workdir, params, dtype, meta, tree)
    (folder / "README.md").write_text(model_card(c, origin, source), encoding="utf-8")
    report = [f"the transformer reads back as the {params} parameters of step {meta['step']}"]
    if "control" in tree and fields.get("control_wiring") == "nvlabs":
        report.append(
            "diffusers wires the control branch otherwise than it was trained: its pictures differ from ours"
        )
    if source is None:
        report.append("no --base was given: vae, text_encoder and tokenizer are not in the folder")
    return report


def export_stablehlo(
    pipe: Any, workdir: str, folder: Path, *, params: str = "ema", steps: int | None, **size
) -> list[str]:
    """Writes StableHLO artifacts and compares them with the pipeline.

    Args:
      pipe: the `SprintPipeline` of ``workdir``, which may also be a folder of diffusers.
      folder: an existing one, empty.
      steps: of a teacher; a student's export has 1 to 4.
      size: height and width in pixels, None for those of the training.

    Returns:
      Lines for the user.
    """
    if pipe.is_student and steps is not None:
        raise UserError("--steps is for teachers: a student's export has 1 to 4", exit_code=2)
    counts = (1, 2, 3, 4) if pipe.is_student else (pipe.check_steps(steps),)
    leaves = jax.tree.leaves(pipe.params)
    require_space(folder, sum(leaf.nbytes for leaf in leaves))
    source = origin_of(workdir, params, leaves[0].dtype, pipe.meta, pipe.params)
    errors = export_pipeline(pipe, folder, steps=counts, source=source, **size)
    return [f"{name} differs from the pipeline by {error:.1g}" for name, error in errors.items()]


@contextlib.contextmanager
def new_folder(out: AnyPath) -> Iterator[Path]:
    """A folder beside ``out`` to write into, which becomes ``out`` at the end, or goes after an error.

    It is locked by its process; one whose process was killed is removed by the next export to ``out``. For
    a bucket it is a local one, whose files go there at the end, `LAST` last.

    Raises:
      UserError: ``out`` is there and not an empty folder, or none can be made there.
    """
    if in_bucket(out):
        if any((out / name).is_file() for name in LAST):
            raise UserError(f"--out {out} exists: give a new folder, nothing is overwritten")
        check_writable(out)
        with local_output(out, LAST) as folder:
            yield folder
        return
    target = out.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--out {out} exists: give a new folder, nothing is overwritten")
    partial = target.with_name(f"{target.name}.partial-{socket.gethostname()}-{os.getpid()}")
    made = [folder for folder in partial.parents if not folder.exists()]
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made: {error.strerror}") from error
        with _open(partial) as lock:
            try_lock(lock)
            _remove_abandoned(target, partial)
            yield partial
        _allow_reading(partial)
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path, mine: Path) -> None:
    """Removes what killed exports to ``target`` have left: nobody holds its lock."""
    with _open(mine) as again:
        if try_lock(again):  # this disk has no locks
            return
    for folder in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
        # Another export may remove or finish it meanwhile.
        with contextlib.suppress(OSError), _open(folder) as descriptor:
            if try_lock(descriptor):
                shutil.rmtree(folder)


def _allow_reading(folder: Path) -> None:
    """Gives files the usual permissions; safetensors writes its own for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def require_space(folder: Path, needed: int) -> None:
    """Refuses to start what the disk of ``folder`` has no room for; ``needed`` in bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the disk of {folder.parent} has {free / 1e9:.1f} GB left, the export takes "
            f"{needed / 1e9:.1f} GB"
        )


def origin_of(workdir: str, params: str, dtype: Any, meta: dict, tree: Any) -> dict[str, Any]:
    """Where parameters come from; the hash is the one by which a training knows its teacher."""
    return {
        "workdir": workdir,
        "params": params,
        "step": meta.get("step"),
        "dtype": jnp.dtype(dtype).name,
        "hash": fingerprint(tree),
    }


def _open_base(name: str | None, fields: dict[str, Any]) -> tuple[Path | None, dict | None]:
    """The base's folder and its model_index.json, checked; UserError if it does not fit."""
    if name is None:
        return None, None
    _, base = locate(name, ("pipeline",))
    index = read_index(base)
    pipeline_folder.check_base(base, index, fields)
    return base, index


def model_card(c: Config, source: dict[str, Any], base: Path | None) -> str:
    """README.md of a pipeline folder: how to load it, and where it comes from."""
    student, (height, width) = is_student(c), latent_size(c)
    control = bool(c.model.get("control_blocks"))
    name = "SanaSprintPipeline" if student else "SanaPipeline"
    name = "SanaControlNetPipeline" if control else name
    none = "" if base else ", vae=None, text_encoder=None, tokenizer=None"
    given = "prompt" if base else "prompt_embeds=text, prompt_attention_mask=mask"
    how = [f"guidance_scale={c.log.sample_guidance}", "use_resolution_binning=False"]
    if student:
        how += ["num_inference_steps=2", f"intermediate_timesteps={c.sampler.midpoint}"]
    if base is None:
        how.append('output_type="latent"')
    other = " Other step counts take `intermediate_timesteps=None`." if student else ""
    given += ",\n    control_image=lines" if control else ""
    call = ",\n    ".join([given, "height=height", "width=width", *how])
    return f"""\
---
library_name: diffusers
pipeline_tag: text-to-image
---

```python
from diffusers import {name}

pipe = {name}.from_pretrained("."{none})
out = pipe(
    {call},
)
```

Trained on latents of {height} x {width} (rows x columns): `height`
and `width` are `pipe.vae_scale_factor` times that.{other}

Exported by sprint_jax from the {source["params"]} parameters of step {source["step"]} of
`{source["workdir"]}`, as {source["dtype"]}. Hash of the parameters: `{source["hash"]}`.
"""
