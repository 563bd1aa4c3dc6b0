"""The parts that `sprint_jax.benchmark` measures: networks, prompts to pictures, and these along a sketch."""

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import sampling
from ..core.errors import UserError
from ..interop.diffusers import load_autoencoder, load_transformer
from ..interop.sana import config_from_fields
from ..models.blocks import unstack_blocks
from ..models.control import PUBLISHED_BLOCKS, new_branch
from ..models.dc_ae import AutoencoderDC, Decoder
from ..models.sana import SanaTransformer
from ..pipeline import SprintPipeline
from ..trigflow import to_trigflow
from . import torch_reference as reference
from .timing import compiled, first_call, waiting
from .workloads import FACTOR, STUDENTS, network_calls, network_inputs, random_params

PARTS = ("text", "transformer", "decoder", "whole", "control", "first")
OF_PIPELINES = {
    "text",
    "whole",
    "control",
    "first",
}  # need a pipeline folder, with its text encoder


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
    """Yields the parts that the command's flags ask for, each built when it is due.

    Of a pipeline folder they are the programs that `SprintPipeline` runs.
    """
    device = _torch_device(flags.dtype) if flags.against else "cpu"
    if flags.model:
        if set(flags.parts) != {"first"}:  # which is timed in processes of its own
            yield from _pipeline(flags, device)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if "transformer" in flags.parts:
            yield from _transformer(flags, device, Path(scratch))
        if "decoder" in flags.parts:
            yield from _decoder(flags, device, Path(scratch))


def _torch_device(dtype: str) -> str:
    """Returns 'cuda' where JAX and torch both have one, else 'cpu'; UserError where JAX alone has.

    On a GPU torch computes convolutions of float32 in full, as ours are, from here on if ``dtype`` is that.
    """
    if jax.default_backend() == "cpu":
        return "cpu"
    if jax.default_backend() == "gpu" and (torch := reference.import_torch()).cuda.is_available():
        if dtype == "float32":
            torch.backends.cudnn.allow_tf32 = False
        return "cuda"
    raise UserError(
        f"JAX runs on {jax.default_backend()}, torch cannot: compare with JAX_PLATFORMS=cpu, or install "
        "torch for it"
    )


def _weights(part: str, config: dict, scratch: Path) -> tuple[Path, Any]:
    """Returns the folder of a part with random weights that diffusers draws, and its module of them."""
    reference.save_random(scratch, part, config)
    return scratch / part, reference.load_module(scratch, part)


def _transformer(flags: argparse.Namespace, device: str, scratch: Path) -> Iterator[Part]:
    fields, params, module = STUDENTS[flags.size], None, None
    if flags.against:
        folder, module = _weights("transformer", config_from_fields(fields), scratch)
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
            arms = reference.transformer_arms(module, inputs, device, flags.dtype, flags.mode)
        for name, workload in flags.workloads.items():
            call = network_calls(model)[workload]
            ours, seconds = compiled(call, params, jax.device_put(inputs))
            theirs = {arm: calls[workload] for arm, calls in arms.items() if workload in calls}
            yield Part(name, batch, ours, seconds, theirs, error)


def _decoder(flags: argparse.Namespace, device: str, scratch: Path) -> Iterator[Part]:
    config = AutoencoderDC()
    fields = {name: value for name, value in vars(config).items() if name != "dtype"}
    module = None
    if flags.against:
        folder, module = _weights("vae", fields, scratch)
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
            theirs = reference.decoder_arms(module, latents, device, flags.dtype, flags.mode)
        yield Part("decoder", batch, ours, seconds, theirs)


