"""Layers of the linear DiT: norms, embeddings, the two attentions and the convolutional MLP.

Channels-last throughout: image tokens are [B, h, w, d], text tokens [B, L, d]. Parameters are
float32; ``dtype`` is that of matmul inputs and of the residual stream. Norms, sinusoids, the time
embedding, softmax and the linear-attention core are float32 (or wider, if the inputs are) whatever
``dtype`` says, on every device (`precision`). Module names are the weight names of diffusers'
SanaTransformer2DModel.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from .depthwise import depthwise_conv3x3
from .precision import dot_general, einsum, is_quantized

Array = jax.Array
Dtype = Any

xavier = nn.initializers.xavier_uniform()
small_normal = nn.initializers.normal(0.02)


def wide(x: Array) -> Array:
    """``x`` in float32, or unchanged if it is wider already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def layer_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """Layer norm over the last axis without weights; float32 result."""
    x = wide(x)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """``x (1 + scale) + shift`` with ``shift, scale`` [B, d] and ``x`` [B, h, w, d]."""
    return x * (1 + scale[:, None, None]) + shift[:, None, None]


class Linear(nn.Dense):
    """`nn.Dense` that sees its input as a matrix [rows, in], at `precision.precision_of` its operands.

    Contracting three leading axes at once, as the gradient of a [B, h, w, d] Dense does, leaves XLA's
    fast matmul on CPU: a d to 5d projection with SiLU took 12 ms instead of 2.5. TPU and GPU programs
    are the same either way.
    """

    dot_general: Any = dot_general

    def __call__(self, x: Array) -> Array:
        rows, kernel = x.reshape(-1, x.shape[-1]), self.get_variable("params", "kernel")
        if is_quantized(kernel):  # which Dense would take for an array
            y = dot_general(rows.astype(self.dtype), kernel, (((1,), (0,)), ((), ())))
            y = y + self.get_variable("params", "bias") if self.use_bias else y
        else:
            y = super().__call__(rows)
        return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full last axis (all heads together), float32 inside."""

    dtype: Dtype
    epsilon: float = 1e-5
    initial: float = 1.0
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.constant(self.initial), (x.shape[-1],))
        x = wide(x)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        x = x * jnp.broadcast_to(weight, x.shape)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            x = x + jnp.broadcast_to(bias, x.shape)
        return x.astype(self.dtype)


def sinusoid(t: Array, channels: int = 256, max_period: float = 10000.0) -> Array:
    """Sinusoidal embedding ``[cos(t f) | sin(t f)]`` of scalars ``t`` [B]; float32 [B, channels]."""
    half = channels // 2
    frequencies = np.exp(-math.log(max_period) * np.arange(half) / half)
    angles = wide(t)[:, None] * jnp.asarray(frequencies, wide(t).dtype)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_positions(
    height: int, width: int, channels: int, base: int, interpolation: float
) -> np.ndarray:
    """2-D sine-cosine positions [height, width, channels] as diffusers' ``get_2d_sincos_pos_embed``.

    Positions are rescaled so that any grid spans ``base / interpolation``. The first half of the
    channels encodes the column, the second the row, each as ``[sin | cos]``.
    """

    def encode(positions: np.ndarray) -> np.ndarray:
        quarter = channels // 4
        frequencies = 1.0 / 10000.0 ** (np.arange(quarter) / quarter)
        angles = positions[..., None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows = np.arange(height) / (height / base) / interpolation
    columns = np.arange(width) / (width / base) / interpolation
    columns, rows = np.meshgrid(columns, rows)
    return np.concatenate([encode(columns), encode(rows)], axis=-1).astype(np.float32)


class ScalarEmbedder(nn.Module):
    """Sinusoid and a two-layer MLP: scalars [B] to [B, features], float32."""

    features: int
    zero_init: bool = False

    @nn.compact
    def __call__(self, t: Array) -> Array:
        last = nn.initializers.zeros if self.zero_init else small_normal
        x = Linear(self.features, kernel_init=small_normal, name="linear_1")(sinusoid(t))
        return Linear(self.features, kernel_init=last, name="linear_2")(nn.silu(x))


class TimeEmbedding(nn.Module):
    """AdaLN-single conditioning: flow time, optional guidance and target time to ``(e [B, d], t6 [B, 6, d])``.

    Only the last layer of a new embedder of guidance or target time is zero: the student begins as the teacher
    and can learn to depend on them. With both layers zero, as in one reference, every gradient but that of
    the last bias is exactly 0.
    """

    features: int
    guidance_embeds: bool
    flow_map: bool = False

    @nn.compact
    def __call__(
        self, t: Array, guidance: Array | None, target: Array | None = None
    ) -> tuple[Array, Array]:
        embedding = ScalarEmbedder(self.features, name="timestep_embedder")(t)
        if self.guidance_embeds:
            embedder = ScalarEmbedder(self.features, zero_init=True, name="guidance_embedder")
            embedding += embedder(guidance)
        if self.flow_map:  # named as in diffusers' flow maps (Flux3Transformer2DModel)
            embedder = ScalarEmbedder(
                self.features, zero_init=True, name="target_timestep_embedder"
            )
            embedding += embedder(target)
        linear = Linear(6 * self.features, kernel_init=small_normal, name="linear")
        return embedding, rearrange(linear(nn.silu(embedding)), "b (r d) -> b r d", r=6)


class CaptionProjection(nn.Module):
    """Text features [B, L, caption_channels] to [B, L, features]: Linear, tanh-GELU, Linear."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, text: Array) -> Array:
        x = Linear(self.features, dtype=self.dtype, kernel_init=small_normal, name="linear_1")(text)
        x = nn.gelu(x, approximate=True)
        return Linear(self.features, dtype=self.dtype, kernel_init=small_normal, name="linear_2")(x)


