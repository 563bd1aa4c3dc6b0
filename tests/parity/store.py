"""Stores tiny networks of diffusers and transformers and their outputs, for the tests that have no torch.

python tests/parity/store.py
"""

import inspect
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline
from helpers import reference
from safetensors.numpy import save_file

STORED = Path(__file__).parent / "stored"
WIDTH = dict(num_attention_heads=3, attention_head_dim=4, cross_attention_dim=12, num_layers=2)
WIDTH |= dict(num_cross_attention_heads=2, cross_attention_head_dim=6)
SANA = {
    "student": dict(guidance_embeds=True, out_channels=6),
    "teacher": dict(patch_size=2, interpolation_scale=2.0, num_layers=1),
}
LENGTH = 12
PROMPTS = ["", "A red cat on a wall", " 一只 🐈\n", "a cat " * 20]
GEMMA2 = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, sliding_window=9)


def save_arrays(folder: Path, arrays: dict, **metadata) -> None:
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items() if a is not None}
    save_file(arrays, folder / "arrays.safetensors", metadata=metadata or None)


def store_sana() -> None:
    for name, changes in SANA.items():
        model = reference.tiny_sana(**(WIDTH | changes))
        model.save_pretrained(STORED / "sana" / name)
        inputs = reference.sana_inputs(model.config, (4, 6))
        arrays = dict(zip(("x", "t", "text", "mask", "guidance"), inputs, strict=True))
        save_arrays(
            STORED / "sana" / name, arrays | {"velocity": reference.sana_velocity(model, *inputs)}
        )


def store_dc_ae() -> None:
    model = reference.tiny_dc_ae()
    model.save_pretrained(STORED / "dc_ae")
    random = np.random.default_rng(0)
    pixels = random.uniform(-1, 1, (2, 24, 32, 3)).astype(np.float32)
    latents = random.normal(size=(2, 6, 8, 4)).astype(np.float32)
    encoded = reference.channels_last(model.encode(reference.channels_first(pixels)).latent)
    decoded = reference.channels_last(model.decode(reference.channels_first(latents)).sample)
    arrays = dict(pixels=pixels, encoded=encoded, latents=latents, decoded=decoded)
    save_arrays(STORED / "dc_ae", arrays)


def store_gemma2() -> None:
    folder = STORED / "gemma2"
    parameters = inspect.signature(SanaPipeline.__call__).parameters
    instruction = parameters["complex_human_instruction"].default
    tokenizer = reference.tiny_tokenizer([*instruction, *PROMPTS], 440)
    tokenizer.save_pretrained(folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    compact = json.dumps(json.loads(path.read_text()), separators=(",", ":"), ensure_ascii=False)
    path.write_text(compact)
    model = reference.tiny_gemma2(vocab_size=len(tokenizer), **GEMMA2)
    model.save_pretrained(folder / "text_encoder")

    parts = dict(vae=None, transformer=None, scheduler=None)
    pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=model, **parts)
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (3, 20), np.int32)
    mask = (np.arange(20)[None] < np.array([1, 13, 20])[:, None]).astype(np.int32)
    hidden = model(torch.tensor(ids), attention_mask=torch.tensor(mask))[0]
    how = dict(max_sequence_length=LENGTH, complex_human_instruction=instruction)
    tensors = pipeline.encode_prompt(PROMPTS, negative_prompt=PROMPTS, device="cpu", **how)
    names = ("text", "kept", "negative_text", "negative_mask")
    arrays = dict(ids=ids, mask=mask, hidden=hidden) | dict(zip(names, tensors, strict=True))
    save_arrays(folder, arrays, prompts=json.dumps(PROMPTS))


if __name__ == "__main__":
    with torch.no_grad():
        store_sana()
        store_dc_ae()
        store_gemma2()
