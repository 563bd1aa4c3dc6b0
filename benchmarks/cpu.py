"""Times what made training faster on CPU: the shape of matrix products, and memory settings of glibc.

    python benchmarks/cpu.py --rounds 10 > benchmarks/results/cpu.jsonl

Prints JSON lines: one for the machine, then one per comparison; arms take turns in every round (see
`sprint_jax.benchmarking.timing`). "projection" is the gradient of a 128 to 640 projection with SiLU, as
`nn.Dense` on [B, h, w, d] and as `Linear`, which sees a matrix [rows, d]. "environment" is the gradient of
the digits network (batch 64, 16 tokens each) in processes started with different GLIBC_TUNABLES.
"""

import argparse
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sprint_jax.benchmarking.timing import Round, compiled, header, paired_rounds, summarize
from sprint_jax.models.layers import Linear
from sprint_jax.models.sana import SIZES, SanaTransformer

HUGE_PAGES = "glibc.malloc.hugetlb=1"
KEEP = ":".join(f"glibc.malloc.{key}_threshold={1 << 33}" for key in ("mmap", "trim"))
ENVIRONMENTS = {
    "none": "",
    "huge pages": HUGE_PAGES,
    "huge pages, memory kept": f"{HUGE_PAGES}:{KEEP}:glibc.malloc.arena_max=1",
}


def projection(layer):
    """The gradient of one projection, compiled."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4, 4, 128)), jnp.float32)
    params = layer.init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.square(nn.silu(layer.apply(params, x))).sum()

    return compiled(jax.grad(loss, argnums=(0, 1)), params, x)[0]


def network():
    """The gradient of the digits network, compiled."""
    model = SanaTransformer(**SIZES["digits"], scan=False)
    key, batch = jax.random.key(0), 64
    x, text = jax.random.normal(key, (batch, 4, 4, 12)), jax.random.normal(key, (batch, 12, 64))
    inputs = x, jnp.linspace(0.0, 1.0, batch), text, jnp.ones((batch, 12))
    params = jax.jit(model.init)(key, *inputs)["params"]

    def loss(params, *inputs):
        return jnp.square(model.apply({"params": params}, *inputs) - inputs[0]).mean()

    return compiled(jax.grad(loss), params, *inputs)[0]


def in_environment(tunables: str) -> float:
    """The fastest of some calls of `network` in a process of its own, in milliseconds."""
    environment = os.environ | {"GLIBC_TUNABLES": tunables}
    words = [sys.executable, __file__, "--child"]
    ended = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return float(ended.stdout)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="turns of every arm (default 10)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.child:
        print(min(each.ms["network"] for each in paired_rounds({"network": network()}, 5)))
        return
    command = " ".join(["python benchmarks/cpu.py", *argv])
    print(json.dumps(header(command)), flush=True)
    arms = {"nn.Dense": projection(nn.Dense(640)), "Linear": projection(Linear(640))}
    comparisons = {"projection": (paired_rounds(arms, flags.rounds), "Linear")}
    rounds = [
        Round({name: in_environment(each) for name, each in ENVIRONMENTS.items()}, None)
        for _ in range(flags.rounds)
    ]
    comparisons["environment"] = rounds, "huge pages, memory kept"
    for name, (rounds, base) in comparisons.items():
        print(json.dumps({"comparison": name} | summarize(rounds, base)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
