"""Gemma-2 as a text encoder: token ids to the hidden states after the final norm.

A causal transformer (arXiv 2408.00118) with grouped queries, soft-capped scores and norms on both
sides of attention and MLP; layers of even index see a sliding window. Layers are stacked on a leading
axis and run by `jax.lax.scan`. There is no logit head and no growing cache, since nothing is generated;
`Gemma2.prefix_cache` keeps keys and values of the tokens with which all prompts begin. Config fields and
weight names are those of transformers' Gemma2Model (`interop.gemma2`), with which the forward pass is
compared.
"""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from ..core.errors import UserError
from ..core.ranges import COUNT, LAYERS, POSITIVE, SIZE, WIDTH
from ..core.schema import TEXT, optional, several, whole
from .blocks import unstack
from .layers import Linear, wide
from .precision import einsum

Array = jax.Array

# Values that fields of Gemma2 may have in a file.
KINDS = dict(
    vocab_size=whole(1, 2**24),
    hidden_size=whole(1, WIDTH),
    intermediate_size=SIZE,
    num_hidden_layers=LAYERS,
    num_attention_heads=whole(1, WIDTH),
    num_key_value_heads=whole(1, WIDTH),
    head_dim=whole(1, WIDTH),
    rope_theta=POSITIVE,
    rms_norm_eps=POSITIVE,
    query_pre_attn_scalar=POSITIVE,
    attn_logit_softcapping=optional(POSITIVE),
    sliding_window=optional(COUNT),
    layer_types=optional(several(TEXT)),
)


class Prefix(NamedTuple):
    """The cached part of a constant prefix of P tokens.

    Attributes:
      keys, values: of every layer, keys rotated; [layers, P, kv heads, head_dim].
      hidden: the prefix's own hidden states after the final norm [P, hidden], float32.
    """

    keys: Array
    values: Array
    hidden: Array


