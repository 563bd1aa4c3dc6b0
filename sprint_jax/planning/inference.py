"""The programs that a pipeline runs to draw pictures, compiled from shapes alone.

A pipeline without arrays (`open_model`) lowers its own calls (`lower_part`), so that what is planned is what
`SprintPipeline` runs: prompts to features, features and noise to latents, latents to pictures. Networks of the
embedded digits world have neither text encoder nor autoencoder, and only their transformer is planned.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers

from ..checkpoints.locate import locate
from ..checkpoints.workdir import is_student, read_workdir_config
from ..core.errors import UserError
from ..core.pixels import AT_ONCE, batch_rows
from ..encoders.autoencoder import Autoencoder
from ..encoders.text import BOUNDARY, INSTRUCTION, PromptTokenizer, TextEncoder, load_tokenizer
from ..interop.diffusers import read_autoencoder, read_config
from ..interop.gemma2 import read_text_encoder
from ..interop.sana import example_inputs, fields_from_config
from ..models.dc_ae import AutoencoderDC
from ..models.gemma2 import Gemma2
from ..models.sana import SIZES, from_fields
from ..pipeline import SprintPipeline
from .chips import roofline
from .compile import Program, compile_program
from .counts import analyze, total
from .gpus import usable
from .topology import Topology

PARTS = ("text", "transformer", "decoder")
# Memory of common cards in GiB, as they are sold.
CARDS = (8, 12, 16, 24, 80)
# Parts of a pipeline folder that a plan reads: no weights.
FILES = ("*.json", "*/*.json")


class Run(NamedTuple):
    """One call for pictures: how many steps and pictures, and their height and width in pixels."""

    steps: int
    batch: int
    image: tuple[int, int]


def open_model(name: str, dtype: Any, device: Any = None) -> SprintPipeline:
    """Returns a pipeline whose parameters are shapes.

    Args:
      name: one of `models.sana.SIZES`, which is planned with the published encoders; or what
        `SprintPipeline.from_pretrained` takes: only configs are read.
      dtype: of parameters and matmuls.
      device: that the plan is for, whose form of the networks is taken; default this machine's first.

    Raises:
      UserError: nothing of the kind is there, or a config is damaged.
    """
    dtype, encoders, device = jnp.dtype(dtype), None, device or jax.devices()[0]
    if name in SIZES:
        fields = SIZES[name]
        encoders = AutoencoderDC(), Gemma2(dtype=dtype), _words()
    else:
        kind, folder = locate(name, ("workdir", "pipeline"), FILES)
        if kind == "workdir":
            c = read_workdir_config(folder)
            fields = dict(c.model) | {"guidance_embeds": is_student(c)}
            source = c.data.encoders if c.data.source != "digits" else ""
            folder = locate(source, ("pipeline",), FILES).path if source else None
        else:
            config = read_config(folder / "transformer", "SanaTransformer2DModel")
            fields = fields_from_config(config, f"{folder}/transformer/config.json")
        if folder is not None:
            gemma = read_text_encoder(folder / "text_encoder", dtype)
            encoders = read_autoencoder(folder / "vae"), gemma, load_tokenizer(folder / "tokenizer")
    model = from_fields(fields, dtype=dtype.name, logvar=False)
    arranged = device.platform == "gpu"  # as the pipeline has it
    params = jax.eval_shape(lambda key: model.init(key, *example_inputs(model)), jax.random.key(0))
    autoencoder, text_encoder = None, None
    if encoders:
        config, gemma, tokenizer = encoders
        decoder = {"decoder": jax.eval_shape(config.init, jax.random.key(0))["decoder"]}
        config = dataclasses.replace(config, dtype=dtype)
        autoencoder = Autoencoder(config, _as(decoder, dtype), arranged=arranged)
        shapes = jax.eval_shape(gemma.init, jax.random.key(0))
        text_encoder = TextEncoder(gemma, _as(shapes, dtype), tokenizer, arranged=arranged)
    return SprintPipeline(
        model,
        _as(params["params"], dtype),
        autoencoder,
        text_encoder,
        is_student=model.guidance_embeds,
        sigma_d=0.5,
        shift=3.0,
        midpoint=1.3,
        guidance=4.5,
        size=(1024, 1024),
        arranged=arranged,
        device=device,
    )


def _words() -> PromptTokenizer:
    """A tokenizer that cuts at words and marks: the published instruction then has about as many tokens."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PromptTokenizer(words, begin=0, pad=0)


