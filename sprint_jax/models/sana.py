"""SanaTransformer: the linear DiT of SANA and SANA-Sprint, and every published size.

One definition serves student, teacher, EMA and feature extractor: a pure function of
``(params, inputs)``. Blocks are stacked on a leading axis and run by `jax.lax.scan`, in segments that
end at the tapped blocks: a frozen teacher keeps only tapped features and computes nothing after the
last of them. Weight names are those of diffusers' SanaTransformer2DModel, with which the forward pass is
compared.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from ..core.errors import UserError
from ..core.ranges import MODEL, WIDTH
from ..core.schema import check, whole, with_floats
from .blocks import POLICIES, compute_params, remat, run_blocks
from .control import WIRINGS, Control, new_branch, own_embeddings, side_stream
from .layers import (
    CaptionProjection,
    CrossAttention,
    GLUMBConv,
    Linear,
    LinearAttention,
    PatchEmbed,
    RMSNorm,
    TimeEmbedding,
    layer_norm,
    modulate,
    sincos_positions,
    wide,
    xavier,
)

Array = jax.Array


class SanaTransformerBlock(nn.Module):
    """One block: linear self-attention, cross-attention to text, gated convolutional MLP.

    Self-attention and MLP are modulated and gated by ``t6`` [B, 6, d]; cross-attention reads the raw
    residual, without norm, modulation or gate.
    """

    features: int
    heads: int
    cross_heads: int
    hidden: int
    qk_norm: bool
    attention_bias: bool
    dtype: Any
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array, text: Array, mask: Array, t6: Array) -> Array:
        init = nn.initializers.normal(self.features**-0.5)
        table = self.param("scale_shift_table", init, (6, self.features))
        rows = table[None] + t6
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (rows[:, i] for i in range(6))

        attn1 = LinearAttention(
            self.features, self.heads, self.qk_norm, self.attention_bias, self.dtype, name="attn1"
        )
        attn2 = CrossAttention(
            self.features, self.cross_heads, self.qk_norm, self.dtype, name="attn2"
        )
        ff = GLUMBConv(self.features, self.hidden, self.dtype, self.groups, name="ff")

        normed = modulate(layer_norm(x), shift_a, scale_a).astype(self.dtype)
        x = x + (gate_a[:, None, None] * attn1(normed)).astype(x.dtype)
        x = x + attn2(x, text, mask)
        normed = modulate(layer_norm(x), shift_m, scale_m).astype(self.dtype)
        return x + (gate_m[:, None, None] * ff(normed)).astype(x.dtype)


class SanaTransformer(nn.Module):
    """The SANA linear DiT; fields are named as in diffusers' config. See `SIZES`.

    Fields of our own:
      control_blocks: copies in the control branch (`control`), fewer than ``num_layers``; 0: there is none.
      control_wiring: of the branch, one of `control.WIRINGS`.
      logvar: adds the head that predicts the sCM loss's log variance per sample (training only).
      dtype: of matmuls and of the residual stream; parameters are always float32.
      remat: what the backward pass recomputes, a name that `remat` accepts.
      scan: run the stacked blocks by `lax.scan`; False unrolls them (slower to compile).
      partition: a `parallel.sharding.Partition`, which places weights in use and activations on a mesh of
        several devices; None leaves that to the compiler.
    """

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    patch_size: int = 1
    sample_size: int = 32
    attention_bias: bool = False
    qk_norm: bool = False
    guidance_embeds: bool = False
    flow_map: bool = False
    timestep_scale: float = 1.0
    interpolation_scale: float | None = None
    control_blocks: int = 0
    control_wiring: str = "nvlabs"
    logvar: bool = False
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = True
    partition: Any = None

    @property
    def features(self) -> int:
        """Width ``d`` of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Width of the MLP's gated part."""
        return int(self.mlp_ratio * self.features)

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        text: Array,
        mask: Array,
        guidance: Array | None = None,
        *,
        target: Array | None = None,
        control: Control | None = None,
        taps: tuple[int, ...] = (),
        with_logvar: bool = False,
    ):
        """Computes the flow-matching velocity of noisy latents.

        Args:
          x: ``x_fm`` [B, h, w, in_channels]; h and w multiples of ``patch_size``.
          t: flow time [B] in [0, 1] (``flow_time(MAX_TIME)``, slightly above 1, included). The
            sinusoid sees ``1000 * timestep_scale * t``: dense time embedding is timestep_scale 0.001.
          text: text features [B, L, caption_channels].
          mask: [B, L]; 1 keeps a token, 0 hides it.
          guidance: [B] CFG scale times 0.1 for models with ``guidance_embeds``, else None.
          target: [B] flow time to which a model with ``flow_map`` jumps, at most ``t``; None is 0, the image.
          control: a condition for a model with ``control_blocks``; None runs the trunk alone.
          taps: increasing block indices; if given, the result is the tuple of these blocks' outputs,
            each [B, h', w', d] in ``dtype``, and nothing after the last of them runs.
          with_logvar: also return the log variance.

        Returns:
          velocity [B, h, w, out_channels] in float32; or ``(velocity, logvar [B])``; or features.

        Raises:
          ValueError: guidance is missing or not expected, a target or a condition is not expected, taps are out
            of range, or the latent size is not a multiple of the patch size.
          AssertionError: of chex, for other shapes and dtypes.
        """
        self._check(x, t, text, mask, guidance, target, control, taps, with_logvar)
        p, d = self.patch_size, self.features
        patch_embed = PatchEmbed(d, self.dtype, name="patch_embed")
        tokens = self.at_positions(patch_embed(self.patches(x)))
        if self.flow_map and target is None:
            target = jnp.zeros_like(t)
        scale = 1000 * self.timestep_scale
        target = None if target is None else wide(target) * scale
        embed = TimeEmbedding(d, self.guidance_embeds, self.flow_map, name="time_embed")
        embedding, t6 = embed(wide(t) * scale, guidance, target)
        features_of_text = text
        text = CaptionProjection(d, self.dtype, name="caption_projection")(text)
        text = RMSNorm(self.dtype, name="caption_norm")(text)

        blocks = self._blocks(tokens, text, mask, t6)
        layer, side = self._layer(text, mask, t6), None
        branch = self._branch()
        if control is not None:
            # Published code shows the condition no positions.
            condition, copy = patch_embed(self.patches(control.latents)), layer
            entry = tokens
            if self.control_wiring == "diffusers":
                inputs = x, control.latents, wide(t) * scale, features_of_text
                entry, condition, own_text, own_t6 = own_embeddings(self, branch, *inputs)
                copy = self._layer(own_text, mask, own_t6)
            side = side_stream(self, branch, control.scale, entry, condition, (layer, copy))
            side = side._replace(step=self._remat(side.step))
        step = self._remat(layer)
        tokens, features = run_blocks(step, blocks, tokens, self.num_layers, taps, self.scan, side)
        if taps and not self.is_initializing():
            return features

        init = nn.initializers.normal(d**-0.5)
        rows = self.param("scale_shift_table", init, (2, d))[None] + embedding[:, None]
        tokens = modulate(layer_norm(tokens), rows[:, 0], rows[:, 1]).astype(self.dtype)
        width, zeros = p * p * self.out_channels, nn.initializers.zeros
        out = Linear(width, dtype=self.dtype, kernel_init=zeros, name="proj_out")(tokens)
        velocity = rearrange(wide(out), "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)
        if not self.logvar:
            return velocity
        logvar = Linear(1, kernel_init=xavier, name="logvar_linear")(embedding)[:, 0]
        return (velocity, logvar) if with_logvar else velocity

    @nn.nowrap
    def patches(self, x: Array) -> Array:
        """Latents [B, h, w, C] as patches [B, h / p, w / p, p p C]."""
        p = self.patch_size
        return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)

    @nn.nowrap
    def at_positions(self, tokens: Array) -> Array:
        """Tokens [B, h, w, d] with their positions, where the model has any."""
        if self.interpolation_scale is None:
            return tokens
        base = self.sample_size // self.patch_size
        where = *tokens.shape[1:3], self.features, base, self.interpolation_scale
        return tokens + jnp.asarray(sincos_positions(*where), self.dtype)[None]

    def _check(self, x, t, text, mask, guidance, target, control, taps, with_logvar):
        batch = x.shape[0]
        chex.assert_shape(x, (None, None, None, self.in_channels))
        chex.assert_shape(text, (batch, None, self.caption_channels))
        chex.assert_shape([t, mask], [(batch,), text.shape[:2]])
        chex.assert_type([x, t, text], float)
        if self.guidance_embeds and guidance is None:
            raise ValueError(
                "this model embeds guidance: pass guidance = CFG scale * 0.1, shape [B]"
            )
        if guidance is not None:
            if not self.guidance_embeds:
                raise ValueError("this model has no guidance embedding: pass guidance=None")
            chex.assert_shape(guidance, (batch,))
        if target is not None:
            if not self.flow_map:
                raise ValueError("this model is no flow map: pass target=None")
            chex.assert_shape(target, (batch,))
        if control is not None:
            if not self.control_blocks:
                raise ValueError("this model has no control branch: pass control=None")
            chex.assert_equal_shape([control.latents, x])
        if any(size % self.patch_size for size in x.shape[1:3]):
            raise ValueError(
                f"latent size {x.shape[1:3]} is not a multiple of patch_size {self.patch_size}"
            )
        if list(taps) != sorted(set(taps)) or any(not 0 <= i < self.num_layers for i in taps):
            raise ValueError(
                f"taps {taps} must be increasing block indices below {self.num_layers}"
            )
        if with_logvar and not self.logvar:
            raise ValueError("with_logvar needs a model built with logvar=True")

    def _block(self, groups: int = 1) -> SanaTransformerBlock:
        return SanaTransformerBlock(
            features=self.features,
            heads=self.num_attention_heads,
            cross_heads=self.num_cross_attention_heads,
            hidden=self.hidden,
            groups=groups,
            qk_norm=self.qk_norm,
            attention_bias=self.attention_bias,
            dtype=self.dtype,
            parent=None,  # unbound: the stack below owns the parameters
        )

    def _blocks(self, *inputs):
        """The stacked parameters of all blocks, leaves [num_layers, ...]."""

        def init(key):
            keys = jax.random.split(key, self.num_layers)
            return jax.vmap(lambda k: self._block().init(k, *inputs)["params"])(keys)

        if self.is_initializing():
            return self.param("transformer_blocks", init)
        # Linen's `param` would trace `init` again in every apply, to compare shapes.
        return self.get_variable("params", "transformer_blocks")

    def _branch(self):
        """The parameters of the control branch, None without one."""
        if not self.control_blocks:
            return None
        if self.is_initializing():
            trunk = dict(self.variables["params"])
            how = trunk, self.control_blocks, self.control_wiring
            return self.param("control", lambda _: new_branch(*how))
        # Of a trunk that is used alone, the branch may be missing.
        return self.get_variable("params", "control")

    @nn.nowrap
    def gathered(self, params):
        """A block's parameters as its use needs them: in ``dtype``, and gathered over the mesh."""
        params = compute_params(params, self.dtype)  # before they travel between devices
        return params if self.partition is None else self.partition.gather(params)

    def _layer(self, text, mask, t6) -> Callable:
        partition = self.partition
        block = self._block(partition.ways(self.hidden) if partition else 1)

        def layer(params, x):
            x = checkpoint_name(x, "block_input")  # for remat 'offload'
            params = self.gathered(params)
            if partition is not None:
                x = partition.batch(x)
            return block.apply({"params": params}, x, text, mask, t6)

        return layer

    def _remat(self, step: Callable) -> Callable:
        return remat(step, self.remat, self.scan, split=self.partition is not None)


