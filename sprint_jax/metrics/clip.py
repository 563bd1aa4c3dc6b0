"""CLIP, pictures and sentences as vectors of one space, from OpenAI's files and from Hugging Face's.

Source: openai/CLIP (clip/model.py) and transformers (modeling_clip.py); Radford et al., arXiv 2103.00020.
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
MEAN = (
    0.48145466,
    0.4578275,
    0.40821073,
)  # of the pictures of its training, red, green, blue in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

_TEXT = dict(text_layers=12, vocab=49408, context=77)
# Fields of `Clip` by OpenAI's names.
SIZES = {
    "ViT-B/32": dict(
        vision_width=768, vision_layers=12, vision_heads=12, patch=32, image=224, projection=512
    )
    | dict(text_width=512, text_heads=8)
    | _TEXT,
    "ViT-L/14": dict(
        vision_width=1024, vision_layers=24, vision_heads=16, patch=14, image=224, projection=768
    )
    | dict(text_width=768, text_heads=12)
    | _TEXT,
}
SIZES["ViT-L/14@336"] = SIZES["ViT-L/14"] | dict(image=336)
# Places of tokens that some releases of transformers store, and sizes that OpenAI's files store as tensors.
UNUSED = r"(.*embeddings\.position_ids|input_resolution|context_length|vocab_size)"


class VisionEmbeddings(nn.Module):
    """Patches [B, n, n] behind a class token, with their places: [B, 1 + n * n, C]."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        normal, size = nn.initializers.normal(0.02), (self.patch, self.patch)
        conv = nn.Conv(
            self.width, size, size, padding="VALID", use_bias=False, name="patch_embedding"
        )
        x = conv(pixels).reshape(len(pixels), -1, self.width)
        first = self.param("class_embedding", normal, (self.width,))
        first = jnp.broadcast_to(first[None, None], (len(x), 1, self.width))
        x = jnp.concatenate([first, x], axis=1)
        return x + self.param("position_embedding", normal, x.shape[1:])[None]


class Vision(nn.Module):
    """Pixels [B, S, S, 3] to the normed state of the class token [B, C]."""

    width: int
    layers: int
    heads: int
    patch: int
    act: str

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        x = VisionEmbeddings(self.width, self.patch, name="embeddings")(pixels)
        x = _norm("pre_layrnorm")(x)  # so in the files
        encoder = Encoder(self.layers, self.heads, 4 * self.width, self.act, name="encoder")
        return _norm("post_layernorm")(encoder(x)[:, 0])


class TextEmbeddings(nn.Module):
    """Tokens [B, T] with their places: [B, T, C]."""

    width: int
    vocab: int
    context: int

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        normal = nn.initializers.normal(0.02)
        tokens = self.param("token_embedding", normal, (self.vocab, self.width))
        places = self.param("position_embedding", normal, (self.context, self.width))
        return tokens[ids] + places[None, : ids.shape[1]]


class Text(nn.Module):
    """Tokens [B, T] to the normed state of the end token, which has the largest number: [B, C]."""

    width: int
    layers: int
    heads: int
    vocab: int
    context: int
    act: str

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        x = TextEmbeddings(self.width, self.vocab, self.context, name="embeddings")(ids)
        how = dict(causal=True, name="encoder")
        x = Encoder(self.layers, self.heads, 4 * self.width, self.act, **how)(x)
        x = _norm("final_layer_norm")(x)
        return jnp.take_along_axis(x, ids.argmax(1)[:, None, None], 1)[:, 0]


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(1e-5, name=name, use_fast_variance=False)


class Clip(nn.Module):
    """Both towers; call ``image_features`` or ``text_features`` by ``apply(..., method=...)``.

    ``act`` is OpenAI's; no file of weights tells its own, so that it is printed with every number.
    """

    vision_width: int
    vision_layers: int
    vision_heads: int
    patch: int
    image: int
    text_width: int
    text_layers: int
    text_heads: int
    vocab: int
    context: int
    projection: int
    act: str = "quick_gelu"

    def setup(self):
        self.vision_model = Vision(
            self.vision_width, self.vision_layers, self.vision_heads, self.patch, self.act
        )
        self.text_model = Text(
            self.text_width, self.text_layers, self.text_heads, self.vocab, self.context, self.act
        )
        self.visual_projection = nn.Dense(self.projection, use_bias=False)
        self.text_projection = nn.Dense(self.projection, use_bias=False)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(100.0)), ())

    def image_features(self, pixels: Array) -> Array:
        """Pixels [B, S, S, 3], normalized by `MEAN` and `STD`, to [B, projection], of any length."""
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, ids: Array) -> Array:
        """Tokens [B, T] to [B, projection], of any length."""
        return self.text_projection(self.text_model(ids))

    def __call__(self, pixels: Array, ids: Array) -> Array:
        """Cosines of each picture with each sentence times ``exp(logit_scale)``: [B, N]."""
        image, text = (
            x / jnp.linalg.norm(x, axis=-1, keepdims=True)
            for x in (self.image_features(pixels), self.text_features(ids))
        )
        return jnp.exp(self.logit_scale) * image @ text.T


