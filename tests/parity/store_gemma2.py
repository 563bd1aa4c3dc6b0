"""Stores a tiny Gemma-2 and its tokenizer, and what transformers and diffusers compute with them, for the
tests that have no torch.

python tests/parity/store_gemma2.py
"""

import inspect
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline
from helpers.reference import tiny_gemma2, tiny_tokenizer
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "stored" / "gemma2"
LENGTH = 12
PROMPTS = ["", "A red cat on a wall", " 一只 🐈\n", "a cat " * 20]
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, sliding_window=9)


def main() -> None:
    defaults = inspect.signature(SanaPipeline.__call__).parameters
    instruction = defaults["complex_human_instruction"].default
    tokenizer = tiny_tokenizer([*instruction, *PROMPTS], 440)
    tokenizer.save_pretrained(FOLDER / "tokenizer")
    path = FOLDER / "tokenizer" / "tokenizer.json"
    compact = json.dumps(json.loads(path.read_text()), separators=(",", ":"), ensure_ascii=False)
    path.write_text(compact)
    model = tiny_gemma2(vocab_size=len(tokenizer), **SMALL)
    model.save_pretrained(FOLDER / "text_encoder")

    parts = dict(vae=None, transformer=None, scheduler=None)
    pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=model, **parts)
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (3, 20), np.int32)
    mask = (np.arange(20)[None] < np.array([1, 13, 20])[:, None]).astype(np.int32)
    with torch.no_grad():
        hidden = model(torch.tensor(ids), attention_mask=torch.tensor(mask))[0]
        text, kept, negative_text, negative_mask = pipeline.encode_prompt(
            PROMPTS,
            negative_prompt=PROMPTS,
            device="cpu",
            max_sequence_length=LENGTH,
            complex_human_instruction=instruction,
        )
    tensors = dict(
        hidden=hidden,
        text=text,
        kept=kept,
        negative_text=negative_text,
        negative_mask=negative_mask,
    )
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()} | dict(ids=ids, mask=mask)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    prompts = json.dumps(PROMPTS)
    save_file(arrays, FOLDER / "arrays.safetensors", metadata={"prompts": prompts})


if __name__ == "__main__":
    main()
