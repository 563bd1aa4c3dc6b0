"""The control branch (ControlNet): copies of the first blocks that read a condition and steer the others.

The condition is a picture of lines, white on black, as latents of the autoencoder. A second stream of tokens
runs through N copied blocks beside blocks 1 to N of the trunk; a linear layer behind each copy gives what is
added to the trunk's tokens, times a scale. Two wirings of the same weights are in use:

* ``nvlabs``, with which published branches were trained: the stream starts at the output of block 0 plus
  ``before_proj`` of the embedded condition, shares the trunk's embedders, and its k-th residual is added
  before block k + 1;
* ``diffusers``: the stream starts at the embedded latents plus ``before_proj`` of the embedded condition,
  with embedders of its own, and its k-th residual is added behind block k + 1.

At scale 0, and while a branch is new, the result is the trunk's bit for bit. The one exception is bfloat16 with
blocks that are not scanned: XLA then keeps more digits between operations than bfloat16 has, in either program
elsewhere (``xla_allow_excess_precision``).

A branch's parameters lie in the trunk's, under ``control``:

* ``before_proj``;
* ``transformer_blocks``, leaves [N, ...]: the copies, and ``after_proj`` behind each;
* in the wiring of diffusers also ``patch_embed``, ``time_embed``, ``caption_projection``, ``caption_norm``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .blocks import Side, stack
from .layers import (
    CaptionProjection,
    Linear,
    PatchEmbed,
    RMSNorm,
    TimeEmbedding,
    wide,
)

Array = jax.Array
Params = Any

WIRINGS = ("nvlabs", "diffusers")
EMBEDDERS = ("patch_embed", "time_embed", "caption_projection", "caption_norm")
PUBLISHED_BLOCKS = 7  # copies of the published branches, whatever the trunk's size


class Control(NamedTuple):
    """A condition and how strongly it steers.

    Attributes:
      latents: [B, h, w, C] of the control image, as the autoencoder gives them: no factor ``sigma_d``.
      scale: of the residuals, a scalar or [B]; 0 leaves the trunk as it is, 1 is what a branch is trained with.
    """

    latents: Array
    scale: Array | float = 1.0

    def doubled(self) -> "Control":
        """Each sample twice, as neighbours: for the two halves of classifier-free guidance."""
        scale = jnp.broadcast_to(jnp.asarray(self.scale, jnp.float32), self.latents.shape[:1])
        return Control(jnp.repeat(self.latents, 2, axis=0), jnp.repeat(scale, 2))


def new_branch(trunk: Params, blocks: int, wiring: str) -> Params:
    """The parameters of a new branch, which changes nothing yet: copies of the trunk's, and zeros.

    Args:
      trunk: parameters of a SanaTransformer.
      blocks: how many of its first blocks are copied.
    """

    def copied(tree):
        return jax.tree.map(jnp.copy, tree)

    copies = jax.tree.map(lambda leaf: leaf[:blocks], stack(trunk["transformer_blocks"]))
    table = copies["scale_shift_table"]
    width = table.shape[-1]

    def linear(*layers):
        kernel, bias = (jnp.zeros((*layers, *shape)) for shape in ((width, width), (width,)))
        return {"kernel": kernel.astype(table.dtype), "bias": bias.astype(table.dtype)}

    branch = {"before_proj": linear()}
    branch["transformer_blocks"] = copied(copies) | {"after_proj": linear(blocks)}
    if wiring == "diffusers":
        branch |= {name: copied(trunk[name]) for name in EMBEDDERS}
        times = ("timestep_embedder", "linear")  # the copies see no guidance
        branch["time_embed"] = {name: branch["time_embed"][name] for name in times}
    return branch


def side_stream(
    model: Any,
    params: Params,
    scale: Array | float,
    tokens: Array,
    condition: Array,
    layers: tuple[Callable, Callable],
) -> Side:
    """The second stream as `blocks.run_blocks` runs it.

    Args:
      model: the SanaTransformer.
      params: of the branch.
      scale: a scalar or [B].
      tokens, condition: embedded latents of the sample and of the condition, [B, h, w, d].
      layers: ``layer(params, x)`` of the trunk's blocks and of the copies.
    """
    base, copy = layers
    nvlabs = model.control_wiring == "nvlabs"
    linear = Linear(model.features, dtype=model.dtype, parent=None)
    scale = jnp.broadcast_to(wide(jnp.asarray(scale)), tokens.shape[:1])[:, None, None, None]

    def enter(x: Array) -> Array:
        return (x if nvlabs else tokens) + linear.apply(
            {"params": params["before_proj"]}, condition
        )

    def step(params, streams):
        (base_params, copy_params), (x, side) = params, streams
        side = copy({k: copy_params[k] for k in copy_params if k != "after_proj"}, side)
        after = model.gathered({"after_proj": copy_params["after_proj"]})["after_proj"]
        residual = (scale * linear.apply({"params": after}, side)).astype(x.dtype)
        x = base(base_params, x + residual) if nvlabs else base(base_params, x) + residual
        return x, side

    return Side(params["transformer_blocks"], model.control_blocks, enter, step)


def own_embeddings(model: Any, params: Params, x: Array, latents: Array, t: Array, text: Array):
    """Inputs of a branch with embedders of its own.

    Args:
      params: of the branch.
      x, latents: noisy latents and the condition, [B, h, w, C]; t: as the time embedding takes it, [B].
      text: features [B, L, caption_channels].

    Returns:
      ``(tokens, condition's tokens, text [B, L, d], t6 [B, 6, d])``.
    """
    width, dtype = model.features, model.dtype

    def apply(name, kind, *inputs, **fields):
        return kind(**fields, parent=None).apply({"params": params[name]}, *inputs)

    def embed(a):
        patches = model.patches(a)
        return model.at_positions(
            apply("patch_embed", PatchEmbed, patches, features=width, dtype=dtype)
        )

    how = dict(features=width, guidance_embeds=False)
    _, t6 = apply("time_embed", TimeEmbedding, t, None, **how)
    text = apply("caption_projection", CaptionProjection, text, features=width, dtype=dtype)
    return embed(x), embed(latents), apply("caption_norm", RMSNorm, text, dtype=dtype), t6
