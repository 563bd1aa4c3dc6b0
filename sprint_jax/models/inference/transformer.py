"""The inference form of `models.sana.SanaTransformer`: the same velocity, in fewer and larger operations.

`prepare` arranges the weights once, those of a control branch too. `context` computes what does not depend on
the noisy sample, once for all steps: keys and values of the text in every block, and the embedded condition.
`velocity` is a function of sample and time.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from ...sampling import with_cfg
from ..blocks import run_blocks, stack, unstack
from ..control import Control, side_stream
from ..functions import GUIDANCE_SCALE
from ..layers import TimeEmbedding, layer_norm, modulate, wide
from ..precision import einsum
from .operations import biased, depthwise, linear, rms_norm, taps

Array = jax.Array


def prepare(
    model: Any, params: dict, unrolled: bool, finish: Callable[[dict], dict] = lambda ready: ready
) -> dict:
    """Parameters of a SanaTransformer as `context` and `velocity` take them; a pure function.

    Args:
      params: in the host's memory, each block goes to the device by itself.
      unrolled: every block's weights are apart, and blocks are unrolled; else they are stacked and scanned.
      finish: of each block's weights under ``blocks``, such as `int8.quantize`.
    """

    @jax.jit
    def block(weights):
        return finish({"blocks": _block(model, weights)})["blocks"]

    def blocks(params):
        ready = tuple(map(block, unstack(params["transformer_blocks"])))
        return ready if unrolled else stack(ready)

    ready = _embedders(model, params) | {"blocks": blocks(params)}
    ready["proj_out"] = _cast(model, params["proj_out"])
    ready["scale_shift_table"] = wide(params["scale_shift_table"])
    if "control" not in params:
        return ready
    branch = params["control"]
    copies = {"before_proj": _cast(model, branch["before_proj"])}
    copies["after_proj"] = _cast(model, branch["transformer_blocks"]["after_proj"])
    if unrolled:
        copies["after_proj"] = unstack(copies["after_proj"])
    copies["blocks"] = blocks(branch)
    own = model.control_wiring == "diffusers"
    return ready | {"control": copies | (_embedders(model, branch) if own else {})}


def _embedders(model: Any, params: dict) -> dict:
    ready = {name: _cast(model, params[name]) for name in ("patch_embed", "caption_projection")}
    return ready | {name: wide_tree(params[name]) for name in ("time_embed", "caption_norm")}


def _block(model: Any, weights: dict) -> dict:
    first, second, mlp = (weights[name] for name in ("attn1", "attn2", "ff"))
    names = ("to_q", "to_k", "to_v")
    q, k, v = ({name: wide(leaf) for name, leaf in first[each].items()} for each in names)
    if model.qk_norm:
        # The norm divides q by one number for each pixel, which cancels in linear attention.
        scale = wide(first["norm_q"]["weight"])
        q = {name: leaf * jnp.broadcast_to(scale, leaf.shape) for name, leaf in q.items()}
    qkv = {name: jnp.concatenate([each[name] for each in (q, k, v)], -1) for name in q}
    attn1 = {"to_qkv": qkv, "to_out_0": first["to_out_0"]}
    attn2 = {name: second[name] for name in (*names, "to_out_0")}
    depth = mlp["conv_depth"]
    ready = {
        "attn1": _cast(model, attn1),
        "attn2": _cast(model, attn2),
        "ff": _cast(model, {name: mlp[name] for name in ("conv_inverted", "conv_point")}),
        "scale_shift_table": wide(weights["scale_shift_table"]),
    }
    ready["ff"]["conv_depth"] = {"kernel": taps(depth["kernel"]), "bias": wide(depth["bias"])}
    if model.qk_norm:
        ready["attn1"]["norm_k"] = wide_tree(first["norm_k"])
        ready["attn2"] |= {name: wide_tree(second[name]) for name in ("norm_q", "norm_k")}
    return ready


def _cast(model: Any, weights: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(model.dtype), weights)


def wide_tree(weights: Any) -> Any:
    """The tree with leaves in float32 or wider."""
    return jax.tree.map(wide, weights)


def context(
    model: Any, ready: dict, text: Array, mask: Array, control: Control | None = None
) -> dict:
    """What all steps share.

    Args:
      ready: of `prepare`.
      text: [B, L, caption_channels]; mask: [B, L], 1 keeps.
      control: of a network with a branch; None runs the trunk alone.

    Returns:
      ``keys_values``: (k, v) [B, L, heads, c] of every block, apart or stacked as the blocks are; ``bias``
      [B, L] float32 of the scores; with a condition also ``control``: the same keys and values of the branch,
      ``tokens`` [B, h, w, d] of the condition, and its ``scale``.
    """
    features = _text(model, ready, text)
    shared = {"keys_values": _keys_values(model, ready["blocks"], features)}
    shared["bias"] = (1 - mask.astype(jnp.float32)) * -10000.0
    if control is None:
        return shared
    branch, own = ready["control"], model.control_wiring == "diffusers"
    features = _text(model, branch, text) if own else features
    # Published code shows the condition no positions.
    tokens = _tokens(model, branch if own else ready, control.latents, positions=own)
    pairs = _keys_values(model, branch["blocks"], features)
    return shared | {
        "control": {"keys_values": pairs, "tokens": tokens, "scale": jnp.asarray(control.scale)}
    }


def _text(model: Any, ready: dict, text: Array) -> Array:
    layers = ready["caption_projection"]
    x = jax.nn.gelu(linear(text.astype(model.dtype), layers["linear_1"]), approximate=True)
    x = linear(x, layers["linear_2"])
    return rms_norm(x, ready["caption_norm"]).astype(model.dtype)


def _tokens(model: Any, ready: dict, latents: Array, positions: bool = True) -> Array:
    tokens = linear(model.patches(latents).astype(model.dtype), ready["patch_embed"]["proj"])
    return model.at_positions(tokens) if positions else tokens


def _keys_values(model: Any, blocks: Any, x: Array) -> Any:
    heads = (*x.shape[:2], model.num_cross_attention_heads, -1)

    def of(block):
        attn = block["attn2"]
        k, v = linear(x, attn["to_k"]), linear(x, attn["to_v"])
        if model.qk_norm:
            k = rms_norm(k, attn["norm_k"]).astype(model.dtype)
        return k.reshape(heads), v.reshape(heads)

    return tuple(map(of, blocks)) if isinstance(blocks, tuple) else jax.lax.map(of, blocks)


def softmax_attention(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """Attention of q [B, T, heads, c] to k, v [B, L, heads, c] with a bias [B, L] of the scores."""
    scores = einsum("btnc,blnc->bntl", q, k, preferred_element_type=wide(q).dtype)
    scores = scores * q.shape[-1] ** -0.5 + bias[:, None, None]
    return einsum("bntl,blnc->btnc", jax.nn.softmax(scores, axis=-1).astype(q.dtype), v)


def cudnn_attention(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """`softmax_attention` by one kernel of cuDNN, which takes half precision and c in eights up to 128."""
    shape = (len(q), 1, q.shape[1], k.shape[1])
    bias = jnp.broadcast_to(bias[:, None, None], shape).astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, bias=bias, implementation="cudnn")


def attention_on(model: Any, device: jax.Device) -> Callable:
    """The attention for `velocity` on a device: cuDNN's on CUDA GPUs since Ampere, if it fits the model.

    Of a device that is here, cuDNN's must give what `softmax_attention` gives: its versions differ in what they
    take.
    """
    channels = model.cross_attention_head_dim
    fits = model.dtype == jnp.bfloat16 and channels % 8 == 0 and channels <= 128
    if not fits or device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return softmax_attention
    if float(device.compute_capability) < 8:
        return softmax_attention
    if device in jax.local_devices() and not cudnn_agrees(model, device):
        return softmax_attention
    return cudnn_attention


def cudnn_agrees(model: Any, device: jax.Device) -> bool:
    """Whether cuDNN's attention of 1024 pixels to 300 tokens works on a device, within bfloat16's roundings."""
    heads, channels = model.num_cross_attention_heads, model.cross_attention_head_dim
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, count, heads, channels), jnp.bfloat16)
        for key, count in zip(keys, (1024, 300, 300), strict=True)
    )
    inputs = jax.device_put(
        (q, k, v, jnp.where(jnp.arange(300) < 200, 0.0, -10000.0)[None]), device
    )
    try:
        found = jax.jit(cudnn_attention)(*inputs)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        print(f"text attention without cuDNN: {error!s:.200}", file=sys.stderr)
        return False
    return bool(jnp.abs(wide(found) - wide(jax.jit(softmax_attention)(*inputs))).max() < 0.05)


def velocity(
    model: Any,
    ready: dict,
    shared: dict,
    guidance: Array | None = None,
    attention: Callable = softmax_attention,
) -> Callable:
    """Returns ``velocity(x_fm, t_fm)``, flow velocity [B, h, w, C] float32 as `SanaTransformer` computes it.

    Args:
      shared: of `context`.
      guidance: [B], as the network embeds it; None without such an embedding.
      attention: to the text, as `softmax_attention`.
    """
    p, d = model.patch_size, model.features
    embed = TimeEmbedding(d, model.guidance_embeds, model.flow_map, parent=None)
    layers = _layers(block=ready["blocks"], keys_values=shared["keys_values"])

    def layer_at(t6: Array) -> Callable:
        def layer(weights, x):
            k, v = weights["keys_values"]
            attend = functools.partial(attention, k=k, v=v, bias=shared["bias"])
            return _run_block(model, weights["block"], attend, t6, x)

        return layer

    def run(x: Array, t: Array) -> Array:
        tokens, times = _tokens(model, ready, x), wide(t) * (1000 * model.timestep_scale)
        target = jnp.zeros_like(wide(t)) if model.flow_map else None
        embedding, t6 = embed.apply({"params": ready["time_embed"]}, times, guidance, target)
        layer, side = layer_at(t6), None
        if "control" in shared:
            branch, given = ready["control"], shared["control"]
            entry, copy = tokens, layer
            if model.control_wiring == "diffusers":
                own = TimeEmbedding(d, guidance_embeds=False, parent=None)
                _, own_t6 = own.apply({"params": branch["time_embed"]}, times, None)
                entry, copy = _tokens(model, branch, x), layer_at(own_t6)
            pairs, after = given["keys_values"], branch["after_proj"]
            copies = _layers(block=branch["blocks"], keys_values=pairs, after_proj=after)
            weights = {"before_proj": branch["before_proj"], "transformer_blocks": copies}
            how = weights, given["scale"], entry, given["tokens"], (layer, copy)
            side = side_stream(model, *how)
        tokens, _ = run_blocks(layer, layers, tokens, model.num_layers, (), True, side)
        rows = ready["scale_shift_table"][None] + embedding[:, None]
        tokens = modulate(layer_norm(tokens), rows[:, 0], rows[:, 1]).astype(model.dtype)
        out = linear(tokens, ready["proj_out"])
        return rearrange(wide(out), "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)

    return run


def _layers(**parts: Any) -> Any:
    """What each block needs, as a dict for `run_blocks`: a tuple of them if blocks are apart, else stacked."""
    if not isinstance(parts["block"], tuple):
        return parts
    rows = zip(*parts.values(), strict=True)
    return tuple(dict(zip(parts, row, strict=True)) for row in rows)


def _run_block(model: Any, weights: dict, attend: Callable, t6: Array, x: Array) -> Array:
    rows = weights["scale_shift_table"][None] + t6
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (rows[:, i] for i in range(6))
    normed = modulate(layer_norm(x), shift_a, scale_a).astype(model.dtype)
    y = _linear_attention(model, weights["attn1"], normed)
    x = x + (gate_a[:, None, None] * y).astype(x.dtype)
    x = x + _cross_attention(model, weights["attn2"], attend, x)
    normed = modulate(layer_norm(x), shift_m, scale_m).astype(model.dtype)
    y = _mlp(model, weights["ff"], normed)
    return x + (gate_m[:, None, None] * y).astype(x.dtype)


def _linear_attention(model: Any, weights: dict, x: Array) -> Array:
    """``q (k^T v) W / (q sum(k))``: k^T v is small, so it meets the output's weights before q meets either."""
    heads, d = model.num_attention_heads, model.features
    q, k, v = jnp.split(linear(x, weights["to_qkv"]).reshape(len(x), -1, 3 * d), 3, axis=-1)
    if model.qk_norm:
        k = rms_norm(k, weights["norm_k"]).astype(model.dtype)
    q, k = jax.nn.relu(q), jax.nn.relu(k)
    q, v = (rearrange(a, "b t (n c) -> b t n c", n=heads) for a in (q, v))
    # With a one behind v the product has the sum of k in its last column.
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    # Transposed here, since a compiler that does it by itself takes the norm of k apart.
    k = rearrange(k, "b t (n c) -> b n c t", n=heads)
    v = rearrange(v, "b t n d -> b n t d")
    state = einsum("bnct,bntd->bncd", k, v, preferred_element_type=wide(k).dtype)
    state, total = state[..., :-1], state[..., -1]
    out = wide(weights["to_out_0"]["kernel"]).reshape(heads, -1, d)
    out = einsum("bncd,ndo->bnco", state, out).astype(model.dtype)
    share = wide(q) / ((wide(q) * total[:, None]).sum(-1, keepdims=True) + 1e-15)
    share = share.astype(model.dtype).reshape(len(x), -1, d)
    y = einsum("btd,bdo->bto", share, out.reshape(len(x), d, d))
    return biased(y.reshape(x.shape), weights["to_out_0"])


