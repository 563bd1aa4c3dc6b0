"""Diffusers' networks to compare with, on random weights or those of a folder, eager and compiled by torch.

Torch and diffusers are imported when a function here is called, never by importing this module.
Functions take and return NumPy arrays in our layout, channels last.
"""

import contextlib
import copy
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..interop import files
from ..interop.diffusers import load_autoencoder, load_transformer
from ..interop.sana import config_from_fields, sana_table
from ..models.dc_ae import AutoencoderDC

EAGER, COMPILED, CHANNELS_LAST = "diffusers", "diffusers compiled", "diffusers channels last"


def import_torch() -> Any:
    """The module torch.

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


def make_transformer(fields: dict, dtype: Any = np.float32) -> tuple[Any, Any]:
    """Diffusers' SanaTransformer2DModel with random weights and ours with the same, by way of a folder.

    Args:
      fields: of SanaTransformer; dtype: of our parameters.

    Returns:
      ``(model in float32 on the CPU, params)``.
    """
    torch = import_torch()
    import diffusers

    torch.manual_seed(0)
    config = config_from_fields(fields)
    model = diffusers.SanaTransformer2DModel.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, load_transformer(folder, dtype)[1]


def make_autoencoder(dtype: Any = np.float32) -> tuple[Any, AutoencoderDC, Any]:
    """Diffusers' AutoencoderDC of SANA with random weights, and ours: ``(model, autoencoder, params)``."""
    torch = import_torch()
    import diffusers

    torch.manual_seed(0)
    config = {name: getattr(AutoencoderDC(), name) for name in AutoencoderDC.__dataclass_fields__}
    del config["dtype"]
    model = diffusers.AutoencoderDC(**config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, *load_autoencoder(Path(folder), dtype)


def load_module(folder: str, part: str) -> Any:
    """Loads diffusers' ``transformer`` or ``vae`` of a pipeline folder."""
    import_torch()
    import diffusers

    kinds = {"transformer": diffusers.SanaTransformer2DModel, "vae": diffusers.AutoencoderDC}
    return kinds[part].from_pretrained(folder, subfolder=part).eval()


def decoder_arms(model, latents, device: str, dtype: str, torch_compile: bool) -> dict:
    """{arm: call} of an AutoencoderDC's decoder on latents [B, h, w, C], not scaled."""
    torch = import_torch()
    decoder = model.decoder.to(device, getattr(torch, dtype))
    first = to_torch(latents, device, dtype)

    def arm(network, z):
        def decode():
            with torch.no_grad():
                return network(z)

        return waiting(decode, device)

    arms = {EAGER: arm(decoder, first)}
    if torch_compile:
        arms[COMPILED] = arm(compiler(device)(decoder), first)
    last = copy.deepcopy(decoder).to(memory_format=torch.channels_last)
    arms[CHANNELS_LAST] = arm(last, first.to(memory_format=torch.channels_last))
    return arms


class PipelineArms:
    """SanaSprintPipeline of a folder: its prompts' features, and its pictures."""

    def __init__(self, folder: str, device: str, dtype: str):
        torch = import_torch()
        import diffusers

        self.device = device
        self.pipeline = diffusers.SanaSprintPipeline.from_pretrained(
            folder, torch_dtype=getattr(torch, dtype)
        ).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def compiled(self) -> "PipelineArms":
        """The same with transformer and decoder compiled, on the same weights."""
        other = copy.copy(self)
        compile_module = compiler(self.device)
        parts = dict(self.pipeline.components)
        parts["transformer"] = compile_module(parts["transformer"])
        parts["vae"] = copy.copy(parts["vae"])
        parts["vae"]._modules = dict(parts["vae"]._modules)  # the copy shares it otherwise
        parts["vae"].decoder = compile_module(parts["vae"].decoder)
        other.pipeline = type(self.pipeline)(**parts)
        other.pipeline.set_progress_bar_config(disable=True)
        return other

    def text(self, prompts: list[str]) -> Callable:
        """A call that encodes prompts behind the pipeline's usual instruction."""
        torch = import_torch()
        default = inspect.signature(self.pipeline.__call__).parameters
        instruction = default["complex_human_instruction"].default

        def encode():
            with torch.no_grad():
                return self.pipeline.encode_prompt(prompts, complex_human_instruction=instruction)

        return waiting(encode, self.device)

    def whole(self, prompts: list[str], steps: int, height: int, width: int) -> Callable:
        """A call from prompts to pictures."""
        how = dict(num_inference_steps=steps, height=height, width=width)
        how["use_resolution_binning"] = False
        if steps != 2:
            how["intermediate_timesteps"] = None
        return waiting(lambda: self.pipeline(prompts, **how).images, self.device)


def to_torch(array, device: str = "cpu", dtype: str | None = None) -> Any:
    """An array [B, h, w, C] as a contiguous tensor [B, C, h, w]; others as they are, times in float32."""
    torch = import_torch()
    tensor = torch.tensor(np.asarray(array), device=device)
    if tensor.ndim == 4:
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    if dtype is None or not tensor.is_floating_point() or tensor.ndim == 1:
        return tensor
    return tensor.to(getattr(torch, dtype))


def to_numpy(tensor) -> np.ndarray:
    """The inverse of `to_torch`, float32."""
    tensor = tensor.detach().float().cpu()
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).numpy()