def linear_attention(q: Array, k: Array, v: Array) -> Array:
    """ReLU linear attention per head, ``q (k^T v) / (q sum(k))`` with ``q, k >= 0``; float32 or wider.

    No score scaling and no mask. It is less than 1 % of a transformer's FLOPs.

    Args:
      q, k, v: [B, tokens, heads, c], before the ReLU of q and k.

    Returns:
      [B, tokens, heads, c].
    """
    q, k, v = nn.relu(wide(q)), nn.relu(wide(k)), wide(v)
    state = einsum("btnc,btnd->bncd", k, v)
    numerator = einsum("btnc,bncd->btnd", q, state)
    denominator = einsum("btnc,bnc->btn", q, k.sum(1))
    return numerator / (denominator[..., None] + 1e-15)


class LinearAttention(nn.Module):
    """Self-attention of image tokens [B, h, w, d] by `linear_attention`, a sum over all tokens."""

    features: int
    heads: int
    qk_norm: bool
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        linear = functools.partial(Linear, self.features, dtype=self.dtype, kernel_init=xavier)
        q, k, v = (
            linear(use_bias=self.use_bias, name=name)(x) for name in ("to_q", "to_k", "to_v")
        )
        if self.qk_norm:
            q = RMSNorm(self.dtype, name="norm_q")(q)
            k = RMSNorm(self.dtype, name="norm_k")(k)
        q, k, v = (rearrange(a, "b h w (n c) -> b (h w) n c", n=self.heads) for a in (q, k, v))
        out = linear_attention(q, k, v).reshape(x.shape).astype(self.dtype)
        return linear(name="to_out_0")(out)


class CrossAttention(nn.Module):
    """Softmax attention from image tokens [B, h, w, d] to text [B, L, d], mask [B, L] (1 keeps)."""

    features: int
    heads: int
    qk_norm: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, text: Array, mask: Array) -> Array:
        def project(name, init=xavier):
            return Linear(self.features, dtype=self.dtype, kernel_init=init, name=name)

        q, k, v = project("to_q")(x), project("to_k")(text), project("to_v")(text)
        if self.qk_norm:
            q = RMSNorm(self.dtype, name="norm_q")(q)
            k = RMSNorm(self.dtype, name="norm_k")(k)
        q = rearrange(q, "b h w (n c) -> b (h w) n c", n=self.heads)
        k, v = (rearrange(a, "b l (n c) -> b l n c", n=self.heads) for a in (k, v))
        scores = einsum("btnc,blnc->bntl", q, k, preferred_element_type=wide(q).dtype)
        bias = (1 - mask.astype(scores.dtype)) * -10000.0
        scores = scores * q.shape[-1] ** -0.5 + bias[:, None, None]
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        out = einsum("bntl,blnc->btnc", weights, v).reshape(x.shape)
        return project("to_out_0", nn.initializers.zeros)(out)


class GLUMBConv(nn.Module):
    """Gated convolutional MLP: 1x1 to 2h, SiLU, depthwise 3x3, value times SiLU(gate), 1x1 back.

    The first half of the depthwise output is the value, the second the gate; or of each of ``groups``
    parts of it, for weights regrouped by `parallel.sharding.Partition.gather`.
    """

    features: int
    hidden: int
    dtype: Dtype
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        linear = functools.partial(Linear, dtype=self.dtype, kernel_init=xavier)
        x = linear(2 * self.hidden, name="conv_inverted")(x)
        x = DepthwiseConv(2 * self.hidden, self.dtype, name="conv_depth")(nn.silu(x))
        if self.groups == 1:
            value, gate = jnp.split(x, 2, axis=-1)
        else:
            x = rearrange(x, "b h w (n two c) -> two b h w (n c)", n=self.groups, two=2)
            value, gate = x[0], x[1]
        return linear(self.features, use_bias=False, name="conv_point")(value * nn.silu(gate))


class PatchEmbed(nn.Module):
    """A convolution with stride and kernel ``p``, written as a Dense over patches [B, h, w, p p C]."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        return Linear(self.features, dtype=self.dtype, kernel_init=xavier, name="proj")(patches)


class DepthwiseConv(nn.Module):
    """The parameters of `depthwise_conv3x3`: kernel [3, 3, features] and bias [features]."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # A uniform bound of 1/sqrt(fan_in) with fan_in 9: torch's default for this layer.
        scaling = nn.initializers.variance_scaling
        init = scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1), out_axis=2)
        kernel = self.param("kernel", init, (3, 3, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return depthwise_conv3x3(x, kernel.astype(self.dtype), bias.astype(self.dtype))
