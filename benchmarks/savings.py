"""Times the exact savings of inference on and off, and prints JSON lines.

    python benchmarks/savings.py > benchmarks/results/savings.jsonl

* ``upsampling``: an upsampling stage of DC-AE's decoder as four 2x2 convolutions, against nearest
  neighbours and a 3x3 convolution, at shapes of a 256-pixel picture.
* ``instruction``: text features of one prompt behind a kept instruction, against running both, in four
  layers of Gemma-2-2b.

Arms take turns within every round. "ms" are [minimum, median, maximum]; "ratio" is the time of the arm
without the saving over that with it, round by round; "error" is max|a - b| / max|b| between them.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.benchmarking.timing import compiled, header, paired_rounds, summarize
from sprint_jax.models.convolution import convolve, upsampled_conv3x3
from sprint_jax.models.gemma2 import Gemma2

STAGES = [(8, 1024, 1024), (32, 512, 512), (64, 512, 256), (128, 256, 128)]  # size, in, out
# Tokens; the instruction's own number is not known without its tokenizer.
INSTRUCTION, PROMPT = 220, 300


def upsample_first(x, kernel):
    return convolve(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)


def upsampling(size: int, inputs: int, outputs: int) -> dict:
    """The two arms at one stage."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(1, size, size, inputs)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(3, 3, inputs, outputs)), jnp.float32)
    return {
        "sprint_jax": compiled(upsampled_conv3x3, x, kernel)[0],
        "off": compiled(upsample_first, x, kernel)[0],
    }


def instruction() -> dict:
    """The two arms of the text encoder."""
    gemma = Gemma2(num_hidden_layers=4, vocab_size=1000)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(gemma.init, jax.random.key(0))
    params = jax.tree.map(
        lambda a: jnp.asarray(0.02 * random.normal(size=a.shape), a.dtype), shapes
    )
    ids = random.integers(0, 1000, (1, INSTRUCTION + PROMPT)).astype(np.int32)
    mask = np.ones_like(ids)
    prefix = jax.jit(gemma.prefix_cache)(params, ids[0, :INSTRUCTION])
    rest = ids[:, INSTRUCTION:], mask[:, INSTRUCTION:]

    def whole(params, ids, mask):
        return gemma.encode(params, ids, mask)[:, INSTRUCTION:]

    return {
        "sprint_jax": compiled(gemma.encode, params, *rest, prefix)[0],
        "off": compiled(whole, params, ids, mask)[0],
    }


def measure(arms: dict, rounds: int) -> dict:
    """Compares the arms' results, then times them."""
    ours, off = (np.asarray(arms[name]()) for name in ("sprint_jax", "off"))
    error = float(np.abs(ours - off).max() / np.abs(off).max())
    return {"error": error} | summarize(paired_rounds(arms, rounds), "sprint_jax")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    flags = parser.parse_args(argv)
    command = " ".join(["python benchmarks/savings.py", *argv])
    print(json.dumps(header(command)), flush=True)
    for stage in STAGES:
        line = {"what": "upsampling", "size_in_out": stage}
        print(json.dumps(line | measure(upsampling(*stage), flags.rounds)), flush=True)
    line = {"what": "instruction", "tokens": [INSTRUCTION, PROMPT]}
    print(json.dumps(line | measure(instruction(), flags.rounds)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
