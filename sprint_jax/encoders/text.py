"""Text features of prompts: the instruction, the tokenizer, the 300 kept tokens, and their encoder.

SANA puts an instruction before every prompt and keeps the begin token, the instruction's last token and 298
tokens of the prompt. These are the rules of diffusers' SanaSprintPipeline and SanaPipeline; arguments
choose those of NVlabs' code where they differ.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from ..core.errors import UserError
from ..core.files import read_json
from ..core.pixels import batch_rows
from ..models.gemma2 import Gemma2, Prefix, unstack_layers
from ..models.inference.int8 import quantize
from ..models.inference.operations import arrange

Array = jax.Array

# The published text, in the quotes of diffusers.
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable \
for image generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial \
relationships to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without \
overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping \
peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing \
street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering \
glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional \
commentary or evaluations:
User Prompt: """
# NVlabs' configs, with which the models were trained, have double quotes, which are other tokens.
INSTRUCTION_NVLABS = INSTRUCTION.replace("'", '"')
# How prompts are put: arguments of `TextEncoder`.
STYLES = {
    "diffusers": dict(instruction=INSTRUCTION, lower=True),
    "nvlabs": dict(instruction=INSTRUCTION_NVLABS, lower=False),
}

# Tokens at the end of the instruction that may change when a prompt follows: the last one is a space, which
# joins the prompt's first word.
BOUNDARY = 4


class PromptTokenizer(NamedTuple):
    """A tokenizer and the ids of its begin token and of padding."""

    tokenizer: tokenizers.Tokenizer
    begin: int
    pad: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, the begin token first."""
        return [self.begin, *self.tokenizer.encode(text, add_special_tokens=False).ids]


class Tokens(NamedTuple):
    """``ids, mask`` [B, T] int32, and the positions ``kept`` [length] of the states to use."""

    ids: np.ndarray
    mask: np.ndarray
    kept: np.ndarray


def load_tokenizer(folder: str | Path) -> PromptTokenizer:
    """Loads the tokenizer of a folder of transformers (``tokenizer/`` of a pipeline).

    Args:
      folder: has ``tokenizer.json``, and names of the begin token and of padding in
        ``tokenizer_config.json`` or ``special_tokens_map.json``.

    Raises:
      UserError: a file is missing or damaged, a name is missing or unknown, or the tokenizer adds no begin
        token or an end token.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: is this the tokenizer folder of a pipeline?")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{path} cannot be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config |= read_json(folder / name) if (folder / name).exists() else {}
    begin, pad = (_token_id(tokenizer, config, key, folder) for key in ("bos_token", "pad_token"))
    begins = config.get("add_bos_token", tokenizer.encode("").ids == [begin])
    if not begins or config.get("add_eos_token"):
        raise UserError(f"{folder}: the tokenizer must add its begin token and no end token")
    return PromptTokenizer(tokenizer, begin, pad)


def _token_id(tokenizer: tokenizers.Tokenizer, config, key: str, folder: Path) -> int:
    token = config.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        raise UserError(
            f"{folder}: neither tokenizer_config.json nor special_tokens_map.json has a {key}"
        )
    if tokenizer.token_to_id(token) is None:
        raise UserError(f"{folder}: {key} '{token}' is not in tokenizer.json")
    return tokenizer.token_to_id(token)


def prepare(prompt: str, lower: bool = True) -> str:
    """Returns a prompt in lower case without surrounding space; NVlabs' sampling code keeps the case."""
    return (prompt.lower() if lower else prompt).strip()


def tokenize(
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    instruction: str | None = None,
    length: int = 300,
    lower: bool = True,
) -> Tokens:
    """Tokenizes prompts, padded and cut on the right.

    With an instruction of N tokens (begin token included) T is N + length - 2; kept are the begin token and
    all tokens from the last of the instruction on. Without an instruction T is ``length`` and all are kept.
    """
    size, text = length, instruction or ""
    if text:
        size = len(tokenizer.encode(text)) + length - 2
    ids = np.full((len(prompts), size), tokenizer.pad, np.int32)
    mask = np.zeros_like(ids)
    for prompt, row, seen in zip(prompts, ids, mask, strict=True):
        found = tokenizer.encode(text + prepare(prompt, lower))[:size]
        row[: len(found)], seen[: len(found)] = found, 1
    return Tokens(ids, mask, np.array([0, *range(size - length + 1, size)]))


def _in_eight_bits(params: dict) -> dict:
    """Layers apart, each quantized by itself: of one after the other the device has both forms."""
    apart, narrow = unstack_layers(params), jax.jit(lambda layer: quantize({"layers": layer}))
    return apart | {"layers": tuple(narrow(layer)["layers"] for layer in apart["layers"])}


