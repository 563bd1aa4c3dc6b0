"""FLOPs of single instructions: matrix products and convolutions, of XLA and of NVIDIA's libraries."""

import functools
import math
import re

import numpy as np

from .hlo import Array, Instruction

# Custom calls of GPU programs into cuBLAS and cuDNN. The arrays of a convolution, as (operands..., result): a
# gradient keeps the window and the dim_labels of its forward convolution.
MATMULS = ("__cublas$", "__triton_gemm")
CONVOLUTIONS = {
    "__cudnn$convForward": ("image", "kernel", "result"),
    "__cudnn$convForwardGraph": ("image", "kernel", "result"),
    "__cudnn$convBiasActivationForward": ("image", "kernel", "result"),
    "__cudnn$convBackwardInput": ("result", "kernel", "image"),
    "__cudnn$convBackwardFilter": ("image", "result", "kernel"),
}


def flops_of(it: Instruction, operands: list[Array]) -> tuple[float, str]:
    """FLOPs of one instruction by itself, and the name of its `jax.lax.Precision`; 0 for most.

    Of a custom call without a name above they are those of the cost estimate that a Pallas kernel may carry.
    """
    precision = it.attribute(r"operand_precision=\{(\w+)") or "default"
    if it.opcode == "dot":
        return dot_flops(it, operands[0]), precision
    if it.opcode == "convolution":
        return convolution_flops(it, *operands[:2], it.arrays[0]), precision
    if it.opcode != "custom-call":
        return 0.0, precision
    precision = (it.attribute(r'"operand_precision":\["(\w+)"') or precision).lower()
    if it.target.startswith(MATMULS):
        axes = it.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
        contracted = math.prod(operands[0].dims[axis] for axis in _numbers(axes))
        return 2.0 * math.prod(it.arrays[0].dims) * contracted, precision
    if it.target.startswith(
        "__cudnn$fmha"
    ):  # attention, forward: [B, T, heads, c] to [B, L, heads, c]
        return 4.0 * math.prod(operands[0].dims) * operands[1].dims[1], precision
    if it.target in CONVOLUTIONS:
        names = CONVOLUTIONS[it.target]
        arrays = dict(zip(names, [*operands[:2], it.arrays[0]], strict=True))
        return convolution_flops(it, **arrays), precision
    return float(it.attribute(r'"flops":"?(\d+)') or 0), precision


def dot_flops(it: Instruction, left: Array) -> float:
    """2 per multiply-add of a dot."""
    axes = it.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    contracted = math.prod(left.dims[int(axis)] for axis in axes.split(",") if axis)
    return 2.0 * math.prod(it.arrays[0].dims) * contracted


def convolution_flops(it: Instruction, image: Array, kernel: Array, result: Array) -> float:
    """2 per multiply-add of a convolution, where neither padding nor a hole of dilation stands.

    TPU programs write batched products as convolutions whose padding is most of the window.
    """
    left, right, out = it.attribute(r"dim_labels=(\S+?->\w+)").replace("->", "_").split("_")
    spatial = sorted(set(right) - set("io"))
    window = dict(part.split("=") for part in (it.attribute(r"window=\{([^}]*)\}") or "").split())
    fields = [
        [int(value.split("_")[0]) for value in window[name].split("x")]
        if name in window
        else [default] * len(spatial)
        for name, default in (("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1), ("pad", 0))
    ]
    sizes = result.dims
    met = sizes[out.index("b")] * sizes[out.index("f")] * kernel.dims[right.index("i")]
    for axis, *numbers in zip(spatial, *fields, strict=True):
        lengths = (
            image.dims[left.index(axis)],
            kernel.dims[right.index(axis)],
            sizes[out.index(axis)],
        )
        met *= _met(*lengths, *numbers)
    return 2.0 * met


@functools.cache
def _met(size, kernel, out, stride, dilate, kernel_dilate, low) -> int:
    """Pairs of output and kernel positions that meet an element of the input, along one axis.

    Kernel position k meets one at output o where o * stride + k * kernel_dilate - low lies inside the dilated
    input and is a multiple of ``dilate``: at every ``period``-th output.
    """
    common = math.gcd(stride, dilate)
    period = dilate // common
    offset = low - np.arange(kernel) * kernel_dilate
    offset = offset[offset % common == 0]
    first = np.maximum(0, -(-offset // stride))
    last = np.minimum(out - 1, ((size - 1) * dilate + offset) // stride)
    first += (offset // common * pow(stride // common, -1, period) - first) % period
    return int(np.maximum(0, (last - first) // period + 1).sum())


def _numbers(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", text)]
