"""Small networks of random weights for the tests of `evaluate`, as files that it loads."""

import json
from pathlib import Path

from helpers.metric_pictures import random_tensors
from safetensors.numpy import save_file

from sprint_jax.metrics import clip, dinov2
from sprint_jax.metrics.clip_tokenizer import BEGIN, END

CLIP = dict(vision_width=32, vision_layers=1, vision_heads=2, patch=8, image=16, projection=16)
CLIP |= dict(text_width=32, text_layers=1, text_heads=2, vocab=514, context=12)


def write_clip(folder: Path) -> Path:
    """Writes a CLIP of one layer whose tokens are bytes, and returns the folder."""
    folder.mkdir()
    table = clip.clip_table(clip.Clip(**CLIP))
    shapes = {name: entry.shape for name, entry in table.items()}
    save_file(random_tensors(shapes, 1), folder / "model.safetensors")
    heads = {f"{tower}_config": {"num_attention_heads": 2} for tower in ("vision", "text")}
    (folder / "config.json").write_text(json.dumps(heads))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(68)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), BEGIN, END]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def write_dinov2(path: Path) -> Path:
    """Writes a DINOv2 of one layer, and returns the file."""
    table = dinov2.dinov2_table(dinov2.Dinov2(64, 1, 1, 56, 3))
    tensors = random_tensors({name: entry.shape for name, entry in table.items()}, 2)
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        tensors[name] = tensors[name].reshape(1, -1, 64)
    save_file(tensors, path)
    return path