class TextEncoder:
    """A text encoder for `SprintPipeline`, from prompts to text features.

    The instruction runs through the network once: its keys and values are kept, and batches run only the
    tokens after it. A tokenizer may join its end to a prompt, so its last `BOUNDARY` tokens are not kept,
    and a batch with a prompt that changes earlier tokens runs without the kept part.

    Args:
      gemma, params: the network, as of `interop.gemma2.load_text_encoder`; parameters in the host's memory
        (arrays of NumPy) are sent to the device by each batch and take no room on it afterwards.
      tokenizer: of `load_tokenizer`.
      instruction: text before every prompt of `encode`, or None.
      length: of the features, in tokens.
      lower: as in `prepare`.
      batch_size: prompts at once; batches of fewer are filled to a power of two (`pixels.batch_rows`).
      sharding: of batches over devices; every batch is then filled to ``batch_size``, which it must divide.
      arranged: run the layers unrolled, with weights of their own (`gemma2.unstack_layers`), as is best for
        GPUs; ``params`` then lie in the host's memory.
      on_host: NumPy parameters stay there, and each batch sends them to the device.
      int8: arranged, with the layers' weights in eight bits (`models.inference.int8`).

    Raises:
      UserError: the tokenizer has more tokens than the network.
    """

    def __init__(
        self,
        gemma: Gemma2,
        params: Any,
        tokenizer: PromptTokenizer,
        instruction: str | None = INSTRUCTION,
        *,
        length: int = 300,
        lower: bool = True,
        batch_size: int = 16,
        sharding: jax.sharding.Sharding | None = None,
        arranged: bool = False,
        on_host: bool = False,
        int8: bool = False,
    ):
        vocabulary = tokenizer.tokenizer.get_vocab_size()
        if vocabulary > gemma.vocab_size:
            raise UserError(
                f"the tokenizer has {vocabulary} tokens, but the text encoder embeds "
                f"{gemma.vocab_size}: they are not of one pipeline"
            )
        self.gemma, self.params, self.tokenizer = gemma, params, tokenizer
        self.instruction, self.length, self.lower = instruction, length, lower
        self.batch_size, self.sharding = batch_size, sharding
        self._prefix, self._run = None, jax.jit(self._features)
        self._weights = params
        if arranged and on_host:
            self._weights = unstack_layers(params)
        elif arranged:
            form = _in_eight_bits if int8 else unstack_layers
            self._weights, self.params = arrange(form, params, by_parts=True)

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Computes features of prompts behind the instruction.

        Returns:
          text [B, length, hidden] float32 and mask [B, length] int32, 1 for tokens. The features of padding
          have no use.

        Raises:
          UserError: the list is empty, or is one string.
        """
        return self._encode(prompts, self.instruction)

    def encode_ahead(self, prompts: Sequence[str]) -> tuple[Array, np.ndarray]:
        """`encode` that does not wait for the device, where the text stays if one batch holds all prompts."""
        return self._encode(prompts, self.instruction, wait=False)

    def encode_plain(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same without the instruction, for negative prompts and a teacher's null prompt ''."""
        return self._encode(prompts, None)

    def _encode(self, prompts, instruction, wait=True):
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of sentences, not the sentence {prompts!r}")
        if not prompts:
            raise UserError("there is nothing to encode: give at least one prompt")
        # A prompt with several pictures is encoded once.
        unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        tokens = tokenize(self.tokenizer, list(unique), instruction, self.length, self.lower)
        size, batches = self.batch_size, []
        for rows in batch_rows(len(unique), size):
            rows = np.resize(rows, size) if self.sharding else rows
            ids, mask = tokens.ids[rows], tokens.mask[rows]
            prefix = self._prefix_of(ids) if instruction else None
            if self.sharding:
                ids, mask = jax.device_put((ids, mask), self.sharding)
            features = self._run(self._weights, ids, mask, tokens.kept, prefix)
            if not wait and len(features) == len(unique) == len(prompts):
                return features, tokens.mask[:, tokens.kept]
            batches.append(np.asarray(features))  # one batch at a time is on the device
        rows = [unique[prompt] for prompt in prompts]
        return np.concatenate(batches)[rows], tokens.mask[:, tokens.kept][rows]

    def _prefix_of(self, ids: np.ndarray) -> Prefix | None:
        """Returns the kept part of the instruction if all rows begin with it, else None."""
        shared = np.array(self.tokenizer.encode(self.instruction)[:-BOUNDARY], np.int32)
        if not len(shared) or (ids[:, : len(shared)] != shared[None]).any():
            return None
        if self._prefix is None:
            self._prefix = jax.jit(self.gemma.prefix_cache)(self._weights, shared)
        return self._prefix

    def _features(self, params, ids: Array, mask: Array, kept: Array, prefix: Prefix | None):
        if prefix is None:
            return self.gemma.encode(params, ids, mask)[:, kept]
        past = len(prefix.hidden)
        hidden = self.gemma.encode(params, ids[:, past:], mask[:, past:], prefix)
        first = jnp.broadcast_to(prefix.hidden[None], (len(ids), *prefix.hidden.shape))
        return jnp.concatenate([first, hidden], axis=1)[:, kept]