def from_fields(fields: dict, **changes) -> SanaTransformer:
    """Returns a `SanaTransformer` of plain config values: dtypes by name, interpolation_scale 0 for None.

    Args:
      fields: SanaTransformer's fields, e.g. the ``model`` part of a run's config.json.
      **changes: fields that override them.

    Raises:
      UserError: a value is out of its range in `core.ranges`, the two head counts do not give the same width,
        or a name is not known.
    """
    plain = {each.name for each in dataclasses.fields(SanaTransformer)}
    plain -= {"parent", "name", "partition"}  # of flax, and of meshes
    if unknown := sorted(set(fields) - plain):
        raise UserError(f"model.{unknown[0]} is unknown", exit_code=2)
    fields = {"dtype": "float32", "remat": "none"} | dict(fields) | changes
    check(fields, MODEL, "model.", exit_code=2)
    names = {"dtype": ("float32", "bfloat16"), "remat": ("none", *POLICIES)}
    names["control_wiring"] = WIRINGS
    for key, known in names.items():
        if key in fields and fields[key] not in known:
            raise UserError(f"model.{key} '{fields[key]}' is not one of {', '.join(known)}", 2)
    fields["dtype"] = jnp.dtype(fields["dtype"])
    fields["interpolation_scale"] = fields.get("interpolation_scale") or None
    model = SanaTransformer(**with_floats(SanaTransformer, fields))
    blocks = {"control_blocks": model.control_blocks}
    check(blocks, {"control_blocks": whole(0, model.num_layers - 1)}, "model.", exit_code=2)
    cross = model.num_cross_attention_heads * model.cross_attention_head_dim
    width = {"num_attention_heads x attention_head_dim": model.features}
    check(width, dict.fromkeys(width, whole(1, WIDTH)), "model: ", exit_code=2)
    if cross != model.features:
        raise UserError(
            f"model: cross-attention heads x dim is {cross}, but num_attention_heads x attention_head_dim is "
            f"{model.features}; they must be equal",
            exit_code=2,
        )
    return model


