"""Writes what inference needs, for diffusers or for runtimes that load StableHLO.

    python -m sprint_jax.export --workdir runs/student --out DIR --format diffusers --base PIPELINE
    python -m sprint_jax.export --workdir runs/student --out DIR --format stablehlo

diffusers: the transformer and its scheduler, with the autoencoder, text encoder and tokenizer of --base, a
pipeline folder of diffusers or the id of one on the hub. Without --base those three are left out, as in the
digits world, whose stand-ins diffusers does not have.

stablehlo: functions from text features and noise to latents, and from latents to pixels, with the parameters
and a loader; --workdir may also be a pipeline folder of diffusers. See load.py in the folder.

What was written is loaded and compared before it gets its name; after an error nothing is left.
"""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .artifacts import pipeline_folder
from .artifacts.loading import SETTINGS, read_index
from .artifacts.stablehlo import export_pipeline
from .checkpoints.checkpoint import load_params
from .checkpoints.workdir import read_workdir_config
from .core import cli
from .core.config import Config
from .core.errors import UserError
from .core.files import write_json_atomic
from .core.fingerprint import fingerprint
from .data.feed import latent_size
from .interop import hub
from .pipeline import SprintPipeline


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be exported."""
    flags = _parser().parse_args(argv)
    misplaced = {"diffusers": ("size", "steps"), "stablehlo": ("base",)}[flags.format]
    for flag in misplaced:
        if getattr(flags, flag) is not None:
            other = "stablehlo" if flags.format == "diffusers" else "diffusers"
            raise UserError(f"--{flag} is for --format {other}", exit_code=2)
    height, width = cli.parse_size(flags.size)
    with new_folder(Path(flags.out)) as folder:
        if flags.format == "diffusers":
            report = export_diffusers(flags, folder)
        else:
            report = export_stablehlo(flags, folder, height, width)
    print("\n".join([f"wrote {flags.out}", *report]))


def _parser() -> cli.Parser:
    parser = cli.make_parser("export", __doc__)
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="workdir of a training")
    add("--out", required=True, metavar="DIR", help="a new folder, or an empty one")
    add("--format", required=True, choices=("diffusers", "stablehlo"))
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    add("--params", choices=("ema", "raw"), default="ema", help="which weights (default ema)")
    add("--base", metavar="FOLDER", help="diffusers: the pipeline that gives the other parts")
    add("--size", metavar="HxW", help="stablehlo: in pixels (default: as in training)")
    add("--steps", type=int, metavar="N", help="stablehlo: of a teacher (20); students: 1 to 4")
    return parser


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into, which becomes ``out`` at the end, or goes after an error.

    Raises:
      UserError: ``out`` is there and not an empty folder, or none can be made there.
    """
    target = out.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--out {out} exists: give a new folder, nothing is overwritten")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    made = [folder for folder in partial.parents if not folder.exists()]
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made: {error.strerror}") from error
        yield partial
        _allow_reading(partial)
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


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


def export_diffusers(flags: argparse.Namespace, folder: Path) -> list[str]:
    """Writes a pipeline folder of diffusers and compares it with the workdir; lines for the user."""
    c, fields, student = read_training(Path(flags.workdir))
    pipeline_folder.check_fields(fields, student)
    base, index = _open_base(flags.base, fields)
    params, meta = load_params(flags.workdir, flags.params)
    dtype = jnp.dtype(flags.dtype)
    needed = dtype.itemsize * sum(leaf.size for leaf in jax.tree.leaves(params))
    require_space(folder, needed + (pipeline_folder.base_bytes(base) if base else 0))
    pipeline_folder.save_pipeline(
        folder,
        fields,
        params,
        dtype,
        student=student,
        sigma_d=c.sigma_d,
        shift=c.flow.shift,
        base=base,
        base_index=index,
    )
    pipeline_folder.check_saved(folder / "transformer", fields, params, dtype)
    write_json_atomic(folder / SETTINGS, _settings(c))
    source = _source(flags, meta, params)
    (folder / "README.md").write_text(model_card(c, student, source, base), encoding="utf-8")
    report = [f"the transformer reads back as the {flags.params} parameters of step {meta['step']}"]
    if base is None:
        report.append("no --base was given: vae, text_encoder and tokenizer are not in the folder")
    return report


