"""Encodes images and captions once, for many trainings: latents and text features of any data set.

    python -m sprint_jax.encode --config configs/encode.py:1024 --config.data.images=DIR \
        --config.data.encoders=HUB_ID --out LATENTS
    python -m sprint_jax.encode --config configs/encode.py:digits --out LATENTS

The same line begins, goes on after an interruption, or reports that all is done. LATENTS gets ArrayRecord
shards, manifest.json (without which nothing reads them), rejected.jsonl, preview.png and one file for each
unit of records that is done. Several processes with --distributed share the units of one folder, which all
of them must see.
"""

from .core import cli
from .core.config import Config
from .core.errors import UserError
from .core.storage import absolute, as_path, in_bucket
from .data.feed import open_sources
from .data.latents import encoding
from .data.sources.records import Concatenation, Source
from .parallel import distributed

# Keys of the config that are read; a name with a dot at its end stands for a whole section.
READ = ("data.images", "data.dir", "data.image_feature", "data.caption_feature", "data.resolution")
READ += ("data.sizes", "data.encoders", "data.max_rejected", "data.control", "encode.")
READ += ("mesh.data", "mesh.fsdp", "mesh.tensor", "sigma_d")


def main(argv: list[str]) -> None:
    """Runs the command; ``argv`` are its words. Raises UserError for what cannot be encoded."""
    parser = cli.make_parser("encode", __doc__)
    cli.add_config(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="made, or gone on with")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N records, to try it"
    )
    distributed.add_flags(parser)
    flags, c = cli.parse_with_config(parser, argv)
    for word in cli.split_overrides(argv)[0]:
        name = word.removeprefix("--config.").partition("=")[0]
        if not name.startswith(READ):
            raise UserError(
                f"--config.{name} changes nothing that encode writes: it reads {', '.join(READ)}", 2
            )
    out = as_path(flags.out)
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit {flags.limit} must be at least 1", exit_code=2)
    for path in c.data.images:  # the preview would be one of them
        folder = as_path(path) if in_bucket(path) == in_bucket(out) else None
        if folder and folder.is_dir() and absolute(out).is_relative_to(absolute(folder)):
            raise UserError(f"--out {out} lies in the images of {path}: give a folder elsewhere", 2)
    cli.use_compilation_cache()
    with distributed.joined(flags) as peers:
        job = encoding.make_job(c, open_source(c), out, flags.limit)
        how = dict(sigma_d=c.sigma_d, max_rejected=c.data.max_rejected)
        encoding.encode(job, peers=peers, **how)


def open_source(c: Config) -> Source:
    """Opens the records in ``data.images``, one source after the other."""
    return Concatenation(open_sources(c))


if __name__ == "__main__":
    cli.run_command(main)
