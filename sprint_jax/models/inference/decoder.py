"""The inference form of DC-AE's decoder: what `models.dc_ae.Decoder` computes, in fewer and larger operations.

`prepare` arranges the weights once; `decode` then computes nothing from them alone.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from ..convolution import pixel_shuffle
from ..dc_ae import ACTIVATIONS, AutoencoderDC
from ..layers import wide
from ..precision import einsum
from .operations import (
    biased,
    convolution,
    depthwise,
    linear,
    rms_norm,
    sub_pixel_kernel,
    taps,
    upsampled_convolution,
)

Array = jax.Array


def prepare(config: AutoencoderDC, params: dict) -> dict:
    """The decoder's parameters as `decode` takes them; a pure function.

    Args:
      params: of `Decoder`.
    """

    def conv(weights, doubles=False):
        kernel = weights["kernel"]
        kernel = sub_pixel_kernel(wide(kernel)) if doubles else kernel.transpose(3, 0, 1, 2)
        return _cast(config, dict(weights, kernel=kernel))

    def block(weights):
        if "conv1" in weights:
            return {name: conv(weights[name]) for name in ("conv1", "conv2")} | {
                "norm": _norm(weights["norm"])
            }
        if "conv" in weights:
            return {"conv": conv(weights["conv"], config.upsample_block_type == "interpolate")}
        return _vit(config, weights)

    ready = {name: block(weights) for name, weights in params.items() if "up_blocks" in name}
    ready |= {"conv_in": conv(params["conv_in"]), "norm_out": _norm(params["norm_out"])}
    out = params["conv_out"]
    return ready | {"conv_out": conv(out) if "kernel" in out else block(out)}


def _vit(config: AutoencoderDC, weights: dict) -> dict:
    attn, mlp = weights["attn"], weights["conv_out"]
    head = config.attention_head_dim

    def apart(channels):
        """Channels, the last axis, with all heads' q in front of their k and v, which they alternate with."""
        return rearrange(channels, "... (n s c) -> ... (s n c)", s=3, c=head)

    qkv = jnp.concatenate([attn[name]["kernel"] for name in ("to_q", "to_k", "to_v")], -1)
    blurs = [attn[name] for name in sorted(attn) if name.startswith("to_qkv_multiscale_")]
    blurs = [
        {
            "proj_in": taps(apart(blur["proj_in"])),
            "proj_out": rearrange(blur["proj_out"], "(n s) i o -> (s n) i o", s=3).astype(
                config.dtype
            ),
        }
        for blur in blurs
    ]
    ready = {
        "to_qkv": _cast(config, {"kernel": apart(qkv)}),
        "to_out": _cast(config, attn["to_out"]),
        "norm_out": _norm(attn["norm_out"]),
        "blurs": blurs,
    }
    ready |= {name: _cast(config, mlp[name]) for name in ("conv_inverted", "conv_point")}
    depth = mlp["conv_depth"]
    ready["conv_depth"] = {"kernel": taps(depth["kernel"]), "bias": wide(depth["bias"])}
    return ready | {"conv_out_norm": _norm(weights["conv_out_norm"])}


def _cast(config: AutoencoderDC, weights: dict) -> dict:
    return {name: leaf.astype(config.dtype) for name, leaf in weights.items()}


def _norm(weights: dict) -> dict:
    return jax.tree.map(wide, weights)


