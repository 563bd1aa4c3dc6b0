"""Tables of SanaTransformer and of its control branch: names, layouts and configs of diffusers.

Its classes are SanaTransformer2DModel and SanaControlNetModel.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from ..core.errors import UserError
from ..core.ranges import MODEL, SHARE, SIZE
from ..core.schema import check, optional
from ..models.control import PUBLISHED_BLOCKS
from ..models.sana import SanaTransformer, from_fields
from .tables import DEPTHWISE, LINEAR, POINTWISE, SAME, Entry, Layout, make_table

# Fields that are config keys of the same name and meaning.
_SHARED = (
    "in_channels",
    "out_channels",
    "caption_channels",
    "sample_size",
    "patch_size",
    "num_layers",
    "mlp_ratio",
    "num_attention_heads",
    "attention_head_dim",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "attention_bias",
    "guidance_embeds",
    "timestep_scale",
    "interpolation_scale",
)
# Config keys with the one value that the network supports, which is also diffusers' default.
_FIXED = {"norm_elementwise_affine": False, "norm_eps": 1e-6, "guidance_embeds_scale": 0.1}
_CONTROL_FIXED = {key: _FIXED[key] for key in ("norm_elementwise_affine", "norm_eps")}
_CONTROL = tuple(key for key in _SHARED if key not in ("guidance_embeds", "timestep_scale"))
_KINDS = {key: MODEL[key] for key in _SHARED} | {"dropout": SHARE, "cross_attention_dim": SIZE}
_KINDS |= {"out_channels": optional(SIZE)}
_QK_NORM = "rms_norm_across_heads"


def sana_table(fields: dict[str, Any]) -> dict[str, Entry]:
    """Returns the table of a transformer by its fields, without the logvar head, which diffusers lacks.

    Raises:
      UserError: for a flow map.
    """
    model = from_fields(fields, logvar=False, control_blocks=0)
    if model.flow_map:
        raise UserError(
            "a flow map has the time to which it jumps as an input, which SANA's published classes lack: "
            "use its workdir, or --format stablehlo"
        )
    # The inputs are shapes as well: a config may ask for any size.
    shapes = jax.eval_shape(lambda key: model.init(key, *example_inputs(model)), jax.random.key(0))
    return make_table(
        shapes["params"],
        lambda path: _name(path, model.guidance_embeds),
        lambda path, _: _layout(path, model),
        stacked="transformer_blocks",
    )


def control_table(fields: dict[str, Any]) -> dict[str, Entry]:
    """Returns the table of a transformer's control branch, whose leaves are those under ``control``.

    Raises:
      UserError: there is none.
    """
    model = from_fields(fields, logvar=False, flow_map=False)
    if not model.control_blocks:
        raise UserError("this network has no control branch: its control_blocks is 0")
    shapes = jax.eval_shape(lambda key: model.init(key, *example_inputs(model)), jax.random.key(0))
    return make_table(
        shapes["params"]["control"],
        _control_name,
        lambda path, _: _layout(path, model),
        stacked="transformer_blocks",
    )


def example_inputs(model: SanaTransformer) -> tuple:
    """Returns the smallest inputs of a transformer, zeros, for `jax.eval_shape` and ``init``."""
    p = model.patch_size
    inputs = (
        jnp.zeros((1, p, p, model.in_channels)),
        jnp.zeros(1),
        jnp.zeros((1, 1, model.caption_channels)),
        jnp.ones((1, 1), jnp.int32),
    )
    return inputs + (jnp.zeros(1),) if model.guidance_embeds else inputs


def fields_from_config(config: dict[str, Any], origin: str) -> dict[str, Any]:
    """Returns fields of SanaTransformer from a diffusers config without its private keys.

    Diffusers' Sprint pipelines give a network with guidance the flow time in [0, 1], whatever its
    ``timestep_scale`` is; our field is then 0.001.

    Raises:
      UserError: a key is unknown, or has a value that the network does not support.
    """
    known = {*_SHARED, *_FIXED, "qk_norm", "cross_attention_dim", "dropout"}
    unknown = sorted(set(config) - known)
    if unknown:
        raise UserError(f"{origin}: key '{unknown[0]}' is unknown")
    check(config, _KINDS, f"{origin}: ")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{origin}: {key} {config[key]!r} is not supported, only {value!r}")
    if config.get("qk_norm") not in (None, _QK_NORM):
        raise UserError(f"{origin}: qk_norm {config['qk_norm']!r} is not None or {_QK_NORM!r}")
    fields = {key: config[key] for key in _SHARED if key in config}
    fields["qk_norm"] = config.get("qk_norm") is not None
    if fields.get("out_channels", 32) is None:
        fields["out_channels"] = fields.get("in_channels", 32)
    if fields.get("guidance_embeds"):
        fields["timestep_scale"] = 0.001
    try:
        model = from_fields(fields)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    width = config.get("cross_attention_dim", model.features)
    if width != model.features:
        raise UserError(
            f"{origin}: cross_attention_dim {width} differs from the width {model.features}"
        )
    return fields


def control_fields(config: dict[str, Any], fields: dict[str, Any], origin: str) -> dict[str, Any]:
    """Returns a trunk's fields with those of a branch that a config of SanaControlNetModel describes.

    Args:
      config: without its private keys.
      fields: of the trunk, a SanaTransformer.

    Raises:
      UserError: a key is unknown or has a value that is not supported, or the branch is of another trunk.
    """
    unknown = sorted(set(config) - {*_CONTROL, *_CONTROL_FIXED, "cross_attention_dim", "dropout"})
    if unknown:
        raise UserError(f"{origin}: key '{unknown[0]}' is unknown")
    check(config, _KINDS, f"{origin}: ")
    model = from_fields(fields)
    like = config_from_fields(fields)
    for key in set(config) - {"num_layers", "out_channels", "sample_size", "dropout"}:
        if config[key] != like.get(key, config[key]):
            raise UserError(
                f"{origin}: {key} {config[key]!r}, but {like[key]!r} in the transformer"
            )
    if model.qk_norm:
        raise UserError(f"{origin}: copies without QK norm, of a transformer that has it")
    blocks = config.get("num_layers", PUBLISHED_BLOCKS)
    found = dict(fields) | {"control_blocks": blocks, "control_wiring": "diffusers"}
    try:
        from_fields(found)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return found


def control_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of diffusers' SanaControlNetModel for the control branch of a SanaTransformer.

    Raises:
      UserError: there is none, or one that this class cannot hold.
    """
    model = from_fields(fields)
    if not model.control_blocks:
        raise UserError("this network has no control branch: its control_blocks is 0")
    if model.qk_norm:
        raise UserError(
            "diffusers' SanaControlNetModel has no QK norm and cannot hold this branch, whose copied blocks "
            "have it: use its workdir, a .pth file of NVlabs, or --format stablehlo"
        )
    config = {key: getattr(model, key) for key in _CONTROL} | {"num_layers": model.control_blocks}
    return config | {"cross_attention_dim": model.features, "dropout": 0.0} | _CONTROL_FIXED


