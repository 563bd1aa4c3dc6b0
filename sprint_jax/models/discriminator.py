"""LADD heads: small convolutional critics on the tokens of the frozen teacher's blocks.

One head per tapped block: a spectrally normalised 1x1 convolution, local batch norm and leaky ReLU;
a residual stage with a circular kernel-9 convolution along the flattened raster of tokens; and a
1x1 convolution to one logit per token (LADD, arXiv 2403.12015; layout and names of the published
heads). The vectors of the spectral norm are explicit arguments, which `update_spectral` moves in
discriminator steps only: a generator step leaves the critic as it is.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from .layers import layer_norm, wide
from .precision import einsum

Array = jax.Array


class SpectralConv1d(nn.Module):
    """A circular 1-D convolution [B, N, in] -> [B, N, features] whose kernel is divided by its norm."""

    features: int
    kernel_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, uv: dict[str, Array]) -> Array:
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1))
        kernel = self.param("kernel", init, (self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = (kernel / spectral_norm(kernel, uv)).astype(self.dtype)
        x = x.astype(self.dtype)
        # A sum of matmuls over rolled tokens: a 1-D convolution's gradient is slow on CPU, and this
        # is what a matrix unit runs anyway.
        half = self.kernel_size // 2
        rolled = (jnp.roll(x, half - i, axis=1) for i in range(self.kernel_size))
        taps = (einsum("bni,io->bno", *pair) for pair in zip(rolled, kernel, strict=True))
        return checkpoint_name(sum(taps) + bias.astype(self.dtype)[None, None], "convolution")


def spectral_norm(kernel: Array, uv: dict[str, Array]) -> Array:
    """Largest singular value of ``kernel`` [k, in, out] as a matrix [out, in k], given its vectors.

    The vectors ``u`` [out] and ``v`` [k, in] are constants: gradients reach the kernel only.
    """
    u, v = jax.lax.stop_gradient((uv["u"], uv["v"]))
    return einsum("kio,ki,o->", kernel, v, u)


def update_spectral(params, spectral, epsilon: float = 1e-12):
    """One power iteration for every kernel; the same tree of ``{'u', 'v'}`` as ``spectral``.

    Args:
      params: parameters of `DiscriminatorHeads`.
      spectral: vectors as from `init_spectral`.
    """

    def normalize(a):
        return a / jnp.maximum(jnp.sqrt(jnp.square(a).sum()), epsilon)

    def iterate(kernel, uv):
        v = normalize(einsum("kio,o->ki", kernel, uv["u"]))
        return {"u": normalize(einsum("kio,ki->o", kernel, v)), "v": v}

    params = jax.lax.stop_gradient(params)
    return {
        head: {name: iterate(params[head][name]["kernel"], uv) for name, uv in convs.items()}
        for head, convs in spectral.items()
    }


def init_spectral(params, key: Array, iterations: int = 15):
    """Random vectors for every kernel in ``params``, brought close to singular by power iterations.

    Torch starts from random vectors; the first updates would then divide by a far too small norm.
    """
    spectral: dict = {head: {} for head in params}
    kernels = (
        (h, c) for h in sorted(params) for c in sorted(params[h]) if "kernel" in params[h][c]
    )
    for i, (head, name) in enumerate(kernels):
        u, v = jax.random.split(jax.random.fold_in(key, i))
        k, inputs, outputs = params[head][name]["kernel"].shape
        spectral[head][name] = {
            "u": jax.random.normal(u, (outputs,)) / outputs**0.5,
            "v": jax.random.normal(v, (k, inputs)) / (k * inputs) ** 0.5,
        }
    for _ in range(iterations):
        spectral = update_spectral(params, spectral)
    return spectral


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of about ``group`` samples and all tokens, without running statistics.

    The batch is cut into ``ceil(B / group)`` contiguous groups whose sizes differ by at most one, the larger
    ones first, so that any batch size works; where groups divide the batch, this is the published layer.
    """

    group: int = 8
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (self.normalize(x) * weight[None, None] + bias[None, None]).astype(x.dtype)

    def normalize(self, x: Array) -> Array:
        """Tokens [B, N, d] of mean 0 and variance 1 within each group, float32."""
        groups = -(-x.shape[0] // self.group)
        size, larger = divmod(x.shape[0], groups)

        def shared(a, size):  # [n size, d] -> each row's mean over its group of ``size``
            mean = a.reshape(-1, size, a.shape[-1]).mean(1, keepdims=True)
            return jnp.broadcast_to(mean, (len(mean), size, a.shape[-1])).reshape(a.shape)

        def group_mean(a):  # [B, N, d] -> each sample's group mean [B, 1, d]
            first, rest = jnp.split(a.mean(1), [larger * (size + 1)])
            parts = [shared(first, size + 1)] if larger else []
            return jnp.concatenate([*parts, shared(rest, size)])[:, None]

        x = wide(x)
        x = x - group_mean(x)
        return x * jax.lax.rsqrt(group_mean(jnp.square(x)) + self.epsilon)


class TokenNorm(LocalBatchNorm):
    """Layer norm of each token, with the parameters of `LocalBatchNorm`."""

    def normalize(self, x: Array) -> Array:
        return layer_norm(x, self.epsilon)


class DiscriminatorHead(nn.Module):
    """Tokens [B, N, d] to logits [B, N]."""

    dtype: Any
    token_norm: bool
    kernel: int

    @nn.compact
    def __call__(self, x: Array, spectral: dict) -> Array:
        d = x.shape[-1]

        def stage(x, name, kernel_size):
            conv = SpectralConv1d(d, kernel_size, self.dtype, name=f"{name}_conv")
            norm = (TokenNorm if self.token_norm else LocalBatchNorm)(name=f"{name}_norm")
            return nn.leaky_relu(norm(conv(x, spectral[f"{name}_conv"])), 0.2)

        x = stage(x, "main_0", 1)
        x = (stage(x, "main_1", self.kernel) + x) / np.sqrt(2)
        return SpectralConv1d(1, 1, self.dtype, name="cls")(x, spectral["cls"])[..., 0]


class DiscriminatorHeads(nn.Module):
    """One head per feature map; logits of all heads side by side.

    Fields:
      token_norm: layer norm per token in place of the published local batch norm. Real and generated
        images are normalised in separate batches, so the batch norm removes from the logits what all
        images of a kind share; with few tokens per image little else is left.

    Args of the call:
      features: tuple of token maps [B, h, w, d], one per tapped block.
      spectral: ``{'heads_i': {'main_0_conv': {'u', 'v'}, ...}}`` as from `init_spectral`.

    Returns:
      logits [B, heads * h * w], float32.
    """

    dtype: Any = jnp.float32
    token_norm: bool = False
    kernel: int = 9

    @nn.compact
    def __call__(self, features: tuple[Array, ...], spectral: dict) -> Array:
        chex.assert_rank(features, 4)
        # The backward pass keeps the convolutions' outputs and recomputes the rest, which is cheap: nine
        # rolled copies of the tokens and float32 norms would take half a gigabyte at 1024 pixels.
        keep = jax.checkpoint_policies.save_only_these_names("convolution")
        remat_head = nn.remat(DiscriminatorHead, policy=keep)
        logits = []
        for i, feature in enumerate(features):
            tokens = feature.reshape(feature.shape[0], -1, feature.shape[-1])
            head = remat_head(self.dtype, self.token_norm, self.kernel, name=f"heads_{i}")
            logits.append(head(tokens, spectral[f"heads_{i}"]))
        return wide(jnp.concatenate(logits, axis=-1))


def init_heads(features: tuple[Array, ...], key: Array, kernel: int = 9) -> dict:
    """Returns ``{'params', 'spectral'}`` of new `DiscriminatorHeads` for feature maps of these shapes."""

    # Parameter shapes do not depend on the values of the vectors, so ones do for `init`.
    def placeholder(width):
        def uv(kernel_size, outputs):
            return {"u": jnp.ones((outputs,)), "v": jnp.ones((kernel_size, width))}

        return {"main_0_conv": uv(1, width), "main_1_conv": uv(kernel, width), "cls": uv(1, 1)}

    spectral = {f"heads_{i}": placeholder(f.shape[-1]) for i, f in enumerate(features)}
    params_key, spectral_key = jax.random.split(key)
    params = DiscriminatorHeads(kernel=kernel).init(params_key, features, spectral)["params"]
    return {"params": params, "spectral": init_spectral(params, spectral_key)}
