"""One part of benchmarks/gpu.sh that `sprint_jax.benchmark` has not: its lines are added to a file.

    python benchmarks/gpu_parts.py ceilings --out FILE
    python benchmarks/gpu_parts.py folders --sizes 600m,1600m --folder DIR --out FILE
    python benchmarks/gpu_parts.py torch --folder DIR --batch 1 --parts transformer,whole --out FILE
    python benchmarks/gpu_parts.py options --network transformer --out FILE
    python benchmarks/gpu_parts.py accuracy --folder DIR --out FILE

ceilings: what matrix products and copies reach at most. folders: pipelines with random weights. torch: compiles
what `sprint_jax.benchmark` compares with, which torch then keeps. options: one network under several compiler
options, in turns. accuracy: of a digits student. --tiny takes sizes for CPUs, which say nothing.
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.benchmarking import torch_reference as reference
from sprint_jax.benchmarking.measure import clocks
from sprint_jax.benchmarking.random_folder import (
    TINY_AUTOENCODER,
    TINY_FIELDS,
    TINY_GEMMA,
    write_random_pipeline,
)
from sprint_jax.benchmarking.scripts import digits_accuracy, line_writer
from sprint_jax.benchmarking.timing import (
    compiled,
    first_call,
    paired_rounds,
    spread,
    summarize,
)
from sprint_jax.benchmarking.workloads import (
    FACTOR,
    STUDENTS,
    network_calls,
    network_inputs,
    random_params,
)
from sprint_jax.core import cli
from sprint_jax.encoders.text import INSTRUCTION
from sprint_jax.interop.diffusers import read_config
from sprint_jax.interop.sana import fields_from_config
from sprint_jax.models.blocks import unstack_blocks
from sprint_jax.models.dc_ae import AutoencoderDC, Decoder
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.sana import SanaTransformer

# Of XLA on GPUs; the first is what a pipeline does without a word.
OPTIONS = {
    "default": {},
    "no command buffers": {"xla_gpu_enable_command_buffer": ""},
    "command buffers: fusions": {"xla_gpu_enable_command_buffer": "FUSION"},
    "command buffers: all": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE"
    },
    "convolution fusion": {"xla_gpu_experimental_enable_conv_fusion": True},
    "no Triton products": {"xla_gpu_enable_triton_gemm": False},
    "no autotuning": {"xla_gpu_autotune_level": 0},
}


def ceilings(flags, write):
    """Bfloat16 products, and copies counted as bytes read and written, on random numbers."""
    side, length = (256, 10**6) if flags.tiny else (8192, 10**9)
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys[:2])
    x = jax.random.normal(keys[2], (length,), jnp.float32)
    arms = {"product": compiled(jnp.matmul, a, b)[0], "copy": compiled(lambda x: x + 1, x)[0]}
    amounts = {"product": 2 * side**3, "copy": 2 * x.nbytes}
    rounds = paired_rounds(arms, 3 if flags.tiny else 25)
    for name, amount in amounts.items():
        ms = spread(each.ms[name] for each in rounds)
        write(
            {"ceiling": name, "ms": {name: ms}, "per_second": float(f"{1e3 * amount / ms[1]:.4g}")}
            | clocks()
        )


def folders(flags, write):
    """A pipeline folder for each size; they share all but the transformer."""
    base = None
    texts = INSTRUCTION, "a photo of 0 1 2 3 4 5 6 7 8 9 10 birds on a wire"
    for size in flags.sizes.split(","):
        began = time.perf_counter()
        fields = TINY_FIELDS if flags.tiny else STUDENTS[size]
        how = dict(autoencoder=AutoencoderDC(), gemma=Gemma2(), dtype=jnp.bfloat16)
        if flags.tiny:
            how |= dict(autoencoder=TINY_AUTOENCODER, gemma=TINY_GEMMA)
        write_random_pipeline(flags.folder / size, fields, texts, base=base, **how)
        base = base or flags.folder / size
        written = sum(p.stat().st_size for p in (flags.folder / size).rglob("*.safetensors"))
        seconds = round(time.perf_counter() - began, 1)
        write({"folder": size, "seconds": seconds, "gb": round(written / 1e9, 3)})


def torch(flags, write):
    """Compiles diffusers' transformer and decoder by torch, and calls each; a line each, with seconds."""
    device, mode = ("cpu", None) if flags.tiny else ("cuda", "reduce-overhead")
    dtype = "float32" if flags.tiny else "bfloat16"
    height, width = cli.parse_size(flags.image, "--image")
    pipelines = reference.load_pipelines(str(flags.folder), device, dtype, mode)
    folder = flags.folder / "transformer"
    fields = fields_from_config(read_config(folder, reference.CLASSES["transformer"]), str(folder))
    inputs = network_inputs(fields, flags.batch, height, width)
    latents = np.zeros((flags.batch, height // FACTOR, width // FACTOR, fields["in_channels"]))
    prompts = ["a photo of a bird"] * flags.batch
    calls = {
        "transformer": reference.forward_calls(pipelines, inputs, device, dtype),
        "decoder": reference.decoder_calls(pipelines, latents, device, dtype),
        "whole": {
            arm: reference.whole_call(pipeline, prompts, 1, height, width)
            for arm, pipeline in pipelines.items()
        },
    }
    for name in [name for name in calls if name in flags.parts.split(",")]:
        seconds = {arm: round(first_call(call), 1) for arm, call in calls[name].items()}
        write({"torch": name, "batch": flags.batch, "seconds": seconds})


def options(flags, write):
    """One network under each of `OPTIONS`, in turns with the same without any; a line each as it is known."""
    function, arguments = NETWORKS[flags.network](flags)
    base = compiled(function, *arguments)
    for name, words in OPTIONS.items() if jax.default_backend() == "gpu" else [("default", {})]:
        line = {"options": flags.network, "option": name}
        try:
            call, seconds = compiled(function, *arguments, options=words) if words else base
        except jax.errors.JaxRuntimeError as error:
            # Options come and go with versions of XLA.
            write(line | {"failed": str(error)[:300]})
            continue
        rounds = paired_rounds({"default": base[0], name: call}, 1 if flags.tiny else 25, turn=0.05)
        line |= {"compile_s": round(seconds, 2)}
        write(line | summarize(rounds, "default") | clocks())


def _transformer(flags):
    """A quarter of the 0.6B transformer at 1024 pixels."""
    fields = TINY_FIELDS if flags.tiny else STUDENTS["mid"]
    inputs = network_inputs(fields, 1, *((64, 64) if flags.tiny else (1024, 1024)))
    model = SanaTransformer(**(fields | {"dtype": jnp.bfloat16}))
    params = unstack_blocks(random_params(model, inputs, "bfloat16"))
    return network_calls(model)["forward"], (params, jax.device_put(inputs))


def _decoder(flags):
    config = TINY_AUTOENCODER if flags.tiny else AutoencoderDC()
    config = dataclasses.replace(config, dtype=jnp.bfloat16)
    params = jax.jit(config.init)(jax.random.key(0))["decoder"]
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    shape = (1, *((2, 2) if flags.tiny else (32, 32)), config.latent_channels)

    def decode(params, latents):
        return Decoder(config, config.dtype).apply({"params": params}, latents)

    return decode, (params, jax.random.normal(jax.random.key(1), shape))


NETWORKS = {"transformer": _transformer, "decoder": _decoder}


def accuracy(flags, write):
    """The share of right pictures of a digits student."""
    count = 8 if flags.tiny else 400
    found = {steps: digits_accuracy(flags.folder, count, steps=steps) for steps in (1, 2, 4)}
    write({"digits": "small", "pictures": count, "accuracy": found})


PARTS = {each.__name__: each for each in (ceilings, folders, torch, options, accuracy)}


def main(argv):
    parser = cli.Parser(prog="python benchmarks/gpu_parts.py", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="lines are added")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folders: into it; torch, accuracy: of a model"
    )
    parser.add_argument("--batch", type=int, default=1, help="torch: pictures at once")
    parser.add_argument("--image", default="1024x1024", metavar="HxW", help="torch: of a picture")
    parser.add_argument("--parts", default="transformer,decoder,whole", help="torch: which")
    parser.add_argument("--sizes", default="600m,1600m", help="folders: of networks")
    parser.add_argument("--network", default="transformer", choices=NETWORKS, help="options: which")
    parser.add_argument("--tiny", action="store_true", help="sizes for CPUs")
    flags = parser.parse_args(argv)
    command = " ".join(["python benchmarks/gpu_parts.py", *argv])
    with line_writer(flags.out, command) as write:
        PARTS[flags.part](flags, write)


if __name__ == "__main__":
    cli.run_command(main)