def clip_table(model: Clip) -> dict[str, Entry]:
    """Returns the table from Hugging Face's names to our parameters."""
    struct = jax.ShapeDtypeStruct
    pixels = struct((1, model.image, model.image, 3), "f4")
    shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, struct((1, model.context), "i4"))

    def name(path):
        text = ".".join(path)
        text = re.sub(r"\.(kernel|scale)$", ".weight", text)
        return re.sub(r"\.(token|position)_embedding$", r".\1_embedding.weight", text)

    def layout(path, shape):
        return CONV if len(shape) == 4 else LINEAR if path[-1] == "kernel" else SAME

    return make_table(shapes["params"], name, layout, stacked="layers")


def load_clip(folder: str | Path, shardings: Any = None) -> tuple[Clip, Any]:
    """Loads a network and its float32 parameters, of either family of names.

    Args:
      folder: of transformers, with config.json; or one file of weights, whose heads are then 64 wide, as they
        are in all that OpenAI published.
      shardings: see `interop.files.load_params`.

    Raises:
      UserError: it is missing or damaged, or is another network.
    """
    path = Path(folder)
    single = path / "open_clip_model.safetensors"  # repositories of open_clip: OpenAI's names
    tensors = with_hugging_names(open_weights(single if single.is_file() else path, UNUSED))
    model = Clip(**_fields(tensors, path))
    return model, load_params(clip_table(model), tensors, "float32", shardings)


def _fields(tensors: Tensors, path: Path) -> dict[str, int]:
    """Reads the sizes off the shapes; the widths of heads off config.json, where there is one."""
    shapes = tensors.shapes
    try:
        width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
        cells = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
        vocab, text_width = shapes["text_model.embeddings.token_embedding.weight"]
        context = shapes["text_model.embeddings.position_embedding.weight"][0]
        projection = shapes["visual_projection.weight"][0]
    except KeyError as error:
        raise UserError(f"{tensors.origin}: tensor {error} is missing: is this a CLIP?") from None
    heads = {"vision": width // 64, "text": text_width // 64}
    if path.is_dir() and (path / "config.json").is_file():
        config = read_json(path / "config.json")
        for tower in heads:
            part = config.get(f"{tower}_config") or {}
            if part.get("hidden_act", "quick_gelu") != "quick_gelu":
                raise UserError(
                    f"{path}/config.json: hidden_act {part['hidden_act']!r} is not known"
                )
            heads[tower] = part.get("num_attention_heads", heads[tower])

    def layers(tower):
        found = (re.match(rf"{tower}_model\.encoder\.layers\.(\d+)\.", name) for name in shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    return dict(
        vision_width=width,
        vision_layers=layers("vision"),
        vision_heads=heads["vision"],
        patch=patch,
        image=patch * round(cells**0.5),
        text_width=text_width,
        text_layers=layers("text"),
        text_heads=heads["text"],
        vocab=vocab,
        context=context,
        projection=projection,
    )


# OpenAI's names and Hugging Face's, the longer before what they contain.
_NAMES = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
)
_BLOCK = ((".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".attn.", ".self_attn."))
_BLOCK += ((".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."))


def with_hugging_names(tensors: Tensors) -> Tensors:
    """Returns the tensors of a file with OpenAI's names under Hugging Face's; others as they are."""
    if "visual.proj" not in tensors.shapes:
        return tensors
    shapes, sources = {}, {}
    for name, shape in tensors.shapes.items():
        new = next((b + name[len(a) :] for a, b in _NAMES if name.startswith(a)), name)
        for old, ours in _BLOCK:
            new = new.replace(old, ours)
        if match := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", new):
            size = shape[0] // 3
            for third, letter in enumerate("qkv"):
                part = f"{match[1]}.{letter}_proj.{match[2]}"
                shapes[part] = (size, *shape[1:])
                sources[part] = name, slice(third * size, (third + 1) * size)
        elif name in ("visual.proj", "text_projection"):
            shapes[new], sources[new] = shape[::-1], (name, "transposed")
        else:
            shapes[new], sources[new] = shape, (name, None)

    def read(name):
        source, part = sources[name]
        array = tensors.read(source)
        if part is None:
            return array
        return array.T if part == "transposed" else array[part]

    return Tensors(tensors.origin, shapes, read)