def _pipeline(flags: argparse.Namespace, device: str) -> Iterator[Part]:
    pipe = SprintPipeline.from_pretrained(flags.model, jnp.dtype(flags.dtype))
    others = {}
    if flags.against:
        text = not {"text", "whole"}.isdisjoint(flags.parts)
        others = reference.load_pipelines(flags.model, device, flags.dtype, flags.mode, text)
    height, width = flags.image
    for batch in flags.batch:
        prompts = [f"a photo of {number} birds on a wire" for number in range(1, batch + 1)]
        if "transformer" in flags.parts:
            yield _one_step(pipe, others, batch, flags, device)
        if "decoder" in flags.parts:
            shape = (batch, *pipe.latent_shape(height, width))
            latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            arms = reference.decoder_calls(others, latents, device, flags.dtype)
            scaled = jnp.asarray(latents * pipe.autoencoder.config.scaling_factor)
            call = waiting(pipe.autoencoder.decode, scaled)
            yield Part("decoder", batch, call, first_call(call), arms)
        if "text" in flags.parts:
            call = waiting(pipe.encode_text, prompts)
            arms = {}
            if others:  # compiled, the text encoder is the same
                arms[reference.EAGER] = reference.text_call(others[reference.EAGER], prompts)
            yield Part("text", batch, call, first_call(call), arms, None)
        for count in flags.steps if "whole" in flags.parts else ():
            how = dict(steps=count, height=height, width=width)
            call = waiting(pipe, prompts, **how, batch_size=batch)
            arms = {a: reference.whole_call(p, prompts, **how) for a, p in others.items()}
            yield Part(f"whole, {count} steps", batch, call, first_call(call), arms, None)
        if "control" in flags.parts:
            yield from _along_a_sketch(with_new_branch(pipe), prompts, batch, flags)


def with_new_branch(pipe: SprintPipeline) -> SprintPipeline:
    """The pipeline with a control branch as training begins it, which draws what the trunk does.

    Raises:
      UserError: it has one block, and nothing behind it to steer.
    """
    blocks = min(PUBLISHED_BLOCKS, pipe.model.num_layers - 1)
    if not blocks:
        raise UserError("--parts control: a network of one block can have no branch", exit_code=2)
    branch = new_branch(pipe.params, blocks, "nvlabs")
    names = ("is_student", "sigma_d", "shift", "midpoint", "guidance", "size", "integer_times")
    return SprintPipeline(
        pipe.model.clone(control_blocks=blocks, control_wiring="nvlabs"),
        pipe.params | {"control": branch},
        pipe.autoencoder,
        pipe.text_encoder,
        arranged=pipe.sampler.arranged,
        **{name: getattr(pipe, name) for name in names},
    )


def _along_a_sketch(pipe, prompts: list[str], batch: int, flags) -> Iterator[Part]:
    """Prompts and one sketch to pictures: with another sketch in every call, and with a remembered one."""
    height, width = flags.image
    sketch, numbers = np.zeros((1, height, width, 3), np.uint8), itertools.count()

    def draw(steps, changed):
        if changed:
            sketch[0, 0] = np.random.default_rng(next(numbers)).integers(0, 256, (width, 3))
        how = dict(steps=steps, height=height, width=width, batch_size=batch)
        return pipe(prompts, control=sketch, **how)

    for count in flags.steps:
        for name, changed in (("control", True), ("control remembered", False)):
            call = waiting(draw, count, changed)
            yield Part(f"{name}, {count} steps", batch, call, first_call(call), {}, None)


def _one_step(pipe, others: dict, batch: int, flags: argparse.Namespace, device: str) -> Part:
    """A student's step from noise to latents, beside diffusers' network on the same input."""
    fields = {name: getattr(pipe.model, name) for name in ("in_channels", "caption_channels")}
    inputs = network_inputs(fields, batch, *flags.image)
    noise, sees = jnp.asarray(inputs["x"]), {}

    def latents(velocity):
        """The step's result for a network that returns ``velocity`` whatever it sees."""

        def network(x, t):
            sees.update(x=np.asarray(x), t=np.asarray(t))
            return velocity

        how = dict(steps=1, midpoint=pipe.midpoint, sigma_d=pipe.sigma_d)
        with jax.disable_jit():  # a scan would show the network tracers
            return sampling.draw_student(to_trigflow(network), noise, **how)

    def error(ours, theirs):
        velocity = theirs.float().cpu().permute(0, 2, 3, 1).numpy()
        wanted = np.asarray(latents(jnp.asarray(velocity)), np.float64)
        return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))

    latents(noise)
    arrays = jax.device_put([inputs[name] for name in ("text", "mask")])
    # None is drawn for one step, and the call without it would draw noise to leave it.
    how = dict(steps=1, guidance=10 * inputs["guidance"], step_noise=noise[None][:0])
    call = waiting(pipe.denoise, *arrays, noise, **how)
    arms = reference.forward_calls(others, inputs | sees, device, flags.dtype)
    return Part("transformer", batch, call, first_call(call), arms, error)
