"""DINOv2, a vision transformer whose class token is the feature of the Frechet DINOv2 distance.

Source: facebookresearch/dinov2 and transformers (modeling_dinov2.py); Oquab et al., arXiv 2304.07193. The
distance: Stein et al., arXiv 2306.04675 (layer6ai-labs/dgm-eval).
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ..core.errors import UserError
from ..core.files import read_json
from ..interop.files import Tensors, load_params
from ..interop.tables import CONV, LINEAR, SAME, Entry, make_table
from .inception import open_weights
from .vit import Encoder

Array = jax.Array
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]
LARGE = dict(width=1024, layers=24, heads=16, patch=14, grid=37)  # ViT-L/14
UNUSED = r"(mask_token|embeddings\.mask_token|classifier\..*)"


class Dinov2(nn.Module):
    """Pixels [B, S, S, 3], normalized by `MEAN` and `STD`, to the normed state of the class token [B, width].

    Attributes:
      grid: patches of a side in training, of which the places are known.
      offset: 0.1 in facebookresearch's code, which stretches the places by (n + 0.1) / grid; 0 in
      transformers.
    """

    width: int
    layers: int
    heads: int
    patch: int
    grid: int
    offset: float = 0.1

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        normal, size = nn.initializers.normal(0.02), (self.patch, self.patch)
        conv = nn.Conv(self.width, size, size, padding="VALID", name="patch_embedding")
        x = conv(pixels)
        places = self.param("position_embedding", normal, (1 + self.grid**2, self.width))
        along, across = (
            jnp.asarray(cubic_matrix(self.grid, new, self.offset)) for new in x.shape[1:3]
        )
        table = places[1:].reshape(self.grid, self.grid, self.width)
        table = jnp.einsum("ai,bj,ijc->abc", along, across, table)
        x = (x + table[None]).reshape(len(x), -1, self.width)
        first = self.param("class_embedding", normal, (self.width,)) + places[0]
        first = jnp.broadcast_to(first[None, None], (len(x), 1, self.width))
        x = jnp.concatenate([first, x], axis=1)
        how = dict(epsilon=1e-6, scaled=True, name="encoder")
        x = Encoder(self.layers, self.heads, 4 * self.width, "gelu", **how)(x)
        return nn.LayerNorm(1e-6, name="layernorm", use_fast_variance=False)(x[:, 0])


def cubic_matrix(old: int, new: int, offset: float = 0.0) -> np.ndarray:
    """Returns the matrix [new, old] of torch's bicubic interpolation of an axis: a = -0.75, not antialiased."""
    if old == new:
        return np.eye(old, dtype=np.float32)
    scale = old / (new + offset)
    places = (np.arange(new) + 0.5) * scale - 0.5
    below = np.floor(places)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(places - (below + tap))
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        weights = np.where(distance <= 1, near, far)
        columns = (below + tap).clip(0, old - 1).astype(int)
        np.add.at(matrix, (np.arange(new), columns), weights)
    return matrix.astype(np.float32)


# Paths of our parameters and Hugging Face's names of them.
_NAMES = {
    "class_embedding": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embedding.kernel": "embeddings.patch_embeddings.projection.weight",
    "patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
}
_BLOCK = (
    ("encoder.layers.", "encoder.layer."),
    ("self_attn.q_proj", "attention.attention.query"),
    ("self_attn.k_proj", "attention.attention.key"),
    ("self_attn.v_proj", "attention.attention.value"),
    ("self_attn.out_proj", "attention.output.dense"),
    ("layer_norm", "norm"),
)


def dinov2_table(model: Dinov2) -> dict[str, Entry]:
    """Returns the table from Hugging Face's names to our parameters."""
    pixels = jax.ShapeDtypeStruct((1, 2 * model.patch, 2 * model.patch, 3), "f4")
    shapes = jax.eval_shape(model.init, jax.random.key(0), pixels)

    def name(path):
        text = ".".join(path)
        for ours, theirs in _BLOCK:
            text = text.replace(ours, theirs)
        text = re.sub(r"(layer_scale\d)$", r"\1.lambda1", text)
        return _NAMES.get(text, re.sub(r"\.(kernel|scale)$", ".weight", text))

    def layout(path, shape):
        return CONV if len(shape) == 4 else LINEAR if path[-1] == "kernel" else SAME

    return make_table(shapes["params"], name, layout, stacked="layers")


def load_dinov2(folder: str | Path, shardings: Any = None) -> tuple[Dinov2, Any]:
    """Loads a network and its float32 parameters, of facebookresearch's names or Hugging Face's.

    Args:
      folder: of transformers, with config.json; or one file of weights, such as
        ``dinov2_vitl14_pretrain.pth``, whose heads are then 64 wide, as all published ones are.
      shardings: see `interop.files.load_params`.

    Raises:
      UserError: it is missing or damaged, or is another network, such as one with registers.
    """
    path = Path(folder)
    found = open_weights(path, UNUSED)
    tensors = _flat(with_hugging_names(found))
    offset = 0.1 if "pos_embed" in found.shapes else 0.0
    try:
        width, _, patch, _ = tensors.shapes["embeddings.patch_embeddings.projection.weight"]
        cells = tensors.shapes["embeddings.position_embeddings"][0] - 1
    except KeyError as error:
        raise UserError(f"{tensors.origin}: tensor {error} is missing: is this DINOv2?") from None
    numbers = (re.match(r"encoder\.layer\.(\d+)\.", name) for name in tensors.shapes)
    layers = 1 + max((int(match[1]) for match in numbers if match), default=-1)
    heads = width // 64
    if path.is_dir() and (path / "config.json").is_file():
        heads = read_json(path / "config.json").get("num_attention_heads", heads)
    model = Dinov2(width, layers, heads, patch, round(cells**0.5), offset)
    return model, load_params(dinov2_table(model), tensors, "float32", shardings)


def _flat(tensors: Tensors) -> Tensors:
    """Drops the leading axes of length 1 that torch's tokens and places have."""
    tokens = ("embeddings.cls_token", "embeddings.position_embeddings")
    shapes = dict(tensors.shapes)
    for name, kept in zip(tokens, (1, 2), strict=True):
        if name in shapes:
            shapes[name] = shapes[name][-kept:]
    return Tensors(tensors.origin, shapes, lambda name: tensors.read(name).reshape(shapes[name]))


_THEIRS = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    ("norm.", "layernorm."),
)


def with_hugging_names(tensors: Tensors) -> Tensors:
    """Returns the tensors of a file with facebookresearch's names under Hugging Face's; others as they are."""
    if "pos_embed" not in tensors.shapes:
        return tensors
    shapes, sources = {}, {}
    for name, shape in tensors.shapes.items():
        new = next((b + name[len(a) :] for a, b in _THEIRS if name.startswith(a)), name)
        new = re.sub(r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1", new)
        new = new.replace(".attn.proj.", ".attention.output.dense.")
        if match := re.fullmatch(r"(.*)\.attn\.qkv\.(weight|bias)", new):
            size = shape[0] // 3
            for third, part in enumerate(("query", "key", "value")):
                part = f"{match[1]}.attention.attention.{part}.{match[2]}"
                shapes[part] = (size, *shape[1:])
                sources[part] = name, slice(third * size, (third + 1) * size)
        else:
            shapes[new], sources[new] = shape, (name, slice(None))

    def read(name):
        source, part = sources[name]
        return tensors.read(source)[part]

    return Tensors(tensors.origin, shapes, read)
