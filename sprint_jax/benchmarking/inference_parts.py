"""The parts of ``benchmark sample``: text encoder, transformer, decoder, and the whole to pictures."""

import argparse
import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..interop.diffusers import load_autoencoder, load_transformer
from ..models.blocks import unstack_blocks
from ..models.dc_ae import AutoencoderDC, Decoder
from ..models.sana import SanaTransformer
from ..pipeline import SprintPipeline
from . import torch_reference as reference
from .timing import compiled, first_call, waiting
from .workloads import FACTOR, STUDENTS, network_calls, network_inputs, random_params

PARTS = ("text", "transformer", "decoder", "whole")


class Part(NamedTuple):
    """One line of the benchmark.

    Attributes:
      name: of the part, with its steps if it takes any.
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
    error: Callable | None


def possible(folder: str | None) -> tuple[str, ...]:
    """Returns the parts that can be timed; texts need a pipeline folder."""
    return PARTS if folder else ("transformer", "decoder")


def torch_device() -> str:
    """'cuda' where JAX and torch both have one, else 'cpu'; UserError where JAX alone has."""
    if jax.default_backend() == "cpu":
        return "cpu"
    if jax.default_backend() == "gpu" and reference.import_torch().cuda.is_available():
        return "cuda"
    raise UserError(
        f"JAX runs on {jax.default_backend()}, torch cannot: compare with JAX_PLATFORMS=cpu, or install "
        "torch for it"
    )


def parts(flags: argparse.Namespace) -> Iterator[Part]:
    """Yields the parts that the command's flags ask for, one batch size after the other.

    Each is built when it is due.
    """
    device = torch_device() if flags.against else "cpu"
    if "transformer" in flags.parts:
        yield from _transformer(flags, device)
    if "decoder" in flags.parts:
        yield from _decoder(flags, device)
    if "text" in flags.parts or "whole" in flags.parts:
        yield from _pipeline(flags, device)


def _transformer(flags: argparse.Namespace, device: str) -> Iterator[Part]:
    if flags.model:
        fields, params = load_transformer(Path(flags.model) / "transformer", flags.dtype)
    else:
        fields, params = STUDENTS[flags.size], None
    model = SanaTransformer(**(fields | {"dtype": jnp.dtype(flags.dtype)}))
    module = None
    if flags.against and flags.model:
        module = reference.load_module(flags.model, "transformer")
    elif flags.against:
        module, params = reference.make_transformer(fields, flags.dtype)
    for batch in flags.batch:
        arrays = network_inputs(fields, batch, *flags.image)
        if params is None:
            params = random_params(model, arrays)
            params = jax.tree.map(lambda leaf: leaf.astype(flags.dtype), params)
        if not flags.stacked and isinstance(params["transformer_blocks"], dict):
            params = jax.jit(unstack_blocks)(params)
        ours, seconds = compiled(network_calls(model)["forward"], params, jax.device_put(arrays))
        theirs = {}
        if module is not None:
            arms = reference.TransformerArms(module, arrays, device, flags.dtype)
            theirs[reference.EAGER] = arms.workloads(["forward"])["forward"]
            if not flags.no_compile:
                theirs[reference.COMPILED] = arms.compiled().workloads(["forward"])["forward"]
        yield Part("transformer", batch, ours, seconds, theirs, reference.relative_error)


def _decoder(flags: argparse.Namespace, device: str) -> Iterator[Part]:
    module = None
    if flags.model:
        config, params = load_autoencoder(Path(flags.model) / "vae", flags.dtype)
        module = reference.load_module(flags.model, "vae") if flags.against else None
    elif flags.against:
        module, config, params = reference.make_autoencoder(flags.dtype)
    else:
        config = AutoencoderDC()
        shapes = jax.eval_shape(config.init, jax.random.key(0))["decoder"]
        draw = np.random.default_rng(0).normal
        params = jax.tree.map(lambda s: jnp.asarray(draw(0, 0.02, s.shape), flags.dtype), shapes)
        params = {"decoder": params}
    config = dataclasses.replace(config, dtype=jnp.dtype(flags.dtype))
    decoder = Decoder(config, config.dtype)
    height, width = (side // FACTOR for side in flags.image)
    for batch in flags.batch:
        shape = (batch, height, width, config.latent_channels)
        latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)

        def decode(params, latents):
            return decoder.apply({"params": params}, latents)

        ours, seconds = compiled(decode, params["decoder"], jnp.asarray(latents))
        theirs = {}
        if module is not None:
            how = device, flags.dtype, not flags.no_compile
            theirs = reference.decoder_arms(module, latents, *how)
        yield Part("decoder", batch, ours, seconds, theirs, reference.relative_error)


def _pipeline(flags: argparse.Namespace, device: str) -> Iterator[Part]:
    pipe = SprintPipeline.from_pretrained(flags.model, jnp.dtype(flags.dtype))
    theirs = {}
    if flags.against:
        theirs[reference.EAGER] = reference.PipelineArms(flags.model, device, flags.dtype)
        if not flags.no_compile:
            theirs[reference.COMPILED] = theirs[reference.EAGER].compiled()
    height, width = flags.image
    for batch in flags.batch:
        prompts = [f"a photo of {number} birds on a wire" for number in range(1, batch + 1)]
        if "text" in flags.parts:
            call = waiting(pipe.encode_text, prompts)
            eager = {arm: each for arm, each in theirs.items() if arm == reference.EAGER}
            arms = {arm: each.text(prompts) for arm, each in eager.items()}
            yield Part("text", batch, call, first_call(call), arms, None)
        for count in flags.steps if "whole" in flags.parts else ():
            how = dict(steps=count, height=height, width=width, batch_size=batch)
            call = waiting(pipe, prompts, **how)
            arms = {arm: each.whole(prompts, count, height, width) for arm, each in theirs.items()}
            yield Part(f"whole, {count} steps", batch, call, first_call(call), arms, None)


def first_picture(folder: str, dtype: str, image: tuple[int, int]) -> dict[str, float]:
    """Times a process that loads, compiles, draws and writes one picture, in seconds.

    Returns {'cold': with an empty compilation cache, 'warm': with the one that the first left}. To be called
    before this process takes a device.
    """
    height, width = image
    with tempfile.TemporaryDirectory() as scratch:
        words = [sys.executable, "-m", "sprint_jax.sample", "--model", folder, "--prompt", "a bird"]
        words += ["--steps=2", f"--size={height}x{width}", f"--dtype={dtype}"]
        words += [f"--out={scratch}/out"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{scratch}/cache"}
        seconds = {}
        for name in ("cold", "warm"):
            began = time.perf_counter()
            ended = subprocess.run(words, env=environment, capture_output=True, text=True)
            if ended.returncode:
                raise UserError(f"sprint_jax.sample failed: {ended.stderr.strip()[-300:]}")
            seconds[name] = round(time.perf_counter() - began, 2)
    return seconds


def peak_memory() -> dict[str, float]:
    """Returns the most memory so far, GB: {'device': of the accelerator} or {'process': of this process}."""
    statistics: dict[str, Any] = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return {"device": round(statistics["peak_bytes_in_use"] / 1e9, 3)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB; bytes on macOS
    return {"process": round(peak / (1e9 if sys.platform == "darwin" else 1e6), 3)}
