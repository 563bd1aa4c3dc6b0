"""Checkpoints of NVlabs/Sana, the authors' code: transformers in ``.pth`` files, with their control branch.

Names are translated to those of diffusers (`sana_table`); queries, keys and values that share a tensor are
parts of it along the first axis. Files are read by torch's weights-only loader, which runs no code that a
file might hold. Reading and writing needs torch.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from .diffusers import logvar_table
from .files import Tensors, import_torch, load_params, open_torch, to_torch
from .sana import control_table, sana_table
from .tables import SAME, Entry, check_names

KEY = "state_dict"  # the entry of a file that holds the tensors
# NVlabs' modules save these beside their parameters: text features of the empty prompt, and positions.
_BUFFERS = ("y_embedder.y_embedding", "pos_embed")

_CONTROL = "controlnet."  # how names of a control branch begin

# Diffusers' modules and NVlabs'. Modules of the same NVlabs name follow one another in its tensor.
_OUTER = {
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
    "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "scale_shift_table": "final_layer.scale_shift_table",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "scale_shift_table": "scale_shift_table",
    "attn1.to_q": "attn.qkv",
    "attn1.to_k": "attn.qkv",
    "attn1.to_v": "attn.qkv",
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_k": "cross_attn.kv_linear",
    "attn2.to_v": "cross_attn.kv_linear",
    "attn2.norm_q": "cross_attn.q_norm",
    "attn2.norm_k": "cross_attn.k_norm",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.conv_inverted": "mlp.inverted_conv.conv",
    "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv",
}


def load_transformer(
    path: str | Path,
    fields: dict[str, Any],
    dtype: Any = jnp.float32,
    *,
    shardings: Callable | None = None,
) -> tuple[dict[str, Any], Any]:
    """Loads the transformer of a ``.pth`` file of NVlabs/Sana.

    Args:
      path: the file; only its entry 'state_dict' is read.
      fields: of SanaTransformer, which the file does not hold: one of ``SIZES``, for a Sprint model
        '600m' or '1600m', for its teacher '600m-teacher' or '1600m-teacher'.
      dtype: of the parameters returned.
      shardings: see `files.load_params`.

    Returns:
      ``(fields, params)``: fields for ``SanaTransformer(**fields)``, with ``logvar`` where the file has
      that head, and with those of a control branch where it has one. The buffers
      ``y_embedder.y_embedding`` and ``pos_embed`` are left out.

    Raises:
      UserError: torch is not installed; the file is missing, damaged or holds code; a tensor is unknown,
        missing, of another shape or not of floating point.
    """
    found = open_torch(Path(path), KEY)
    head = {n: s for n, s in found.shapes.items() if n.startswith("logvar_linear.")}
    branch = {n: s for n, s in found.shapes.items() if n.startswith(_CONTROL)}
    apart = {*head, *branch, *_BUFFERS}
    body = {n: s for n, s in found.shapes.items() if n not in apart}
    fields = {key: value for key, value in fields.items() if key != "logvar"}
    fields |= _control_fields(found.shapes) if branch or fields.get("control_blocks") else {}
    table, names = sana_table(fields), nvlabs_names(fields)
    tensors = _under_diffusers_names(found._replace(shapes=body), table, names)
    params = load_params(table, tensors, dtype, shardings)
    if branch:
        params["control"] = load_control(path, fields, dtype, shardings)
    if head:
        side = found._replace(shapes=head)
        params |= load_params(logvar_table(fields), side, dtype, shardings)
        fields["logvar"] = True
    return fields, params


def load_control(
    path: str | Path,
    fields: dict[str, Any],
    dtype: Any = jnp.float32,
    shardings: Callable | None = None,
    allow_nonfinite: bool = False,
) -> Any:
    """Loads the control branch alone of a ``.pth`` file of NVlabs/Sana, which goes under ``control``.

    Arguments and errors are those of `load_transformer`; the fields have the branch's (`read_control_fields`).
    """
    found = open_torch(Path(path), KEY)
    branch = {n: s for n, s in found.shapes.items() if n.startswith(_CONTROL)}
    table, names = control_table(fields), control_names(fields)
    tensors = _under_diffusers_names(found._replace(shapes=branch), table, names)
    return load_params(table, tensors, dtype, shardings, allow_nonfinite)


def save_transformer(
    path: str | Path, fields: dict[str, Any], params: Any, dtype: Any = jnp.float32
) -> None:
    """Writes a ``.pth`` file for NVlabs' code, without the buffers, which that code makes itself.

    The host holds a second copy of the model while it is written.

    Args:
      path: the file, which appears when it is whole.
      fields: of SanaTransformer; params: its parameters.
      dtype: of the weights written, float32 or bfloat16.

    Raises:
      UserError: torch is not installed.
    """
    path = Path(path)
    torch = import_torch(path)

    def tensor(array):
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    arrays = to_nvlabs(params, fields, dtype)
    partial = path.with_name(path.name + ".partial")
    torch.save({KEY: {name: tensor(array) for name, array in arrays.items()}}, partial)
    partial.replace(path)


def to_nvlabs(
    params: Any, fields: dict[str, Any], dtype: Any = jnp.float32
) -> dict[str, np.ndarray]:
    """Returns arrays under NVlabs' names, with the logvar head and the control branch if there are any.

    Raises:
      UserError: the branch has embedders of its own, which this code's has not.
    """

    def join(table, names, params):
        return {
            name: np.concatenate([to_torch(params, table[part], dtype) for part in parts])
            for name, parts in names.items()
        }

    arrays = join(sana_table(fields), nvlabs_names(fields), params)
    if "control" in params:
        if fields.get("control_wiring", "nvlabs") != "nvlabs":
            raise UserError(
                "a control branch that is wired as in diffusers has embedders of its own, for which NVlabs' "
                ".pth files have no names: write a folder of diffusers"
            )
        arrays |= join(control_table(fields), control_names(fields), params["control"])
    if "logvar_linear" in params:
        head = logvar_table(fields).items()
        arrays |= {name: to_torch(params, entry, dtype) for name, entry in head}
    return arrays


def read_fields(path: str | Path, like: dict[str, Any]) -> dict[str, Any]:
    """Returns ``like`` with the depth, QK norm and guidance embedding that a file's tensors have.

    Raises:
      UserError: the file cannot be read, as in `load_transformer`, or has no blocks.
    """
    names = open_torch(Path(path), KEY).shapes
    blocks = {int(name.split(".")[1]) for name in names if re.match(r"blocks\.\d+\.", name)}
    if not blocks:
        raise UserError(f"{path} has no tensor blocks.0.*: is it a transformer of NVlabs/Sana?")
    return dict(like) | {
        "num_layers": max(blocks) + 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in names,
        "guidance_embeds": "cfg_embedder.mlp.0.weight" in names,
        **_control_fields(names),
    }


def read_control_fields(path: str | Path) -> dict[str, Any]:
    """Returns the fields of the control branch in a file; UserError if it has none."""
    fields = _control_fields(open_torch(Path(path), KEY).shapes)
    if not fields["control_blocks"]:
        raise UserError(
            f"{path} has no tensor {_CONTROL}0.*: it is of a network without a control branch"
        )
    return fields


def _control_fields(names) -> dict[str, Any]:
    """The fields of a file's control branch, by the names of its tensors."""
    copies = {name.split(".")[1] for name in names if name.startswith(_CONTROL)}
    return {"control_blocks": len(copies), "control_wiring": "nvlabs"}


