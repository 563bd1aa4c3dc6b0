"""A whole pipeline folder with random weights, for machines where no published one can be downloaded."""

import concurrent.futures
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from ..core.files import write_json_atomic
from ..interop.diffusers import save_autoencoder, save_transformer
from ..interop.gemma2 import save_text_encoder
from ..interop.sana import example_inputs
from ..models.dc_ae import AutoencoderDC
from ..models.gemma2 import Gemma2
from ..models.sana import SanaTransformer
from .workloads import STUDENTS

INDEX = {
    "_class_name": "SanaSprintPipeline",
    "scheduler": ["diffusers", "SCMScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}
SCHEDULER = {
    "_class_name": "SCMScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "trigflow",
    "sigma_data": 0.5,
}
# Sizes for CPUs, that say nothing: a latent is 32 x 32 pixels, as in the published autoencoder.
TINY_FIELDS = STUDENTS["tiny"] | dict(in_channels=4, out_channels=4, caption_channels=32)
TINY_FIELDS |= dict(num_layers=2, num_attention_heads=2)
TINY_FIELDS |= dict(num_cross_attention_heads=2, cross_attention_head_dim=32)
_STAGES = dict(block_types=("ResBlock",) * 6, block_out_channels=(8,) * 6)
_STAGES |= dict(layers_per_block=(1,) * 6, qkv_multiscales=((),) * 6)
TINY_AUTOENCODER = AutoencoderDC(
    latent_channels=4,
    **{f"{half}_{name}": v for half in ("encoder", "decoder") for name, v in _STAGES.items()},
)
TINY_GEMMA = Gemma2(512, 32, 48, 1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
STACKED = ("transformer_blocks", "layers")  # their leaves have an axis of layers first
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # with Gemma's numbers


def write_random_pipeline(
    folder: Path,
    fields: dict[str, Any],
    texts: Iterable[str],
    *,
    autoencoder: AutoencoderDC,
    gemma: Gemma2,
    dtype: Any,
    base: Path | None = None,
) -> None:
    """Writes a folder that `SprintPipeline` and diffusers' SanaSprintPipeline load; the index comes last.

    Weights keep the scale of activations about, and no layer is zero. Words and signs of ``texts`` are a token
    each, others are one token together.

    Args:
      folder: made if missing.
      fields: of SanaTransformer.
      dtype: of the weights.
      base: such a folder, to whose autoencoder, text encoder and tokenizer the new one links.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = SanaTransformer(**fields)

    def network(key):
        return model.init(key, *example_inputs(model))["params"]

    save_transformer(folder / "transformer", fields, _drawn(network, dtype), dtype)
    for part in ("vae", "text_encoder", "tokenizer") if base else ():
        (folder / part).unlink(missing_ok=True)
        (folder / part).symlink_to((base / part).resolve(), target_is_directory=True)
    if base is None:
        save_autoencoder(folder / "vae", autoencoder, _drawn(autoencoder.init, dtype), dtype)
        save_text_encoder(folder / "text_encoder", gemma, _drawn(gemma.init, dtype), dtype)
        _write_tokenizer(folder / "tokenizer", texts, gemma.vocab_size)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json_atomic(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json_atomic(folder / "model_index.json", INDEX)


def _drawn(init: Callable, dtype: Any) -> Any:
    """Parameters of the shapes of ``init(key)``, as NumPy arrays."""
    found, tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(init, jax.random.key(0)))

    def draw(number: int) -> np.ndarray:
        path, leaf = found[number]
        first, *_, last = (str(key.key) for key in (path[0], *path))
        array = np.random.default_rng(number).standard_normal(leaf.shape, np.float32)
        shape = leaf.shape[1:] if first in STACKED else leaf.shape
        if last == "weight" and len(shape) == 1:  # of a norm
            array = 1 + 0.02 * array
        elif last == "bias":
            array *= 0.02
        elif last == "scale_shift_table":
            array /= shape[-1] ** 0.5
        elif last != "weight":
            array /= math.prod(shape[:-1]) ** 0.5
        return array.astype(dtype)

    # The generators leave Python's lock to one another.
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return tree.unflatten(pool.map(draw, range(len(found))))


def _write_tokenizer(folder: Path, texts: Iterable[str], most: int) -> None:
    """Writes a tokenizer of words and signs, of at most ``most`` tokens, as transformers and ours read them."""
    folder.mkdir(exist_ok=True)
    split = tokenizers.pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words][:most])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=SPECIAL[3]))
    made.pre_tokenizer = split
    begin = SPECIAL[2]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    made.add_special_tokens(list(SPECIAL))
    made.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right"}
    write_json_atomic(folder / "tokenizer_config.json", kind | names)
