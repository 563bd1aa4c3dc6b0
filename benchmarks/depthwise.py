"""Times the depthwise 3x3 convolution against its alternatives, and prints JSON lines.

    python benchmarks/depthwise.py > benchmarks/results/depthwise.jsonl

Each line after the first is one workload at one size; arms take turns in every round (see
`sprint_jax.benchmarking.timing`). `depthwise_speedup` is the time that the convolution adds to the arm `none`
(the same network without it): that of `naive`, nine shifts with autodiff's derivatives, over that of
`sprint_jax`, minima each. On a machine with other users trust the minima and the ratios.

Glibc returns large temporaries to the system after every call, and taking them back can cost more
than the arithmetic. The environment that shows the times without that:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1
"""

import argparse
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.benchmarking.timing import compiled, header, paired_rounds, summarize
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
    return convolution, normals(shape, (3, 3, shape[-1]), shape[-1:])


def convolution_gradient(convolution, shape):
    def gradient(cotangent, *arguments):
        return jax.vjp(convolution, *arguments)[1](cotangent)

    return gradient, normals(shape, shape, (3, 3, shape[-1]), shape[-1:])


def feed_forward_arguments(shape):
    channels, width = shape[-1], shape[-1] // 5
    weights = normals((width, channels), (channels // 2, width), (3, 3, channels), (channels,))
    return weights, *normals((*shape[:3], width))


def feed_forward_gradient(convolution, shape):
    def loss(weights, x):
        return jnp.sum(jnp.square(feed_forward(convolution)(weights, x)))

    return jax.value_and_grad(loss, argnums=(0, 1)), feed_forward_arguments(shape)


def feed_forward_jvp(convolution, shape):
    def tangent(weights, x):
        return jax.jvp(feed_forward(convolution), (weights, x), (weights, x))

    return tangent, feed_forward_arguments(shape)


def normals(*shapes):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=shape) / 4, jnp.float32) for shape in shapes)


WORKLOADS = {
    "convolution forward": convolution_forward,
    "convolution gradient": convolution_gradient,
    "feed-forward forward and gradient": feed_forward_gradient,
    "feed-forward jvp": feed_forward_jvp,
}
CONVOLUTIONS = {"none": none, "naive": naive, "grouped": grouped, "sprint_jax": depthwise_conv3x3}


def measure(workload: str, shape: tuple[int, ...], rounds: int) -> dict:
    """One line."""
    arms = {}
    for name, convolution in CONVOLUTIONS.items():
        function, arguments = WORKLOADS[workload](convolution, shape)
        arms[name], _ = compiled(function, *arguments)
    line = {"workload": workload, "shape": shape}
    line |= summarize(paired_rounds(arms, rounds), "sprint_jax")
    if workload.startswith("feed-forward") and line["ms"]:
        fastest = {arm: low for arm, (low, _, _) in line["ms"].items()}
        slow, fast = (fastest[arm] - fastest["none"] for arm in ("naive", "sprint_jax"))
        line["depthwise_speedup"] = round(slow / fast, 2) if fast > 0 else None
    return line


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of every arm (default 15)")
    rounds = parser.parse_args(argv).rounds
    malloc = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
    command = " ".join(["python benchmarks/depthwise.py", *argv])
    print(json.dumps(header(command, dtype="float32", malloc=malloc)), flush=True)
    for shape in SIZES:
        for workload in WORKLOADS:
            print(json.dumps(measure(workload, shape, rounds)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
