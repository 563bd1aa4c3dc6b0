"""The parts that `sprint_jax.benchmark` measures: transformer, decoder, text encoder, prompts to pictures."""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..interop.diffusers import load_autoencoder, load_transformer
from ..interop.sana import config_from_fields
from ..models.blocks import unstack_blocks
from ..models.dc_ae import AutoencoderDC, Decoder
from ..models.sana import SanaTransformer
from ..pipeline import SprintPipeline
from . import torch_reference as reference
from .timing import compiled, first_call, waiting
from .workloads import FACTOR, STUDENTS, network_calls, network_inputs, random_params

PARTS = ("text", "transformer", "decoder", "whole", "first")
OF_PIPELINES = {"text", "whole", "first"}  # need a pipeline folder, with its text encoder


class Part(NamedTuple):
    """One line of the benchmark.

    Attributes:
      name: of the workload.
      batch: pictures.
      ours: a call that waits for its result.
      cold_s: seconds that compiling took, or the first call if it compiles inside.
      theirs: {arm: call} of diffusers.
      error: ``error(ours, theirs)`` of two results; None where random draws differ.
    """

    name: str
    batch: int
    ours: Callable
    cold_s: float
    theirs: dict[str, Callable]
    error: Callable | None = reference.relative_error


def parts(flags: argparse.Namespace) -> Iterator[Part]:
    """Yields the parts that the command's flags ask for, each built when it is due."""
    device = _torch_device() if flags.against else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        if "transformer" in flags.parts:
            yield from _transformer(flags, device, Path(scratch))
        if "decoder" in flags.parts:
            yield from _decoder(flags, device, Path(scratch))
    if {"text", "whole"} & set(flags.parts):
        yield from _pipeline(flags, device)


def _torch_device() -> str:
    """Returns 'cuda' where JAX and torch both have one, else 'cpu'; UserError where JAX alone has."""
    if jax.default_backend() == "cpu":
        return "cpu"
    if jax.default_backend() == "gpu" and reference.import_torch().cuda.is_available():
        return "cuda"
    raise UserError(
        f"JAX runs on {jax.default_backend()}, torch cannot: compare with JAX_PLATFORMS=cpu, or install "
        "torch for it"
    )


def _weights(
    flags: argparse.Namespace, part: str, config: dict, scratch: Path
) -> tuple[Path | None, Any]:
    """Returns the folder of a part's weights, and diffusers' module of them if there is one to compare with.

    Weights are those of ``--model``, or random ones that diffusers draws; None for weights of our own.
    """
    if not flags.against:
        return Path(flags.model, part) if flags.model else None, None
    if not flags.model:
        reference.save_random(scratch, part, config)
    folder = Path(flags.model or scratch)
    return folder / part, reference.load_module(folder, part)


def _transformer(flags: argparse.Namespace, device: str, scratch: Path) -> Iterator[Part]:
    fields, params = STUDENTS[flags.size], None
    folder, module = _weights(flags, "transformer", config_from_fields(fields), scratch)
    if folder:
        fields, params = load_transformer(folder, flags.dtype)
    model = SanaTransformer(**(fields | {"dtype": jnp.dtype(flags.dtype)}))

    def error(ours, theirs):
        return reference.network_error(fields, ours, theirs)

    for batch in flags.batch:
        inputs = network_inputs(fields, batch, *flags.image)
        if params is None:
            params = random_params(model, inputs, flags.dtype)
        if not flags.stacked and isinstance(params["transformer_blocks"], dict):
            params = jax.jit(unstack_blocks)(params)
        arms = {}
        if module is not None:
            arms = reference.transformer_arms(
                module, inputs, device, flags.dtype, not flags.no_compile
            )
        for name, workload in flags.workloads.items():
            call = network_calls(model)[workload]
            ours, seconds = compiled(call, params, jax.device_put(inputs))
            theirs = {arm: calls[workload] for arm, calls in arms.items() if workload in calls}
            yield Part(name, batch, ours, seconds, theirs, error)


def _decoder(flags: argparse.Namespace, device: str, scratch: Path) -> Iterator[Part]:
    config = AutoencoderDC()
    fields = {name: value for name, value in vars(config).items() if name != "dtype"}
    folder, module = _weights(flags, "vae", fields, scratch)
    if folder:
        config, params = load_autoencoder(folder, flags.dtype)
        params = params["decoder"]
    else:
        shapes = jax.eval_shape(config.init, jax.random.key(0))["decoder"]
        draw = np.random.default_rng(0).normal
        params = jax.tree.map(lambda s: jnp.asarray(draw(0, 0.02, s.shape), flags.dtype), shapes)
    config = dataclasses.replace(config, dtype=jnp.dtype(flags.dtype))
    decoder = Decoder(config, config.dtype)
    height, width = (side // FACTOR for side in flags.image)
    for batch in flags.batch:
        shape = (batch, height, width, config.latent_channels)
        latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)

        def decode(params, latents):
            return decoder.apply({"params": params}, latents)

        ours, seconds = compiled(decode, params, jnp.asarray(latents))
        theirs = {}
        if module is not None:
            theirs = reference.decoder_arms(
                module, latents, device, flags.dtype, not flags.no_compile
            )
        yield Part("decoder", batch, ours, seconds, theirs)


def _pipeline(flags: argparse.Namespace, device: str) -> Iterator[Part]:
    pipe = SprintPipeline.from_pretrained(flags.model, jnp.dtype(flags.dtype))
    pipelines = {}
    if flags.against:
        how = flags.model, device, flags.dtype, not flags.no_compile
        pipelines = reference.load_pipelines(*how)
    height, width = flags.image
    for batch in flags.batch:
        prompts = [f"a photo of {number} birds on a wire" for number in range(1, batch + 1)]
        if "text" in flags.parts:
            call = waiting(pipe.encode_text, prompts)
            arms = {}
            if pipelines:  # compiled, the text encoder is the same
                arms[reference.EAGER] = reference.text_call(pipelines[reference.EAGER], prompts)
            yield Part("text", batch, call, first_call(call), arms, None)
        for count in flags.steps if "whole" in flags.parts else ():
            how = dict(steps=count, height=height, width=width)
            call = waiting(pipe, prompts, **how, batch_size=batch)
            arms = {a: reference.whole_call(p, prompts, **how) for a, p in pipelines.items()}
            yield Part(f"whole, {count} steps", batch, call, first_call(call), arms, None)