@dataclasses.dataclass(frozen=True)
class Gemma2:
    """A Gemma-2 by its config; fields are those of transformers' Gemma2Config, defaults those of
    gemma-2-2b, which is SANA's text encoder.

    Fields of our own:
      dtype: of matmul inputs and of the residual stream. Norms, rotations, scores and softmax are
        float32. Parameters may be stored in it or in float32.

    Raises:
      UserError: head counts that do not divide, an odd head_dim, or layer types that are unknown or not
        one per layer.
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = 50.0
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        layers, types = self.num_hidden_layers, self.layer_types or ()
        unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
        problem = None
        if heads % groups:
            problem = f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
        elif self.head_dim % 2:
            problem = f"head_dim {self.head_dim} must be even"
        elif unknown:
            problem = f"layer_types has the unknown type '{unknown[0]}'"
        elif types and len(types) != layers:
            problem = f"{len(types)} layer_types for {layers} layers"
        if problem:
            raise UserError(f"text encoder config: {problem}")

    def init(self, key: Array) -> dict:
        """Fresh parameters, float32; under `jax.eval_shape`, the shapes of all of them."""
        keys = jax.random.split(key, self.num_hidden_layers + 1)
        x = jnp.zeros((1, 1, self.hidden_size))
        inputs = (x, _rotation(self, 0, 1), jnp.ones((1, 1, 1), bool), None)
        layer = DecoderLayer(self)
        embedding = jax.random.normal(keys[-1], (self.vocab_size, self.hidden_size))
        return {
            "embed_tokens": {"weight": 0.02 * embedding},
            "layers": jax.vmap(lambda k: layer.init(k, *inputs)["params"])(keys[:-1]),
            "norm": _norm(self).init(key, x)["params"],
        }

    def encode(self, params, ids: Array, mask: Array, prefix: Prefix | None = None) -> Array:
        """Hidden states after the final norm.

        Args:
          params: as of `init`, or with every layer's apart (`unstack_layers`).
          ids: tokens [B, T]; with a prefix of P tokens, those at positions P and on.
          mask: [B, T]; 1 for tokens, 0 for padding, which must be on the right.
          prefix: of `prefix_cache`, the tokens before ``ids`` in every row; the result is the same as with
            these tokens in ``ids``, without their states.

        Returns:
          [B, T, hidden_size] float32. States of padding have no use, but equal the reference's.
        """
        chex.assert_rank(ids, 2)
        chex.assert_equal_shape([ids, mask])
        chex.assert_type(ids, int)
        return self._run(params, ids, mask, prefix, keep=False)[0]

    def prefix_cache(self, params, ids: Array) -> Prefix:
        """Returns the `Prefix` of tokens [P] with which every row begins, the begin token first."""
        hidden, (keys, values) = self._run(
            params, ids[None], jnp.ones((1, len(ids)), jnp.int32), None, keep=True
        )
        return Prefix(keys[:, 0], values[:, 0], hidden[0])

    def _run(self, params, ids, mask, prefix, keep):
        """Returns hidden states, and if ``keep`` all layers' keys and values [layers, B, T, heads, c]."""
        past = 0 if prefix is None else prefix.keys.shape[1]
        length = ids.shape[1]
        mask = jnp.pad(mask.astype(bool), ((0, 0), (past, 0)), constant_values=True)
        distance = np.arange(past, past + length)[:, None] - np.arange(past + length)[None]
        visible = mask[:, None] & (distance >= 0)[None]
        rotation = _rotation(self, past, length)
        layer = DecoderLayer(self, parent=None)

        def step(x, inputs):
            weights, window, cached = inputs
            seen = visible & (distance < window)[None]
            x, new = layer.apply({"params": weights}, x, rotation, seen, cached)
            return x, new if keep else None

        def run(x, inputs):
            weights, windows, cached = inputs
            if not isinstance(weights, tuple):
                return jax.lax.scan(step, x, (weights, jnp.asarray(windows), cached))
            kept = []
            for i, each in enumerate(weights):
                past = None if cached is None else jax.tree.map(lambda leaf, i=i: leaf[i], cached)
                x, new = step(x, (each, windows[i], past))
                kept.append(new)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept) if keep else None

        x = params["embed_tokens"]["weight"][ids].astype(self.dtype)
        x = x * jnp.asarray(self.hidden_size**0.5, self.dtype)
        cached = None if prefix is None else (prefix.keys, prefix.values)
        x, kept = run(x, (params["layers"], self._windows(past + length), cached))
        final = dataclasses.replace(self, dtype=wide(x).dtype)
        return _norm(final).apply({"params": params["norm"]}, x), kept

    def _windows(self, length: int) -> np.ndarray:
        """The number of tokens that each layer sees, the current one included; int32 [layers]."""
        layers, pair = self.num_hidden_layers, ("sliding_attention", "full_attention")
        types = self.layer_types or [pair[i % 2] for i in range(layers)]
        window = length if self.sliding_window is None else self.sliding_window
        return np.array([length if t == "full_attention" else window for t in types], np.int32)


def unstack_layers(params: dict) -> dict:
    """Parameters whose layers are apart, to be unrolled: a GPU copies weights out of a stack to use them."""
    return params | {"layers": unstack(params["layers"])}