def decode(config: AutoencoderDC, ready: dict, latents: Array) -> Array:
    """Scaled latents [B, h, w, C] to pixels [B, f h, f w, 3], not clamped, float32.

    Args:
      ready: of `prepare`.
    """
    c = config
    widths, layers = c.decoder_block_out_channels, c.decoder_layers_per_block
    z = (latents / c.scaling_factor).astype(c.dtype)
    x = convolution(z, ready["conv_in"])
    if c.decoder_in_shortcut:
        x = x + jnp.repeat(z, widths[-1] // c.latent_channels, axis=-1)
    for i, count in reversed(list(enumerate(layers))):
        first = int(i + 1 < len(widths) and count > 0)
        if first:
            x = _up(c, ready[f"up_blocks_{i}_0"], x, widths[i], shortcut=True)
        for j in range(first, first + count):
            weights = ready[f"up_blocks_{i}_{j}"]
            x = _res_block(c, i, weights, x) if "conv1" in weights else _vit_block(c, weights, x)
    x = rms_norm(x, ready["norm_out"])
    x = ACTIVATIONS[c.decoder_conv_act_fn](x).astype(c.dtype)
    if layers[0]:
        return wide(convolution(x, ready["conv_out"]))
    return wide(_up(c, ready["conv_out"], x, c.in_channels, shortcut=False))


def _up(c: AutoencoderDC, weights: dict, x: Array, features: int, shortcut: bool) -> Array:
    if c.upsample_block_type == "interpolate":
        y = upsampled_convolution(x, weights["conv"])
    else:
        y = pixel_shuffle(convolution(x, weights["conv"]))
    if not shortcut:
        return y
    return y + pixel_shuffle(jnp.repeat(x, 4 * features // x.shape[-1], axis=-1))


def _res_block(c: AutoencoderDC, stage: int, weights: dict, x: Array) -> Array:
    act = c.decoder_act_fns if isinstance(c.decoder_act_fns, str) else c.decoder_act_fns[stage]
    y = ACTIVATIONS[act](convolution(x, weights["conv1"]))
    y = convolution(y, weights["conv2"])
    return x + rms_norm(y, weights["norm"]).astype(c.dtype)


def _vit_block(c: AutoencoderDC, weights: dict, x: Array) -> Array:
    y = _attention(c, weights, x)
    x = x + rms_norm(y, weights["norm_out"]).astype(c.dtype)
    y = jax.nn.silu(linear(x, weights["conv_inverted"]))
    # Once, not again for each of the nine pixels that are summed.
    y = jax.lax.optimization_barrier(y)
    y = depthwise(y, weights["conv_depth"]["kernel"])
    y = biased(y, weights["conv_depth"])
    value, gate = jnp.split(y, 2, axis=-1)
    y = linear((value * jax.nn.silu(gate)).astype(c.dtype), weights["conv_point"])
    return x + rms_norm(y, weights["conv_out_norm"]).astype(c.dtype)


def _attention(c: AutoencoderDC, weights: dict, x: Array) -> Array:
    """`dc_ae.MultiscaleLinearAttention` without its norm; heads come first and pixels last throughout.

    ``q (k^T v) W / (q sum(k))``: k^T v is small, so it meets the output's weights before q meets either.
    """
    b, height, width, d = x.shape
    plain = einsum("dm,bhwd->bmhw", weights["to_qkv"]["kernel"], x)
    copies = [plain, *(_blurred(w, plain) for w in weights["blurs"])]
    shape = (b, 3, -1, c.attention_head_dim, height * width)
    parts = [copy.reshape(shape) for copy in copies]
    q, k, v = (jnp.concatenate([part[:, i] for part in parts], 1) for i in range(3))
    q, k = jax.nn.relu(q), jax.nn.relu(k)  # no rounding: products of bfloat16 are exact in float32
    state = einsum("bnct,bndt->bncd", k, v, preferred_element_type=wide(k).dtype)
    out = wide(weights["to_out"]["kernel"]).reshape(-1, c.attention_head_dim, d)
    out = einsum("bncd,ndo->bnco", state, out).astype(c.dtype)
    total = wide(k).sum(-1, keepdims=True)
    share = wide(q) / ((wide(q) * total).sum(2, keepdims=True) + 1e-15)
    y = einsum("bnct,bnco->bto", share.astype(c.dtype), out)
    return y.reshape(x.shape)


def _blurred(weights: dict, qkv: Array) -> Array:
    """A depthwise convolution of q, k and v [B, m, h, w], then a linear map within each head's q, k or v."""
    y = depthwise(qkv, weights["proj_in"], channels_first=True).astype(qkv.dtype)
    kernel = weights["proj_out"]
    y = y.reshape(len(y), len(kernel), kernel.shape[1], -1)
    return einsum("bgit,gio->bgot", y, kernel).reshape(qkv.shape)
