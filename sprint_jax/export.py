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

import jax.numpy as jnp

from .artifacts.export import export_diffusers, export_stablehlo, new_folder
from .core import cli
from .core.errors import UserError
from .core.storage import as_path
from .pipeline import SprintPipeline

# Flags that only one format has.
ONLY = {"base": "diffusers", "size": "stablehlo", "steps": "stablehlo"}


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be exported."""
    flags = _parser().parse_args(argv)
    for flag, needed in ONLY.items():
        if getattr(flags, flag) is not None and flags.format != needed:
            raise UserError(f"--{flag} is for --format {needed}", exit_code=2)
    height, width = cli.parse_size(flags.size)
    dtype = jnp.dtype(flags.dtype)
    cli.use_compilation_cache()
    with new_folder(as_path(flags.out)) as folder:
        if flags.format == "diffusers":
            how = dict(params=flags.params, dtype=dtype, base=flags.base)
            report = export_diffusers(flags.workdir, folder, **how)
        else:
            pipe = SprintPipeline.from_pretrained(flags.workdir, dtype, flags.params)
            how = dict(params=flags.params, steps=flags.steps, height=height, width=width)
            report = export_stablehlo(pipe, flags.workdir, folder, **how)
            report.append(f"run it: python {flags.out}/load.py")
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
    some = "stablehlo, for teachers alone: default 20 (a student's export always has 1 to 4)"
    add("--steps", type=int, metavar="N", help=some)
    return parser


if __name__ == "__main__":
    cli.run_command(main)
