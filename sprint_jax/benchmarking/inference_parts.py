"""What ``benchmark sample`` times: text encoder, transformer, decoder, and from prompts to pictures."""

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
from .workloads import FACTOR, STUDENTS, compiled, network_calls, network_inputs, random_params

PARTS = ("text", "transformer", "decoder", "whole")
OF_SIZE = ("transformer", "decoder")  # what random weights are enough for


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


class Setup(NamedTuple):
    """What is timed on what: JAX's dtype by name, torch's device, sizes, and whether to compare."""

    folder: str | None
    size: str
    dtype: str
    device: str
    image: tuple[int, int]
    against: bool
    torch_compile: bool
    stacked: bool


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


def parts(setup: Setup, names: tuple[str, ...], batches: tuple[int, ...], steps) -> Iterator[Part]:
    """The parts asked for, one batch size after the other; each is built when it is due."""
    if "transformer" in names:
        yield from _transformer(setup, batches)
    if "decoder" in names:
        yield from _decoder(setup, batches)
    if "text" in names or "whole" in names:
        yield from _pipeline(setup, names, batches, steps)


def _transformer(setup: Setup, batches) -> Iterator[Part]:
    if setup.folder:
        fields, params = load_transformer(Path(setup.folder) / "transformer", setup.dtype)
    else:
        fields, params = STUDENTS[setup.size], None
    model = SanaTransformer(**(fields | {"dtype": jnp.dtype(setup.dtype)}))
    module = None
    if setup.against and setup.folder:
        module = reference.load_transformer_module(setup.folder)
    elif setup.against:
        module, params = reference.make_transformer(fields, setup.dtype)
    for batch in batches:
        arrays = network_inputs(fields, batch, *setup.image)
        if params is None:
            params = random_params(model, arrays)
            params = jax.tree.map(lambda leaf: leaf.astype(setup.dtype), params)
        if not setup.stacked and isinstance(params["transformer_blocks"], dict):
            params = jax.jit(unstack_blocks)(params)
        inputs = jax.device_put(arrays)
        ours, seconds = compiled(network_calls(model)["forward"], params, inputs)
        theirs = {}
        if module is not None:
            arms = reference.TransformerArms(module, arrays, setup.device, setup.dtype)
            theirs[reference.EAGER] = arms.workloads(["forward"])["forward"]
            if setup.torch_compile:
                theirs[reference.COMPILED] = arms.compiled().workloads(["forward"])["forward"]
        yield Part("transformer", batch, ours, seconds, theirs, _error)


def _decoder(setup: Setup, batches) -> Iterator[Part]:
    module = None
    if setup.folder:
        config, params = load_autoencoder(Path(setup.folder) / "vae", setup.dtype)
        module = reference.load_autoencoder_module(setup.folder) if setup.against else None
    elif setup.against:
        module, config, params = reference.make_autoencoder(setup.dtype)
    else:
        config = AutoencoderDC()
        shapes = jax.eval_shape(config.init, jax.random.key(0))["decoder"]
        draw = np.random.default_rng(0).normal
        params = jax.tree.map(lambda s: jnp.asarray(draw(0, 0.02, s.shape), setup.dtype), shapes)
        params = {"decoder": params}
    config = dataclasses.replace(config, dtype=jnp.dtype(setup.dtype))
    decoder = Decoder(config, config.dtype)
    height, width = (side // FACTOR for side in setup.image)
    for batch in batches:
        shape = (batch, height, width, config.latent_channels)
        latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)

        def decode(params, latents):
            return decoder.apply({"params": params}, latents)

        ours, seconds = compiled(decode, params["decoder"], jnp.asarray(latents))
        theirs = {}
        if module is not None:
            theirs = reference.decoder_arms(
                module, latents, setup.device, setup.dtype, setup.torch_compile
            )
        yield Part("decoder", batch, ours, seconds, theirs, _error)


def _pipeline(setup: Setup, names, batches, steps) -> Iterator[Part]:
    pipe = SprintPipeline.from_pretrained(setup.folder, jnp.dtype(setup.dtype))
    theirs = {}
    if setup.against:
        theirs[reference.EAGER] = reference.PipelineArms(setup.folder, setup.device, setup.dtype)
        if setup.torch_compile:
            theirs[reference.COMPILED] = theirs[reference.EAGER].compiled()
    height, width = setup.image
    for batch in batches:
        prompts = [f"a photo of {number} birds on a wire" for number in range(1, batch + 1)]
        if "text" in names:
            call = _call(pipe.encode_text, prompts)
            arms = {
                arm: each.text(prompts) for arm, each in theirs.items() if arm == reference.EAGER
            }
            yield Part("text", batch, call, _seconds(call), arms, None)
        for count in steps if "whole" in names else ():
            how = dict(steps=count, height=height, width=width, batch_size=batch)
            call = _call(pipe, prompts, **how)
            arms = {arm: each.whole(prompts, count, height, width) for arm, each in theirs.items()}
            yield Part(f"whole, {count} steps", batch, call, _seconds(call), arms, None)


def first_picture(folder: str, dtype: str, image: tuple[int, int]) -> dict[str, float]:
    """Seconds of a process that loads, compiles, draws and writes one picture: {'cold': with an empty
    compilation cache, 'warm': with the one that it left}. Run it before this process takes a device."""
    height, width = image
    with tempfile.TemporaryDirectory() as scratch:
        words = [sys.executable, "-m", "sprint_jax.sample", "--model", folder, "--prompt", "a bird"]
        words += [
            "--steps=2",
            f"--size={height}x{width}",
            f"--out={scratch}/out",
            f"--dtype={dtype}",
        ]
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
    """The most memory in GB so far: {'device': of the accelerator} or {'process': of this process}."""
    statistics: dict[str, Any] = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return {"device": round(statistics["peak_bytes_in_use"] / 1e9, 3)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB; bytes on macOS
    return {"process": round(peak / (1e9 if sys.platform == "darwin" else 1e6), 3)}


def _error(ours, theirs) -> float:
    return reference.relative_error(ours, reference.to_numpy(theirs))


def _call(function, *arguments, **keywords):
    return lambda: jax.block_until_ready(function(*arguments, **keywords))


def _seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