class RMSNorm(nn.Module):
    """Root-mean-square norm times ``1 + weight``, float32 inside."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = wide(self.param("weight", nn.initializers.zeros, (x.shape[-1],)))
        x = wide(x)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * jnp.broadcast_to(1 + weight, x.shape)).astype(self.dtype)


def _norm(c: Gemma2, name: str | None = None) -> RMSNorm:
    return RMSNorm(c.rms_norm_eps, c.dtype, name=name)


def _linear(c: Gemma2, features: int, name: str) -> Linear:
    init = nn.initializers.normal(0.02)
    return Linear(features, use_bias=False, dtype=c.dtype, kernel_init=init, name=name)


def _rotation(c: Gemma2, start: int, length: int) -> tuple[Array, Array]:
    """Cosines and sines [length, head_dim / 2] of positions ``start`` and on, float32."""
    # In float32 at every step, as the reference: at position 500 an angle rounds by 3e-5. Only the power is
    # taken in float64, since the last bit of NumPy's in float32 depends on the processor.
    exponents = np.arange(0, c.head_dim, 2, dtype=np.float32) / np.float32(c.head_dim)
    powers = np.float64(np.float32(c.rope_theta)) ** exponents.astype(np.float64)
    frequencies = np.float32(1) / powers.astype(np.float32)
    angles = np.arange(start, start + length, dtype=np.float32)[:, None] * frequencies[None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Turns pairs made of the first and second half of the channels of ``x`` [B, T, heads, c]."""
    cos, sin = (a[None, :, None] for a in rotation)
    first, second = jnp.split(wide(x), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    """Softmax attention with grouped queries, rotated positions and soft-capped scores."""

    config: Gemma2

    @nn.compact
    def __call__(self, x: Array, rotation, visible: Array, past) -> tuple[Array, tuple]:
        """Args:
          x: [B, T, hidden].
          rotation: of `_rotation`, for the T positions.
          visible: [B or 1, T, P + T]; True where a query sees a key.
          past: keys and values [P, kv heads, head_dim] of the prefix, or None.

        Returns:
          ``(output [B, T, hidden], (keys, values) [B, T, kv heads, head_dim] of x)``.
        """
        c = self.config

        def project(heads, name):
            out = _linear(c, heads * c.head_dim, name)(x)
            return out.reshape(*x.shape[:2], heads, c.head_dim)

        q = _rotate(project(c.num_attention_heads, "q_proj"), rotation).astype(c.dtype)
        k = _rotate(project(c.num_key_value_heads, "k_proj"), rotation).astype(c.dtype)
        v = project(c.num_key_value_heads, "v_proj")
        new = (k, v)
        if past is not None:
            past = (jnp.broadcast_to(a[None], (len(x), *a.shape)) for a in past)
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(past, new, strict=True))
        # Each key serves a group of adjacent queries. Heads come first and keys last, so that a softmax is one
        # kernel on GPUs.
        groups = c.num_attention_heads // c.num_key_value_heads
        q = rearrange(q, "b t (n g) c -> b n (g t) c", g=groups)
        k, v = (rearrange(a, "b s n c -> b n s c") for a in (k, v))
        scores = einsum("bnqc,bnsc->bnqs", q, k, preferred_element_type=wide(q).dtype)
        scores = rearrange(scores, "b n (g t) s -> b n g t s", g=groups)
        scores = scores * c.query_pre_attn_scalar**-0.5
        if c.attn_logit_softcapping is not None:
            scores = c.attn_logit_softcapping * jnp.tanh(scores / c.attn_logit_softcapping)
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(c.dtype)
        weights = rearrange(weights, "b n g t s -> b n (g t) s")
        out = einsum("bnqs,bnsc->bnqc", weights, v)
        out = rearrange(out, "b n (g t) c -> b t (n g c)", g=groups)
        return _linear(c, c.hidden_size, "o_proj")(out), new


class MLP(nn.Module):
    """``down(gelu(gate x) up x)`` with the tanh approximation of GELU."""

    config: Gemma2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate = nn.gelu(_linear(c, c.intermediate_size, "gate_proj")(x), approximate=True)
        up = _linear(c, c.intermediate_size, "up_proj")(x)
        return _linear(c, c.hidden_size, "down_proj")(gate * up)


class DecoderLayer(nn.Module):
    """Attention, then MLP, each between two norms and added; arguments and result as `Attention`."""

    config: Gemma2

    @nn.compact
    def __call__(self, x: Array, rotation, visible: Array, past) -> tuple[Array, tuple]:
        c = self.config
        attention = Attention(c, name="self_attn")
        y, new = attention(_norm(c, "input_layernorm")(x), rotation, visible, past)
        x = x + _norm(c, "post_attention_layernorm")(y)
        y = MLP(c, name="mlp")(_norm(c, "pre_feedforward_layernorm")(x))
        return x + _norm(c, "post_feedforward_layernorm")(y), new