def waiting(call: Callable, device: str) -> Callable:
    """``call``, but returning when its work is done; on a CPU it is then anyway."""
    if device == "cpu":
        return call
    torch = import_torch()

    def wait():
        out = call()
        torch.cuda.synchronize()
        return out

    return wait


def compiler(device: str) -> Callable:
    """`torch.compile` as its users set it: at its best on a GPU, at its default on a CPU."""
    torch = import_torch()
    if device == "cpu":
        return torch.compile
    return lambda model: torch.compile(model, mode="max-autotune", fullgraph=True)


class TransformerArms:
    """Forward, JVP, gradient and sCM branch of a SanaTransformer2DModel on fixed inputs.

    The methods named as workloads return tensors; those of gradients leave these in the parameters'
    ``grad`` and return the loss. Through `torch.compile` there is no JVP: in the sCM branch it stays eager.
    """

    def __init__(self, model, inputs: dict[str, np.ndarray], device: str = "cpu", dtype=None):
        self.torch, self.device, self.is_compiled = import_torch(), device, False
        self.model = model.to(device, None if dtype is None else getattr(self.torch, dtype))
        self.network = self.model
        self.inputs = {key: to_torch(value, device, dtype) for key, value in inputs.items()}

    def compiled(self) -> "TransformerArms":
        """The same model and inputs, through `torch.compile`."""
        arms = copy.copy(self)
        arms.network, arms.is_compiled = compiler(self.device)(self.model), True
        return arms

    def workloads(self, names: Iterable[str]) -> dict[str, Callable]:
        """Those of the named workloads that there are, as calls that wait for their result."""
        names = [name for name in names if not (self.is_compiled and name == "jvp")]
        return {name: waiting(getattr(self, name), self.device) for name in names}

    def velocity(self, network, x, t):
        text, mask, guidance = (self.inputs[key] for key in ("text", "mask", "guidance"))
        return network(x, text, t, guidance, mask, return_dict=False)[0]

    def derivative(self, tangents):
        with self.torch.no_grad(), plain_attention(self.model):
            call = functools.partial(self.velocity, self.model)
            return self.torch.func.jvp(call, (self.inputs["x"], self.inputs["t"]), tangents)

    def forward(self):
        with self.torch.no_grad():
            return self.velocity(self.network, self.inputs["x"], self.inputs["t"])

    def jvp(self):
        """Output and its derivative along ``dx, dt``."""
        return self.derivative((self.inputs["dx"], self.inputs["dt"]))

    def backward(self):
        """Mean squared distance to ``target`` and its gradient."""
        self.model.zero_grad(set_to_none=True)
        out = self.velocity(self.network, self.inputs["x"], self.inputs["t"])
        loss = (out - self.inputs["target"]).square().mean()
        loss.backward()
        return loss.detach()

    def scm(self):
        """The sCM loss and its gradient as published: a JVP without gradients, then forward and backward.

        The formula is that of `losses.scm_loss` for a log variance of 0, ``sigma_d`` 1, warm-up 1 and
        ``dx`` as the teacher's velocity.
        """
        x, dx, t = (self.inputs[key] for key in ("x", "dx", "t"))
        cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
        self.model.zero_grad(set_to_none=True)
        fixed, derivative = self.derivative((cos * sin * dx, t.cos() * t.sin()))
        g = -(cos**2) * (fixed - dx) - (cos * sin * x + derivative)
        g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 0.1)
        out = self.velocity(self.network, x, t)
        error = (out - fixed - g).square().flatten(1).mean(1) / t.tan()
        loss = error.mean()
        loss.backward()
        return loss.detach()

    def gradient(self) -> dict[str, np.ndarray]:
        """The gradient that the last call left, by torch's names."""
        return {
            name: parameter.grad.float().cpu().numpy()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }


@contextlib.contextmanager
def plain_attention(model):
    """Cross-attention written out meanwhile: torch's fused one has no forward-mode derivative."""
    blocks = model.transformer_blocks
    fused = [block.attn2.processor for block in blocks]
    for block in blocks:
        block.attn2.processor = _plain_cross_attention
    try:
        yield
    finally:
        for block, processor in zip(blocks, fused, strict=True):
            block.attn2.processor = processor


def _plain_cross_attention(attn, hidden_states, encoder_hidden_states, attention_mask=None):
    query = attn.to_q(hidden_states)
    key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
    if attn.norm_q is not None:
        query, key = attn.norm_q(query), attn.norm_k(key)
    query, key, value = (
        a.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for a in (query, key, value)
    )
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if attention_mask is not None:
        scores = scores + attention_mask[:, None]
    out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return attn.to_out[0](out)


def gradient_error(fields: dict, ours: Any, theirs: dict[str, np.ndarray]) -> float:
    """Relative L2 distance of our gradient tree from theirs, over all parameters together."""
    distance = size = 0.0
    for name, entry in sana_table(fields).items():
        distance += float(np.square(files.to_torch(ours, entry) - theirs[name]).sum())
        size += float(np.square(theirs[name]).sum())
    return (distance / size) ** 0.5


def relative_error(ours, theirs) -> float:
    """|ours - theirs| / |theirs|, Euclidean, of an array and a tensor (see `to_torch`)."""
    ours, theirs = np.asarray(ours, np.float64), to_numpy(theirs).astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