def nvlabs_names(fields: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Maps each NVlabs name to diffusers' names of its parts, in order along the first axis."""
    names: dict[str, tuple[str, ...]] = {}
    rank = {module: i for i, module in enumerate((*_OUTER, *_BLOCK))}
    for name in sorted(sana_table(fields), key=lambda name: rank[_split(name)[1]]):
        block, module, leaf = _split(name)
        theirs = f"blocks.{block}.{_BLOCK[module]}{leaf}" if block else _OUTER[module] + leaf
        names[theirs] = (*names.get(theirs, ()), name)
    return names


def control_names(fields: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """`nvlabs_names` of the tensors of a control branch."""
    names: dict[str, tuple[str, ...]] = {}
    rank = {module: i for i, module in enumerate(_BLOCK)}
    for name in sorted(control_table(fields), key=lambda name: rank.get(_split(name)[1], -1)):
        block, module, leaf = _split(name)
        if block:
            theirs = f"{_CONTROL}{block}.copied_block.{_BLOCK[module]}{leaf}"
        elif module == "input_block":
            theirs = f"{_CONTROL}0.before_proj{leaf}"
        else:
            theirs = f"{_CONTROL}{module.removeprefix('controlnet_blocks.')}.after_proj{leaf}"
        names[theirs] = (*names.get(theirs, ()), name)
    return names


def _split(name: str) -> tuple[str | None, str, str]:
    """'transformer_blocks.3.attn1.to_q.weight' -> '3', 'attn1.to_q', '.weight'."""
    match = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?(.*?)(\.weight|\.bias|)", name)
    return match.groups()


def _under_diffusers_names(
    found: Tensors, table: dict[str, Entry], names: dict[str, tuple[str, ...]]
) -> Tensors:
    """Returns the tensors of an NVlabs file under diffusers' names.

    Raises:
      UserError: a tensor is unknown, missing, or of another shape; the message has its NVlabs name.
    """
    whole = {}
    for name, parts in names.items():
        first, *rest = table[parts[0]].shape
        whole[name] = Entry((), None, SAME, (first * len(parts), *rest))
    check_names(whole, found.shapes, found.origin)
    where = {part: (name, i) for name, parts in names.items() for i, part in enumerate(parts)}

    def read(part):
        name, i = where[part]
        rows = table[part].shape[0]
        return found.read(name)[i * rows : (i + 1) * rows]

    return Tensors(found.origin, {part: table[part].shape for part in where}, read)