def config_from_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of diffusers' SanaTransformer2DModel for fields of SanaTransformer."""
    model = from_fields(fields)
    config = {key: getattr(model, key) for key in _SHARED}
    config["qk_norm"] = _QK_NORM if model.qk_norm else None
    return config | {"cross_attention_dim": model.features, "dropout": 0.0} | _FIXED


def _name(path: tuple[str, ...], guidance_embeds: bool) -> str:
    """'transformer_blocks', '3', 'attn1', 'to_out_0', 'kernel' ->
    'transformer_blocks.3.attn1.to_out.0.weight'."""
    *modules, leaf = path
    if modules[:2] == ["time_embed", "timestep_embedder"] and not guidance_embeds:
        modules.insert(1, "emb")
    leaf = "weight" if leaf == "kernel" else leaf
    return re.sub(r"to_out_(\d)", r"to_out.\1", ".".join([*modules, leaf]))


def _control_name(path: tuple[str, ...]) -> str:
    if path[0] == "before_proj":
        return _name(("input_block", *path[1:]), False)
    if path[0] == "transformer_blocks" and path[2] == "after_proj":
        return _name(("controlnet_blocks", path[1], *path[3:]), False)
    return _name(path, False)


def _layout(path: tuple[str, ...], model: SanaTransformer) -> Layout:
    module, leaf = path[-2:] if len(path) > 1 else ("", path[0])
    if leaf != "kernel":
        return SAME
    if module == "proj":
        return _patches(model.patch_size)
    if module == "conv_depth":
        return DEPTHWISE
    return POINTWISE if module in ("conv_inverted", "conv_point") else LINEAR


def _patches(p: int) -> Layout:
    """[out, in, p, p] and [p * p * in, out]."""
    return Layout(
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
        lambda a: a.reshape(p, p, -1, a.shape[-1]).transpose(3, 2, 0, 1),
    )
