"""Prompts, tokens and text features against the SANA pipelines of diffusers, with a trained tokenizer.

Tokens, kept positions and masks must be equal. Errors of features are max|a - b| / max|b| over all
positions, padding included; observed at most 1.2e-6.
"""

import inspect

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from helpers.compare import relative_error
from helpers.reference import tiny_gemma2, tiny_tokenizer
from transformers import Gemma2Model, GemmaTokenizer

from sprint_jax.encoders.text import (
    INSTRUCTION,
    INSTRUCTION_NVLABS,
    TextEncoder,
    load_tokenizer,
    tokenize,
)
from sprint_jax.interop.gemma2 import load_text_encoder

SENTENCE = "a red cat sits on the 3 old walls of Paris, painted in oil; un chat à l'ombre"
SPECIAL = [
    "",
    " ",
    "\n",
    "\n\n a cat\n\non a wall \n",
    "   leading and trailing   ",
    "two  spaces   three",
    "A RED CAT, UPPER CASE; ÄÖÜ ẞ İ",
    "一只猫坐在墙上",
    "猫 and 🐈‍⬛ and 👩🏽‍🚀 in space 🚀🚀",
    "<b>bold</b> &amp; <eos> <bos> <pad> <0x41> </s>",
    "<bos>begins twice",
    "\ttab\tand\r\nreturn",
    "▁ is the sign of a space",
    "\u200b zero width and \u00a0 no-break",
    ": a colon first",
    "User Prompt: again",
    "quotes \"double\" and 'single'",
    "\x00\x01 control",
    " ".join([SENTENCE] * 60),
    "x" * 3000,
]


def varied_prompts(count: int = 200) -> list[str]:
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(count - len(SPECIAL)):
        words = random.choice(SENTENCE.split(), random.integers(1, 60))
        text = random.choice([" ", "  ", ", ", "\n"]).join(words)
        drawn.append(text.upper() if random.random() < 0.2 else text)
    return SPECIAL + drawn


class Echo(torch.nn.Module):
    """Stands for a text encoder whose features are the ids that it was given."""

    dtype = torch.float32

    def forward(self, ids, attention_mask):
        return (ids[..., None].float(),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = tiny_tokenizer([INSTRUCTION, *SPECIAL[:10], SENTENCE])
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_gemma2(vocab_size=len(tokenizer)).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return *load_text_encoder(folder / "text_encoder"), load_tokenizer(folder / "tokenizer")


def published_instruction(kind=SanaSprintPipeline) -> list[str]:
    return inspect.signature(kind.__call__).parameters["complex_human_instruction"].default


def reference(folder, prompts, instruction, *, kind=SanaSprintPipeline, encoder=None, **how):
    """Features and mask of the prompts, then of the negative ones, from a pipeline of diffusers."""
    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer")
    encoder = encoder or Gemma2Model.from_pretrained(folder / "text_encoder")
    parts = dict(vae=None, transformer=None, scheduler=None)
    pipe = kind(tokenizer=tokenizer, text_encoder=encoder, **parts)
    how |= dict(device="cpu", complex_human_instruction=instruction)
    with torch.no_grad():
        return [tensor.numpy() for tensor in pipe.encode_prompt(prompts, **how)]


def test_the_instruction_is_the_published_one():
    for kind in (SanaPipeline, SanaSprintPipeline):
        assert "\n".join(published_instruction(kind)) == INSTRUCTION


@pytest.mark.parametrize("instruction", [INSTRUCTION, INSTRUCTION_NVLABS, "short: ", None])
def test_tokens_of_200_prompts(folder, loaded, instruction):
    prompts = varied_prompts()
    lines = instruction.split("\n") if instruction else None
    ids, mask = reference(folder, prompts, lines, encoder=Echo())
    ours = tokenize(loaded[2], prompts, instruction)
    np.testing.assert_array_equal(ours.ids[:, ours.kept], ids[..., 0])
    np.testing.assert_array_equal(ours.mask[:, ours.kept], mask)
    assert len(prompts) == 200
    assert mask.min() == 0 and mask.all(1).any(), "no prompt was padded, or none was cut"


@pytest.mark.parametrize("length", [300, 20])
def test_features_of_the_pipeline(folder, loaded, length):
    prompts, how = SPECIAL[:8] + SPECIAL[-2:], dict(max_sequence_length=length)
    text, mask = reference(folder, prompts, published_instruction(), **how)
    ours, ours_mask = TextEncoder(*loaded, length=length, batch_size=4).encode(prompts)
    np.testing.assert_array_equal(ours_mask, mask)
    assert relative_error(ours, text) < 2e-5

    tokens = tokenize(loaded[2], prompts, INSTRUCTION, length)
    uncached = loaded[0].encode(loaded[1], tokens.ids, tokens.mask)[:, tokens.kept]
    assert relative_error(uncached, text) < 2e-5
