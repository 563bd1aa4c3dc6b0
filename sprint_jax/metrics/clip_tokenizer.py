"""CLIP's tokenizer: byte pairs of sentences in lower case, from any form in which its vocabulary is kept."""

import gzip
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ..core.errors import UserError
from ..core.files import read_json

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # lines of OpenAI's file that count
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer(NamedTuple):
    """Sentences to rows of tokens.

    Attributes:
      openai: cleans sentences as OpenAI's package does (ftfy, HTML entities); else as transformers does
      (NFC).
    """

    tokenizer: tokenizers.Tokenizer
    openai: bool = True

    def encode(self, sentences: Sequence[str], context: int = 77) -> np.ndarray:
        """Returns tokens [N, context] int32, cut and ended by the end token, filled with 0.

        Raises:
          UserError: a sentence has more than plain letters, and ftfy is not installed (`openai`).
        """
        rows = np.zeros((len(sentences), context), np.int32)
        begin, end = (self.tokenizer.token_to_id(word) for word in (BEGIN, END))
        for row, sentence in zip(rows, sentences, strict=True):
            found = self._ids(sentence)[: context - 2]
            row[: len(found) + 2] = [begin, *found, end]
        return rows

    def _ids(self, sentence: str) -> list[int]:
        if not self.openai:
            text = _fold.normalize_str(sentence)
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        text = clean(sentence)
        if "<|" not in text:
            return self.tokenizer.encode(text).ids
        # A special token's name counts where a word could begin, not wherever it stands.
        found = []
        for word, _ in _with_names.pre_tokenize_str(text):
            known = self.tokenizer.token_to_id(word) if word in (BEGIN, END) else None
            found += [known] if known is not None else self.tokenizer.encode(word).ids
        return found


# In transformers' order.
_fold = normalizers.Sequence(
    [
        normalizers.NFC(),
        normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        normalizers.Lowercase(),
    ]
)


_with_names = pre_tokenizers.Split(
    tokenizers.Regex(rf"<\|startoftext\|>|<\|endoftext\|>|{WORDS}"), "removed", invert=True
)


def clean(sentence: str) -> str:
    """Mends and folds a sentence as OpenAI's package does.

    Raises:
      UserError: mending needs ftfy, which is not installed.
    """
    # Of printable ASCII without entities ftfy changes nothing.
    if not re.fullmatch(r"[ -%'-~]*", sentence):
        try:
            import ftfy
        except ImportError:
            raise UserError(
                f"the sentence {sentence!r} must be mended as OpenAI's CLIP does: pip install ftfy"
            ) from None
        sentence = ftfy.fix_text(sentence)
    sentence = html.unescape(html.unescape(sentence)).strip()
    return re.sub(r"\s+", " ", sentence).strip().lower()


def load_clip_tokenizer(path: str | Path, openai: bool = True) -> ClipTokenizer:
    """Loads a tokenizer.

    Args:
      path: a folder of transformers with ``tokenizer.json``, or with ``vocab.json`` and ``merges.txt``; or
        OpenAI's ``bpe_simple_vocab_16e6.txt.gz``, or a folder that holds it.
      openai: see `ClipTokenizer`.

    Raises:
      UserError: no such file is there, or it is damaged or of another tokenizer.
    """
    path = Path(path)
    if path.is_dir() and (path / OPENAI_FILE).is_file():
        path = path / OPENAI_FILE
    try:
        if path.suffix == ".gz":
            lines = gzip.decompress(path.read_bytes()).decode().split("\n")
            vocab, merges = None, lines[1 : MERGES + 1]
        elif (path / "tokenizer.json").is_file():
            model = read_json(path / "tokenizer.json")["model"]
            vocab, merges = model["vocab"], model["merges"]
        elif (path / "merges.txt").is_file():
            vocab = read_json(path / "vocab.json")
            merges = (path / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
        else:
            raise UserError(
                f"{path} has no tokenizer.json, merges.txt or {OPENAI_FILE}, and is none of them"
            )
        pairs = [tuple(each.split()) if isinstance(each, str) else tuple(each) for each in merges]
        pairs = [pair for pair in pairs if pair]
        return ClipTokenizer(_make(vocab or _vocabulary(pairs), pairs, openai), openai)
    except UserError:
        raise
    except Exception as error:  # gzip, codecs, and the library, which raises nothing more precise
        raise UserError(f"{path} holds no tokenizer of CLIP: {error!r}") from error


def _vocabulary(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """Numbers bytes, bytes that end a word, and pairs, in the order of OpenAI's package."""
    # Printable bytes stand for themselves, others for letters from 256 on; printable ones come first.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [
        chr(256 + n) for n in range(256 - len(printable))
    ]
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in pairs]
    return {word: number for number, word in enumerate([*words, BEGIN, END])}


def _make(
    vocab: dict[str, int], pairs: list[tuple[str, str]], openai: bool
) -> tokenizers.Tokenizer:
    model = models.BPE(vocab, pairs, end_of_word_suffix="</w>", unk_token=END)
    tokenizer = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    if not openai:  # transformers sees them wherever they stand
        tokenizer.add_special_tokens([BEGIN, END])
    if None in (tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)):
        raise UserError(f"the vocabulary has no {BEGIN} and {END}")
    return tokenizer