def read_training(workdir: Path) -> tuple[Config, dict[str, Any], bool]:
    """Config, SanaTransformer's fields and whether it is a student, of a training's workdir.

    Raises:
      UserError: it is not one.
    """
    c = read_workdir_config(workdir)
    try:
        student = {"flow": False, "distill": True}[c.stage]
        fields = dict(c.model) | {"guidance_embeds": student}
        for section, key in (("data", "world"), ("sampler", "midpoint"), ("flow", "shift")):
            c[section][key]
    except (AttributeError, KeyError) as error:
        raise UserError(f"{workdir / 'config.json'} is not of a training: {error}") from None
    return c, fields, student


def _open_base(name: str | None, fields: dict[str, Any]) -> tuple[Path | None, dict | None]:
    """The base's folder and its model_index.json, checked; UserError if it does not fit."""
    if name is None:
        return None, None
    base = hub.download(name) if hub.is_hub_id(name) else Path(name)
    if not base.is_dir():
        raise UserError(f"--base {name} does not exist: give a pipeline folder of diffusers")
    index = read_index(base)
    pipeline_folder.check_base(base, index, fields)
    return base, index


def _source(flags: argparse.Namespace, meta: dict[str, Any], params: Any) -> dict[str, Any]:
    """Where the parameters come from; the hash is the one by which a training knows its teacher."""
    return {
        "workdir": flags.workdir,
        "params": flags.params,
        "step": meta.get("step"),
        "dtype": flags.dtype,
        "hash": fingerprint(params),
    }


def _settings(c: Config) -> dict[str, Any]:
    """How the training itself samples, for `loading.from_folder`."""
    size = list(latent_size(c))
    return {"midpoint": c.sampler.midpoint, "guidance": c.log.sample_guidance, "latents": size}


def model_card(c: Config, student: bool, source: dict[str, Any], base: Path | None) -> str:
    """README.md of a pipeline folder: how to load it, and where it comes from."""
    height, width = latent_size(c)
    name = "SanaSprintPipeline" if student else "SanaPipeline"
    none = "" if base else ", vae=None, text_encoder=None, tokenizer=None"
    given = "prompt" if base else "prompt_embeds=text, prompt_attention_mask=mask"
    how = [f"guidance_scale={c.log.sample_guidance}", "use_resolution_binning=False"]
    if student:
        how += ["num_inference_steps=2", f"intermediate_timesteps={c.sampler.midpoint}"]
    if base is None:
        how.append('output_type="latent"')
    other = " Other step counts take `intermediate_timesteps=None`." if student else ""
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


def export_stablehlo(
    flags: argparse.Namespace, folder: Path, height: int | None, width: int | None
) -> list[str]:
    """Writes StableHLO artifacts and compares them with the pipeline; lines for the user."""
    pipe = SprintPipeline.from_pretrained(
        flags.workdir, dtype=jnp.dtype(flags.dtype), params=flags.params
    )
    if pipe.is_student and flags.steps is not None:
        raise UserError("--steps is for teachers: a student's export has 1 to 4", exit_code=2)
    steps = (1, 2, 3, 4) if pipe.is_student else (20 if flags.steps is None else flags.steps,)
    require_space(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params)))
    source = _source(flags, pipe.meta, pipe.params)
    errors = export_pipeline(pipe, folder, steps=steps, height=height, width=width, source=source)
    lines = [f"{name} differs from the pipeline by {error:.1g}" for name, error in errors.items()]
    return [*lines, f"run it: python {Path(flags.out) / 'load.py'}"]


if __name__ == "__main__":
    cli.run_command(main)