_SMALL = dict(num_attention_heads=36, num_layers=28)
_SMALL |= dict(num_cross_attention_heads=16, cross_attention_head_dim=72)
_LARGE = dict(num_attention_heads=70, num_layers=20)
_LARGE |= dict(num_cross_attention_heads=20, cross_attention_head_dim=112)
_DIGITS = dict(in_channels=12, out_channels=12, caption_channels=64, sample_size=8, num_layers=6)
_DIGITS |= dict(num_attention_heads=4, num_cross_attention_heads=4, cross_attention_head_dim=32)
_TEACHER = dict(qk_norm=True, timestep_scale=0.001)
_STUDENT = dict(qk_norm=True, timestep_scale=0.001, guidance_embeds=True)

# Fields of every published size. The "0.6B" model is the deeper and narrower one.
SIZES = {
    "600m": _SMALL | _STUDENT,
    "1600m": _LARGE | _STUDENT,
    "600m-teacher": _SMALL | _TEACHER,
    "1600m-teacher": _LARGE | _TEACHER,
    "sana-600m": _SMALL,
    "sana-1600m": _LARGE,
    "sana1.5-1600m": _LARGE | dict(qk_norm=True),
    "4800m": _LARGE | dict(qk_norm=True, num_layers=60),
    "digits": _DIGITS | _TEACHER,
}
