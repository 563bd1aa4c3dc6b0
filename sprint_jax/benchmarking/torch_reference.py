"""Diffusers' networks to compare with, on random weights or those of a folder, eager and compiled by torch.

Torch and diffusers are imported when a function here is called, never by importing this module.
Functions take arrays in our layout, channels last, and return tensors in theirs.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..core.errors import UserError
from ..interop import files
from ..interop.sana import sana_table
from ..models.blocks import stack
from .timing import Waiting

EAGER, COMPILED, CHANNELS_LAST = "diffusers", "diffusers compiled", "diffusers channels last"
CLASSES = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC"}  # by folder


def import_torch() -> Any:
    """Returns the module torch.

    Raises:
      UserError: torch or diffusers is not installed.
    """
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        raise UserError(
            f"--against diffusers needs {error.name}: pip install -e .[parity]", exit_code=2
        ) from None
    return torch


def save_random(folder: Path, part: str, config: dict) -> None:
    """Writes ``folder / part``, a key of `CLASSES`, with random weights that diffusers draws."""
    import_torch().manual_seed(0)
    import diffusers

    getattr(diffusers, CLASSES[part]).from_config(config).save_pretrained(folder / part)


def load_module(folder: Path, part: str) -> Any:
    """Loads a part of a pipeline folder, a key of `CLASSES`."""
    import_torch()
    import diffusers

    return getattr(diffusers, CLASSES[part]).from_pretrained(folder, subfolder=part).eval()


def decoder_arms(model, latents, device: str, dtype: str, mode: str | None) -> dict:
    """Returns {arm: call} of an AutoencoderDC's decoder on latents [B, h, w, C], not scaled.

    Args:
      mode: of `compile_module`; None leaves the compiled arm out.
    """
    torch = import_torch()
    decoder = model.decoder.to(device, getattr(torch, dtype))
    decoders = {EAGER: decoder}
    if mode:
        decoders[COMPILED] = compile_module(decoder, device, mode)
    return _decoder_calls(decoders, latents, device, dtype)


def decoder_calls(pipelines: dict[str, Any], latents, device: str, dtype: str) -> dict:
    """Returns {arm: call} of the decoders of `load_pipelines` on latents [B, h, w, C], not scaled."""
    decoders = {arm: pipeline.vae.decoder for arm, pipeline in pipelines.items()}
    return _decoder_calls(decoders, latents, device, dtype)


def _decoder_calls(decoders: dict[str, Any], latents, device: str, dtype: str) -> dict:
    """Calls of decoders, and of the eager one with channels last."""
    if not decoders:
        return {}
    torch = import_torch()
    first = to_torch(latents, device, dtype)
    arms = {arm: (decoder, first) for arm, decoder in decoders.items()}
    last = copy.deepcopy(decoders[EAGER]).to(memory_format=torch.channels_last)
    arms[CHANNELS_LAST] = last, first.to(memory_format=torch.channels_last)
    return {arm: _inference(*call, device=device) for arm, call in arms.items()}


def load_pipelines(
    folder: str, device: str, dtype: str, mode: str | None, text: bool = True
) -> dict[str, Any]:
    """Loads a folder's SanaSprintPipeline, {arm: pipeline}; the compiled one has the same weights.

    Args:
      mode: of `compile_module`; None leaves the compiled arm out.
      text: with its text encoder and tokenizer.
    """
    torch = import_torch()
    import diffusers

    kind = diffusers.SanaSprintPipeline
    without = {} if text else dict(text_encoder=None, tokenizer=None)
    eager = kind.from_pretrained(folder, torch_dtype=getattr(torch, dtype), **without).to(device)
    found = {EAGER: eager}
    if mode:
        vae = copy.deepcopy(eager.vae)
        vae.decoder = compile_module(vae.decoder, device, mode)
        transformer = compile_module(eager.transformer, device, mode)
        found[COMPILED] = kind(**(eager.components | dict(vae=vae, transformer=transformer)))
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


def text_call(pipeline, prompts: list[str]) -> Callable:
    """Returns a call that encodes prompts behind the pipeline's usual instruction."""
    default = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    encode = functools.partial(pipeline.encode_prompt, complex_human_instruction=default)
    return _inference(encode, prompts, device=pipeline.device.type)


def whole_call(pipeline, prompts: list[str], steps: int, height: int, width: int) -> Callable:
    """Returns a call from prompts to pictures."""
    how = dict(num_inference_steps=steps, height=height, width=width)
    how["use_resolution_binning"] = False
    if steps != 2:
        how["intermediate_timesteps"] = None
    return _inference(pipeline, prompts, device=pipeline.device.type, **how)


def to_torch(array, device: str = "cpu", dtype: str = "float32") -> Any:
    """An array [B, h, w, C] as a contiguous tensor [B, C, h, w]; others as they are, times in float32."""
    torch = import_torch()
    tensor = torch.tensor(np.asarray(array), device=device)
    if tensor.ndim == 4:
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    is_cast = tensor.is_floating_point() and tensor.ndim > 1
    return tensor.to(getattr(torch, dtype)) if is_cast else tensor