def _as(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def parts_of(pipe: SprintPipeline) -> tuple[str, ...]:
    """The parts of `PARTS` that a pipeline has."""
    return PARTS if pipe.text_encoder is not None else ("transformer",)


def calls_of(pipe: SprintPipeline, part: str, run: Run) -> tuple[int, int]:
    """How often a part is called for one batch of pictures, and how many rows each call has."""
    if part == "transformer":
        return 1, run.batch
    most = (
        pipe.text_encoder.batch_size if part == "text" else AT_ONCE // (run.image[0] * run.image[1])
    )
    batches = batch_rows(run.batch, max(1, most))
    return len(batches), len(batches[0])


def weights_of(pipe: SprintPipeline, part: str) -> Any:
    """The parameters of a part, as its program takes them: shapes."""
    if part == "transformer":
        return pipe._weights
    return pipe.text_encoder._weights if part == "text" else pipe.autoencoder._decoder


def lower_part(pipe: SprintPipeline, part: str, run: Run, device: Any) -> Any:
    """Traces one call of a part, as the pipeline makes it, for a device that need not exist.

    Raises:
      UserError: the picture's size or the steps do not fit the network.
    """
    rows, here = calls_of(pipe, part, run)[1], jax.sharding.SingleDeviceSharding(device)

    def placed(tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree
        )

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    weights = placed(weights_of(pipe, part))
    if part == "text":
        encoder = pipe.text_encoder
        shared = len(encoder.tokenizer.encode(encoder.instruction or INSTRUCTION))
        past = array(shared - BOUNDARY, dtype=jnp.int32)
        prefix = placed(jax.eval_shape(encoder.gemma.prefix_cache, weights, past))
        ids = array(rows, shared + encoder.length - 2, dtype=jnp.int32)
        kept = array(encoder.length, dtype=jnp.int32)
        return encoder._run.lower(weights, ids, ids, kept, prefix)
    latents = pipe.model.in_channels
    if part == "decoder":
        factor = pipe.autoencoder.factor
        shape = (rows, *(side // factor for side in run.image), latents)
        return pipe.autoencoder._decode_to_bytes.lower(weights, array(*shape))
    steps = pipe.check_steps(run.steps)
    factor = pipe.autoencoder.factor if pipe.autoencoder else 2
    height, width = (side // factor for side in run.image)
    seed = array(dtype=jnp.uint32), array(rows, dtype=jnp.uint32)
    length = pipe.text_encoder.length if pipe.text_encoder else 300
    text, mask = (length, pipe.model.caption_channels), (length,)
    inputs = array(rows, *text), array(rows, *mask, dtype=jnp.int32), seed, array(rows)
    how = dict(steps=steps, control=None, shape=(height, width, latents))
    if not pipe.is_student:
        null = array(*text), array(*mask, dtype=jnp.int32)
        return pipe._latents.lower(weights, *inputs, null, **how, solver="dpm")
    return pipe._latents.lower(weights, *inputs, None, None, None, **how, strength=1.0)


def plan_sampling(
    name: str, dtype: str, topology: Topology, runs: Sequence[Run], full: bool, say: Any
) -> dict:
    """Compiles the parts of a pipeline for one device; runs nothing.

    Args:
      name, dtype: of `open_model`.
      runs: what is asked of it.
      full: compile to machine code; say: takes lines of progress.

    Returns:
      The content of ``--out``, see docs/planning.md.

    Raises:
      UserError: for what the model cannot draw, more than one device, or what the compiler cannot compile.
    """
    if len(topology.devices) != 1 and topology.name != "local":
        one = "v6e:1x1, h200:1"
        raise UserError(f"--sample plans one device ({one} ...), not {topology.name}", exit_code=2)
    pipe, made = open_model(name, dtype, topology.devices[0]), {}
    for run in runs:
        pipe.check_steps(run.steps)
        if pipe.autoencoder:
            pipe.latent_shape(*run.image)
    found = []
    for run in runs:
        parts = []
        for part in parts_of(pipe):
            calls, rows = calls_of(pipe, part, run)
            key = (part, rows, run.image, run.steps if part == "transformer" else None)
            if key not in made:
                steps = f", {run.steps} steps" if part == "transformer" else ""
                say(f"compiling {part} of {rows}{steps} for {topology.chip_name}")
                request = {"sample": run._asdict(), "model": name, "dtype": dtype, "part": part}
                how = request, _lowering(pipe, part, run, topology), topology, full
                program = compile_program(f"{part} of {name}", *how)
                made[key] = _part(part, program, pipe, topology)
            parts.append(made[key] | {"calls": calls, "rows": rows})
        found.append(_whole(run, parts, topology))
    plan = {
        "model": name,
        "dtype": dtype,
        "topology": topology.name,
        "chip": topology.chip_name,
        "limit_bytes": topology.hbm_bytes,
        "runs": found,
    }
    return plan | {"largest_batch": largest_batches(found)}


def _lowering(pipe: SprintPipeline, part: str, run: Run, topology: Topology) -> Any:
    return lambda: lower_part(pipe, part, run, topology.devices[0])


def _part(name: str, program: Program, pipe: SprintPipeline, topology: Topology) -> dict:
    """The entry of a part, of one call."""
    works = analyze(program.text, passes=topology.chip.passes)
    roof = roofline(topology.chip, works, topology.devices)
    leaves = jax.tree.leaves(weights_of(pipe, name))
    weights = float(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
    return {
        "name": name,
        "flops": total(works, "flops"),
        "hbm_bytes": total(works, "hbm"),
        "kernels": total(works, "kernels"),
        "weight_bytes": weights,
        "bytes": program.bytes,
        "fits": program.fits,
        "seconds": roof.seconds,
        "bound": roof.bound,
        "roofline": roof._asdict(),
        "largest_buffers": program.buffers,
    }


def _whole(run: Run, parts: list[dict], topology: Topology) -> dict:
    """The entry of one run: its parts, their sum, and which memory holds it.

    ``bytes`` is with the weights of all parts in place, ``bytes_in_turn`` with those of one at a time.
    """
    weights = sum(part["weight_bytes"] for part in parts)
    beside = max(part["bytes"] - part["weight_bytes"] for part in parts)
    whole = {
        key: sum(part["calls"] * part[key] for part in parts)
        for key in ("flops", "hbm_bytes", "kernels", "seconds")
    }
    whole |= {
        "images_per_second": run.batch / whole["seconds"],
        "weight_bytes": weights,
        "bytes": weights + beside,
        "bytes_in_turn": max(part["bytes"] for part in parts),
        "bound": max(parts, key=lambda part: part["calls"] * part["seconds"])["name"],
    }
    fits = all(part["fits"] for part in parts) and whole["bytes"] <= topology.hbm_bytes
    cards = {
        key: [card for card in CARDS if whole[key] <= usable(card * 2**30)]
        for key in ("bytes", "bytes_in_turn")
    }
    whole |= {"fits": fits, "cards": cards["bytes"], "cards_in_turn": cards["bytes_in_turn"]}
    return run._asdict() | {"parts": parts, "whole": whole}


def largest_batches(runs: list[dict]) -> list[dict]:
    """The most pictures of a call on each card, by steps and size, where two batches or more were planned.

    The text encoder and the decoder take no more rows at once than `calls_of` says: beyond that the transformer
    alone grows, on a straight line through the two largest batches.
    """
    found = []
    for steps, image in dict.fromkeys((run["steps"], run["image"]) for run in runs):
        some = [run for run in runs if (run["steps"], run["image"]) == (steps, image)]
        some.sort(key=lambda run: run["batch"])
        if len({run["batch"] for run in some}) > 1:
            entry: dict[str, Any] = {"steps": steps, "image": image}
            for key in ("bytes", "bytes_in_turn"):
                entry[key] = {str(card): _most(some, key, usable(card * 2**30)) for card in CARDS}
            found.append(entry)
    return found


def _most(runs: list[dict], key: str, room: float) -> int:
    """The largest batch whose ``key`` is within the room."""
    planned = max((run["batch"] for run in runs if run["whole"][key] <= room), default=0)
    if planned < runs[-1]["batch"]:
        return planned
    sizes = []
    for run in runs[-2:]:
        part = next(part for part in run["parts"] if part["name"] == "transformer")
        others = run["whole"]["weight_bytes"] - part["weight_bytes"]
        sizes.append(part["bytes"] + (others if key == "bytes" else 0.0))
    slope = (sizes[1] - sizes[0]) / (runs[-1]["batch"] - runs[-2]["batch"])
    return runs[-1]["batch"] + int((room - sizes[1]) / slope)