def _cross_attention(model: Any, weights: dict, attend: Callable, x: Array) -> Array:
    q = linear(x, weights["to_q"]).reshape(len(x), -1, model.features)
    if model.qk_norm:
        q = rms_norm(q, weights["norm_q"]).astype(model.dtype)
    q = rearrange(q, "b t (n c) -> b t n c", n=model.num_cross_attention_heads)
    return linear(attend(q).reshape(x.shape), weights["to_out_0"])


def _mlp(model: Any, weights: dict, x: Array) -> Array:
    y = jax.nn.silu(linear(x, weights["conv_inverted"]))
    # Once, not again for each of the nine pixels that are summed.
    y = jax.lax.optimization_barrier(y)
    y = biased(depthwise(y, weights["conv_depth"]["kernel"]), weights["conv_depth"])
    value, gate = jnp.split(y, 2, axis=-1)
    return linear((value * jax.nn.silu(gate)).astype(model.dtype), weights["conv_point"])


def guided(
    model: Any,
    ready: dict,
    text: Array,
    mask: Array,
    guidance: Array,
    null: tuple[Array, Array] | None,
    attention: Callable = softmax_attention,
    control: Control | None = None,
) -> Callable:
    """A student's velocity, which embeds its guidance, a CFG scale [B]; or `functions.guided` of a teacher's.

    Args:
      null: text [L, D] and mask [L] of a teacher's empty prompt; None for a student.
    """
    if null is None:
        embedded = guidance * GUIDANCE_SCALE if model.guidance_embeds else None
        shared = context(model, ready, text, mask, control)
        return velocity(model, ready, shared, embedded, attention)
    pairs = zip((text, mask), null, strict=True)
    pairs = (jnp.stack([a, jnp.broadcast_to(b, a.shape)], 1) for a, b in pairs)
    text_and_mask = (pair.reshape(-1, *pair.shape[2:]) for pair in pairs)
    control = control.doubled() if control is not None else None
    shared = context(model, ready, *text_and_mask, control)
    both = velocity(model, ready, shared, attention=attention)
    combined = with_cfg(lambda x, t, *_: both(x, t), guidance, *null)
    return lambda x, t: combined(x, t, text, mask)
