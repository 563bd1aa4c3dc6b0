"""Times the depthwise 3x3 convolution against its alternatives, and prints JSON lines.

    python benchmarks/depthwise.py > benchmarks/results/depthwise.jsonl

Arms take turns within every round (A, B, C, A, B, C, ...), compiled and warmed up before. Each line
after the first is one workload at one size: wall and process CPU milliseconds of every arm over the
rounds as [minimum, median, maximum], and per-round ratios of the other arms to `sprint_jax`.
`depthwise_speedup` is what the convolution adds to the arm `none` (the same network without it):
that of `naive`, nine shifts with autodiff's derivatives, over that of `sprint_jax`, minima each.
On a machine with other users trust the minima, the ratios, and CPU time over wall time.

Glibc returns large temporaries to the system after every call, and taking them back can cost more
than the arithmetic. The environment that shows the times without that:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.models.depthwise import depthwise_conv3x3

SIZES = [(64, 8, 8, 640), (64, 4, 4, 640), (16, 16, 16, 1280)]


def naive(x, kernel, bias):
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [(i, j) for i in range(3) for j in range(3)]
    return bias + sum(padded[:, i : i + height, j : j + width] * kernel[i, j] for i, j in shifts)


def grouped(x, kernel, bias):
    return bias + jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def none(x, kernel, bias):
    return x + bias


def feed_forward(convolution):
    """SANA's GLUMBConv, with the convolution's arguments last in `weights`."""

    def apply(weights, x):
        inverted, point, kernel, bias = weights
        hidden = convolution(jax.nn.silu(x @ inverted), kernel, bias)
        value, gate = jnp.split(hidden, 2, axis=-1)
        return (value * jax.nn.silu(gate)) @ point

    return apply


def convolution_forward(convolution, shape):
    return jax.jit(convolution), normals(shape, (3, 3, shape[-1]), shape[-1:])


def convolution_gradient(convolution, shape):
    def gradient(cotangent, *arguments):
        return jax.vjp(convolution, *arguments)[1](cotangent)

    return jax.jit(gradient), normals(shape, shape, (3, 3, shape[-1]), shape[-1:])


def feed_forward_arguments(shape):
    channels, width = shape[-1], shape[-1] // 5
    weights = normals((width, channels), (channels // 2, width), (3, 3, channels), (channels,))
    return weights, *normals((*shape[:3], width))


def feed_forward_gradient(convolution, shape):
    def loss(weights, x):
        return jnp.sum(jnp.square(feed_forward(convolution)(weights, x)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), feed_forward_arguments(shape)


def feed_forward_jvp(convolution, shape):
    def tangent(weights, x):
        return jax.jvp(feed_forward(convolution), (weights, x), (weights, x))

    return jax.jit(tangent), feed_forward_arguments(shape)


def normals(*shapes):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=shape) / 4, jnp.float32) for shape in shapes)


WORKLOADS = {
    "convolution forward": convolution_forward,
    "convolution gradient": convolution_gradient,
    "feed-forward forward and gradient": feed_forward_gradient,
    "feed-forward jvp": feed_forward_jvp,
}


def time_arms(arms, rounds):
    """Returns {arm: [(wall, CPU) milliseconds per round]}; arms are {name: (function, args)}."""
    times = {name: [] for name in arms}
    for turn in range(-2, rounds):
        for name, (function, arguments) in arms.items():
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(function(*arguments))
            elapsed = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= 0:
                times[name].append([1e3 * seconds for seconds in elapsed])
    return {name: np.array(each) for name, each in times.items()}


def summary(values):
    numbers = min(values), statistics.median(values), max(values)
    return [float(f"{number:.4g}") if math.isfinite(number) else None for number in numbers]


def report(workload, shape, times):
    ours = times["sprint_jax"]
    line = {"workload": workload, "shape": shape, "rounds": len(ours)}
    for column, clock in enumerate(("wall", "cpu")):
        line[f"{clock}_ms"] = {arm: summary(each[:, column]) for arm, each in times.items()}
        line[f"{clock}_ratio"] = {
            arm: summary(each[:, column] / ours[:, column])
            for arm, each in times.items()
            if arm != "sprint_jax"
        }
        if workload.startswith("feed-forward"):
            fastest = {arm: each[:, column].min() for arm, each in times.items()}
            slow = fastest["naive"] - fastest["none"]
            fast = fastest["sprint_jax"] - fastest["none"]
            line[f"{clock}_depthwise_speedup"] = round(float(slow / fast), 2) if fast > 0 else None
    return line


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of every arm (default 15)")
    rounds = parser.parse_args(argv).rounds
    header = {
        "command": " ".join(["python", "benchmarks/depthwise.py", *argv]),
        "backend": jax.default_backend(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
        "dtype": "float32",
        "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
    }
    print(json.dumps(header), flush=True)
    convolutions = {"none": none, "naive": naive, "grouped": grouped}
    convolutions["sprint_jax"] = depthwise_conv3x3
    for shape in SIZES:
        for workload, make in WORKLOADS.items():
            arms = {name: make(each, shape) for name, each in convolutions.items()}
            print(json.dumps(report(workload, shape, time_arms(arms, rounds))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