def compile_module(module, device: str, mode: str) -> Any:
    """Compiles a module as torch's users do: whole and in this mode on a GPU, by default on a CPU."""
    how = {} if device == "cpu" else dict(mode=mode, fullgraph=True)
    return import_torch().compile(module, **how)


def waiting(call: Callable, device: str) -> Waiting:
    """Returns ``call``, but returning when its work is done; on a CPU it is then anyway."""

    def wait(out):
        if device != "cpu":
            import_torch().cuda.synchronize()
        return out

    return Waiting(call, wait)


def _inference(function: Callable, *arguments, device: str, **keywords) -> Callable:
    """Returns a call of a function without gradients that waits for its result."""
    torch = import_torch()

    def call():
        with torch.no_grad():
            return function(*arguments, **keywords)

    return waiting(call, device)


def transformer_arms(model, inputs: dict, device: str, dtype: str, mode: str | None) -> dict:
    """Returns {arm: {workload: call}} of a SanaTransformer2DModel, see `workloads.network_calls`.

    Through `torch.compile` there is no JVP: in the sCM branch it stays eager.
    """
    torch = import_torch()
    model = model.to(device, getattr(torch, dtype))
    given = {key: to_torch(value, device, dtype) for key, value in inputs.items()}
    arms = {EAGER: network_calls(model, model, given)}
    if mode:
        arms[COMPILED] = network_calls(model, compile_module(model, device, mode), given)
        del arms[COMPILED]["jvp"]
    return {
        arm: {name: waiting(call, device) for name, call in calls.items()}
        for arm, calls in arms.items()
    }


def forward_calls(pipelines: dict[str, Any], inputs: dict, device: str, dtype: str) -> dict:
    """Returns {arm: call} of the forward pass of the transformers of `load_pipelines`."""
    found = {}
    for arm, pipeline in pipelines.items():
        given = {key: to_torch(value, device, dtype) for key, value in inputs.items()}
        call = network_calls(pipeline.transformer, pipeline.transformer, given)["forward"]
        found[arm] = waiting(call, device)
    return found


def network_calls(model, network, inputs: dict) -> dict[str, Callable]:
    """Returns {workload: call} of a model and the form of it that computes all but JVPs.

    A gradient is that by torch's names. 'scm' is as published: a JVP without gradients, then forward and
    backward; the formula is that of `losses.scm_loss` for a log variance of 0, ``sigma_d`` 1, warm-up 1 and
    ``dx`` as the teacher's velocity.
    """
    torch = import_torch()
    x, dx, t, dt = (inputs[key] for key in ("x", "dx", "t", "dt"))

    def velocity(network, x, t):
        text, mask, guidance = (inputs[key] for key in ("text", "mask", "guidance"))
        return network(x, text, t, guidance, mask, return_dict=False)[0]

    def forward():
        with torch.no_grad():
            return velocity(network, x, t)

    def derivative(tangents):
        # The fused attention has no forward-mode derivative.
        plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch.no_grad(), plain:
            return torch.func.jvp(functools.partial(velocity, model), (x, t), tangents)

    def with_gradient(loss):
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), {name: leaf.grad for name, leaf in model.named_parameters()}

    def backward():
        return with_gradient((velocity(network, x, t) - inputs["target"]).square().mean())

    def scm():
        cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
        fixed, tangent = derivative((cos * sin * dx, t.cos() * t.sin()))
        g = -(cos**2) * (fixed - dx) - (cos * sin * x + tangent)
        g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 0.1)
        error = velocity(network, x, t) - fixed - g
        return with_gradient((error.square().flatten(1).mean(1) / t.tan()).mean())

    def jvp():
        return derivative((dx, dt))

    return {"forward": forward, "jvp": jvp, "backward": backward, "scm": scm}


def network_error(fields: dict, ours: Any, theirs: Any) -> float:
    """Relative error of a workload's result: an output, two of a JVP, or a loss and its gradient.

    A gradient is compared over all parameters together.
    """
    if isinstance(ours, jax.Array):
        return relative_error(ours, theirs)
    if not isinstance(theirs[1], dict):
        return max(map(relative_error, ours, theirs))
    blocks = stack(ours[1]["transformer_blocks"])
    gradient, distance, size = ours[1] | {"transformer_blocks": blocks}, 0.0, 0.0
    for name, entry in sana_table(fields).items():
        other = theirs[1][name].float().cpu().numpy()
        distance += float(np.square(files.to_torch(gradient, entry) - other).sum())
        size += float(np.square(other).sum())
    return max((distance / size) ** 0.5, relative_error(ours[0], theirs[0]))


def relative_error(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|, Euclidean, of an array and a tensor (see `to_torch`)."""
    theirs = theirs.detach().double().cpu()
    theirs = (theirs.permute(0, 2, 3, 1) if theirs.ndim == 4 else theirs).numpy()
    ours = np.asarray(ours, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
