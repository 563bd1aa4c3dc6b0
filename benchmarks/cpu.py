"""Times what made training faster on CPU: the shape of matrix products, and memory settings of glibc.

    python benchmarks/cpu.py --rounds 10 > benchmarks/results/cpu.jsonl

Prints JSON lines: one for the machine, then one per comparison, with milliseconds per arm over the
rounds as [minimum, median, maximum] and per-round ratios to the last arm. "projection" is the gradient
of a 128 to 640 projection with SiLU, as `nn.Dense` on [B, h, w, d] and as `Linear`, which sees a matrix
[rows, d]. "environment" is the gradient of the digits network (batch 64, 16 tokens each) in processes
started with different GLIBC_TUNABLES; arms take turns within every round in both comparisons.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

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
    """The gradient of one projection, compiled, and its arguments."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4, 4, 128)), jnp.float32)
    params = layer.init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.square(nn.silu(layer.apply(params, x))).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile(), (params, x)


def network():
    """The gradient of the digits network, compiled, and its arguments."""
    model = SanaTransformer(**SIZES["digits"], scan=False)
    key, batch = jax.random.key(0), 64
    x, text = jax.random.normal(key, (batch, 4, 4, 12)), jax.random.normal(key, (batch, 12, 64))
    inputs = x, jnp.linspace(0.0, 1.0, batch), text, jnp.ones((batch, 12))
    params = jax.jit(model.init)(key, *inputs)["params"]

    def loss(params, *inputs):
        return jnp.square(model.apply({"params": params}, *inputs) - inputs[0]).mean()

    return jax.jit(jax.grad(loss)).lower(params, *inputs).compile(), (params, *inputs)


def milliseconds(function, arguments, calls=5):
    """The fastest of some calls, after one that does not count."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


def in_environment(tunables):
    """`milliseconds` of `network` in a process of its own."""
    environment = os.environ | {"GLIBC_TUNABLES": tunables}
    words = [sys.executable, __file__, "--child"]
    ended = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return float(ended.stdout)


def report(comparison, times):
    """One JSON line for ``times``, {arm: milliseconds per round}."""

    def spread(values):
        return [float(f"{f(values):.4g}") for f in (min, statistics.median, max)]

    *others, last = times
    ratios = {arm: spread(np.divide(times[arm], times[last]).tolist()) for arm in others}
    ms = {arm: spread(values) for arm, values in times.items()}
    line = {"comparison": comparison, "rounds": len(times[last]), "ms": ms}
    print(json.dumps(line | {f"ratio to {last}": ratios}), flush=True)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="turns of every arm (default 10)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.child:
        print(milliseconds(*network()))
        return
    header = {
        "command": " ".join(["python", "benchmarks/cpu.py", *argv]),
        "backend": jax.default_backend(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
        "tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    print(json.dumps(header), flush=True)
    arms = {"nn.Dense": projection(nn.Dense(640)), "Linear": projection(Linear(640))}
    rounds = [{name: milliseconds(*arm) for name, arm in arms.items()} for _ in range(flags.rounds)]
    report("projection", {name: [times[name] for times in rounds] for name in arms})
    rounds = [
        {name: in_environment(tunables) for name, tunables in ENVIRONMENTS.items()}
        for _ in range(flags.rounds)
    ]
    report("environment", {name: [times[name] for times in rounds] for name in ENVIRONMENTS})


if __name__ == "__main__":
    main(sys.argv[1:])
