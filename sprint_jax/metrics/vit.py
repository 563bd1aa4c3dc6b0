"""The transformer of CLIP's two towers and of DINOv2, its blocks stacked on a leading axis and scanned."""

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """GELU by the error function."""
    return jax.nn.gelu(x, approximate=False)


class SelfAttention(nn.Module):
    """Attention of [B, L, C] to itself, with biases everywhere; softmax in float32."""

    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, width = x.shape
        q, k, v = (
            nn.Dense(width, name=f"{name}_proj")(x).reshape(batch, length, self.heads, -1)
            for name in ("q", "k", "v")
        )
        scores = jnp.einsum("bqhc,bkhc->bhqk", q * (width // self.heads) ** -0.5, k)
        if self.causal:
            seen = jnp.tril(jnp.ones((length, length), bool))
            scores = jnp.where(seen[None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(v.dtype)
        x = jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(batch, length, width)
        return nn.Dense(width, name="out_proj")(x)


class MLP(nn.Module):
    """Two layers, the hidden one four times as wide."""

    hidden: int
    act: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.Dense(self.hidden, name="fc1")(x)
        y = {"quick_gelu": quick_gelu, "gelu": gelu}[self.act](y)
        return nn.Dense(x.shape[-1], name="fc2")(y)


class Block(nn.Module):
    """Attention and MLP, each behind a norm, by a learned factor for each channel (LayerScale), and added."""

    heads: int
    hidden: int
    act: str
    epsilon: float
    causal: bool
    scaled: bool

    @nn.compact
    def __call__(self, x: Array, _) -> tuple[Array, None]:
        def add(x, y, number):
            if self.scaled:
                ones, shape = nn.initializers.ones, x.shape[-1:]
                y = y * self.param(f"layer_scale{number}", ones, shape)[None, None]
            return x + y

        def norm(x, number):
            return nn.LayerNorm(self.epsilon, name=f"layer_norm{number}", use_fast_variance=False)(
                x
            )

        x = add(x, SelfAttention(self.heads, self.causal, name="self_attn")(norm(x, 1)), 1)
        return add(x, MLP(self.hidden, self.act, name="mlp")(norm(x, 2)), 2), None


class Encoder(nn.Module):
    """Blocks in a row on [B, L, C]; parameters ``layers/...`` [depth, ...]."""

    depth: int
    heads: int
    hidden: int
    act: str
    epsilon: float = 1e-5
    causal: bool = False
    scaled: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        fields = self.heads, self.hidden, self.act, self.epsilon, self.causal, self.scaled
        return stack(*fields, name="layers")(x, None)[0]
