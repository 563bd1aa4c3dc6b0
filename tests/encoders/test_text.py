"""Prompts, tokens and text features against those that diffusers computed; no torch."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers.compare import assert_close
from safetensors import safe_open
from safetensors.numpy import load_file

from sprint_jax.core.errors import UserError
from sprint_jax.encoders.text import (
    BOUNDARY,
    INSTRUCTION,
    INSTRUCTION_NVLABS,
    PromptTokenizer,
    TextEncoder,
    load_tokenizer,
    prepare,
    tokenize,
)
from sprint_jax.interop.gemma2 import load_text_encoder
from sprint_jax.models.gemma2 import Gemma2

STORED = Path(__file__).parents[1] / "parity" / "stored" / "gemma2"
LENGTH, LIMIT = 12, 2e-5
ARRAYS = load_file(STORED / "arrays.safetensors")
with safe_open(STORED / "arrays.safetensors", framework="numpy") as file:
    PROMPTS = json.loads(file.metadata()["prompts"])
CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(STORED / "tokenizer", tmp_path / "tokenizer"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(STORED / "tokenizer")


@pytest.fixture(scope="module")
def loaded():
    return load_text_encoder(STORED / "text_encoder")


@pytest.fixture(scope="module")
def encoder(loaded, tokenizer):
    return TextEncoder(*loaded, tokenizer, length=LENGTH, batch_size=3)


def test_instruction_and_prompts_are_the_published_text():
    digest = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert digest.startswith("48290080bb4fd4a2")
    assert '"Enhanced prompt"' in INSTRUCTION_NVLABS and "'" not in INSTRUCTION_NVLABS
    assert (prepare(" A Cat\n"), prepare(" A Cat\n", lower=False)) == ("a cat", "A Cat")


def test_kept_tokens(tokenizer):
    alone = tokenizer.encode(INSTRUCTION)
    tokens = tokenize(tokenizer, ["", "a cat " * 300], INSTRUCTION)
    assert tokens.ids.shape == tokens.mask.shape == (2, len(alone) + 298)
    assert tokens.kept.tolist() == [0, *range(len(alone) - 1, len(alone) + 298)]
    assert tokens.ids[0, tokens.kept[:2]].tolist() == [tokenizer.begin, alone[-1]]
    assert tokens.mask[0, tokens.kept].sum() == 2 and (tokens.ids[0, len(alone) :] == 0).all()
    assert tokens.mask[1].all()
    # Without an instruction all are kept.
    tokens = tokenize(tokenizer, ["", "a cat"], length=LENGTH)
    assert tokens.kept.tolist() == list(range(LENGTH))
    assert tokens.ids[0].tolist() == [tokenizer.begin] + [tokenizer.pad] * (LENGTH - 1)
    assert 1 < tokens.mask[1].sum() < LENGTH


def test_features_of_diffusers(loaded, tokenizer, encoder):
    text, mask = encoder.encode(PROMPTS)
    np.testing.assert_array_equal(mask, ARRAYS["kept"])
    assert text.dtype == np.float32 and mask.dtype == np.int32
    assert_close(text, ARRAYS["text"], LIMIT)
    # Negative prompts have no instruction.
    text, mask = encoder.encode_plain(PROMPTS)
    np.testing.assert_array_equal(mask, ARRAYS["negative_mask"])
    assert_close(text, ARRAYS["negative_text"], LIMIT)
    plain = TextEncoder(*loaded, tokenizer, None, length=LENGTH)
    np.testing.assert_array_equal(plain.encode(["a cat"])[0], encoder.encode_plain(["a cat"])[0])


def test_the_instruction_runs_once(loaded, tokenizer, monkeypatch):
    runs, run = [], Gemma2._run

    def counted(self, params, ids, *rest, **how):
        runs.append(ids.shape[1])
        return run(self, params, ids, *rest, **how)

    monkeypatch.setattr(Gemma2, "_run", counted)
    encoder = TextEncoder(*loaded, tokenizer, length=LENGTH, batch_size=4)
    first, _ = encoder.encode(PROMPTS)
    again, _ = encoder.encode(PROMPTS)
    np.testing.assert_array_equal(first, again)
    count = len(tokenizer.encode(INSTRUCTION))
    # Each is traced once.
    assert runs == [count - BOUNDARY, LENGTH - 2 + BOUNDARY]


def test_batches_and_repeats_do_not_matter(loaded, tokenizer, encoder):
    one = TextEncoder(*loaded, tokenizer, length=LENGTH, batch_size=1)
    order = [3, 0, 3, 1, 2, 0]
    text, mask = one.encode([PROMPTS[i] for i in order])
    expected, expected_mask = encoder.encode(PROMPTS)
    assert_close(text, expected[order], LIMIT)
    np.testing.assert_array_equal(mask, expected_mask[order])


def features(loaded, tokens):
    """Of a whole run, without anything kept."""
    return loaded[0].encode(loaded[1], tokens.ids, tokens.mask)[:, tokens.kept]


def test_a_prompt_may_change_the_whole_instruction(loaded):
    # Without its last letter "abcdefgh" falls into single letters; with it, it is one token.
    letters, joined = "abcdefgh", []
    for i in reversed(range(7)):
        joined.append((letters[i], letters[i + 1 :]))
    tokens = ["<pad>", "<bos>", *letters, *(a + b for a, b in joined)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, joined))
    tokenizer = PromptTokenizer(bpe, 1, 0)
    encoder = TextEncoder(*loaded, tokenizer, "abcdefg", length=LENGTH, batch_size=1)
    for prompt, count in ("h", 2), ("a", 9):
        found = tokenize(tokenizer, [prompt], "abcdefg", LENGTH)
        assert found.mask.sum() == count
        assert (encoder._prefix_of(found.ids) is None) == (prompt == "h")
        assert_close(encoder.encode([prompt])[0], np.asarray(features(loaded, found)), LIMIT)
    # An instruction may be too short to keep anything of it.
    encoder = TextEncoder(*loaded, tokenizer, "a", length=LENGTH)
    found = tokenize(tokenizer, ["h"], "a", LENGTH)
    assert_close(encoder.encode(["h"])[0], np.asarray(features(loaded, found)), LIMIT)


def test_mistakes(loaded, tokenizer, encoder):
    for encode in encoder.encode, encoder.encode_plain:
        with pytest.raises(UserError, match="'a cat'"):
            encode("a cat")
        with pytest.raises(UserError, match="at least one"):
            encode([])
    with pytest.raises(UserError, match=r"440 .*400"):
        TextEncoder(Gemma2(vocab_size=400), loaded[1], tokenizer)


def change(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_ways_to_write_a_tokenizer(folder, tokenizer):
    expected = tokenizer.encode(INSTRUCTION)
    # Padding and truncation of the file do not count.
    raw = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    raw.enable_truncation(4)
    raw.enable_padding(length=50)
    raw.save(str(folder / TOKENIZER))
    assert load_tokenizer(folder).encode(INSTRUCTION) == expected
    # The begin token may come from the config alone.
    change(folder, TOKENIZER, post_processor=None)
    with pytest.raises(UserError, match="begin token"):
        load_tokenizer(folder)
    change(folder, CONFIG, add_bos_token=True)
    assert load_tokenizer(folder).encode(INSTRUCTION) == expected
    # Names of tokens may be in another file.
    (folder / CONFIG).rename(folder / "special_tokens_map.json")
    change(folder, "special_tokens_map.json", bos_token={"content": "<bos>"})
    found = load_tokenizer(folder)
    assert (found.begin, found.pad) == (tokenizer.begin, tokenizer.pad) == (2, 0)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda f: (f / TOKENIZER).unlink(), TOKENIZER),
        (lambda f: (f / TOKENIZER).write_text("{"), TOKENIZER),
        (lambda f: (f / CONFIG).write_text("{"), CONFIG),
        (lambda f: (f / CONFIG).write_text("[1]"), CONFIG),
        (lambda f: (f / CONFIG).unlink(), "bos_token"),
        (lambda f: change(f, CONFIG, pad_token="<hole>"), "pad_token '<hole>'"),
        (lambda f: change(f, CONFIG, add_bos_token=False), "begin token"),
        (lambda f: change(f, CONFIG, add_eos_token=True), "end token"),
    ],
)
def test_damaged_tokenizers_are_refused(folder, damage, name):
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert str(folder) in message and name in message and "\n" not in message
