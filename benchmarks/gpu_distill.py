"""Times the updates of a distillation on one GPU, at the largest batch that fits, and adds JSON lines.

    python benchmarks/gpu_distill.py --size 600m --out FILE

Weights, latents and text are random and stay on the device. The first lines say what the compiler wants for
each batch that was tried; the last has milliseconds of both updates as [minimum, median, maximum] over pairs of
them, images per second, the FLOP/s of `TFLOP`, memory and losses. Two pairs warm up.
"""

import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.benchmarking.measure import clocks, peak_memory
from sprint_jax.benchmarking.scripts import line_writer
from sprint_jax.benchmarking.timing import spread
from sprint_jax.core import cli
from sprint_jax.core.config import load_config
from sprint_jax.training import setup
from sprint_jax.training.stages import lower_updates

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "sprint.py"
# Where the search begins, by GB of memory (docs/planning.md).
BATCHES = {"600m": {140: 192, 80: 96, 40: 24}, "1600m": {140: 96, 80: 32}}
# Of both updates without remat, per image of 1024 pixels: `plan`'s model_flops_per_device over its images.
TFLOP = {"600m": 16.3, "1600m": 48.6}
TINY = ("model.num_layers=2", "model.num_attention_heads=1", "model.caption_channels=16")
TINY += ("model.num_cross_attention_heads=1", "data.latent_size=(2,2)", "data.text_length=4")
TINY += ("model.cross_attention_head_dim=32", "ladd.taps=(1,)", "model.dtype=float32")


def distill(flags, write):
    """Milliseconds of both updates at the largest batch that fits, MFU, and memory."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    batch = flags.batch or (2 if flags.tiny else _first_batch(flags.size, limit))
    while True:
        began = time.perf_counter()
        shapes, lowered = _lowered(flags, batch)
        programs = [update.compile() for update in lowered]
        held, more = max((_memory(each, shapes) for each in programs), key=sum)
        needed = round((held + more) / 1e9, 2)
        write({"distill": flags.size, "batch": batch, "needed_gb": needed})
        if held + more <= limit or batch == 1:
            break
        # What is held hardly changes, the rest grows with the batch.
        batch = max(1, int(0.97 * batch * (limit - held) / more))
        batch -= batch % 8 if batch > 8 else 0
    seconds = time.perf_counter() - began
    state, batch_arrays, frozen = _random(shapes)
    times, metrics, until = [], {}, None
    for step in range(flags.pairs + 2):
        taken = []
        for program in programs:
            began = time.perf_counter()
            state, found = jax.block_until_ready(program(state, batch_arrays, frozen))
            taken.append(1e3 * (time.perf_counter() - began))
            metrics |= {name: float(value) for name, value in found.items() if np.ndim(value) == 0}
        times.append(taken)
        until = until or time.perf_counter() + flags.seconds
        if step >= 3 and time.perf_counter() > until:
            break
    pairs = times[2:]  # the first two warm up
    ms = [spread(column) for column in zip(*pairs, strict=True)]
    per_second = 1e3 * batch / sum(each[1] for each in ms)
    line = {
        "distill": flags.size,
        "batch": batch,
        "pairs": len(pairs),
        "compile_s": round(seconds, 1),
    }
    line |= {"ms": dict(zip(("generator", "discriminator"), ms, strict=False))}
    line |= {"images_per_second": float(f"{per_second:.4g}")}
    line |= {"flops_per_second": TFLOP[flags.size] * 1e12 * per_second, "needed_gb": needed}
    finite = {name: value for name, value in metrics.items() if name.startswith("loss")}
    write(line | {"losses": finite, "peak_gb": peak_memory()} | clocks())


def _first_batch(size, limit):
    fitting = [count for gb, count in BATCHES[size].items() if limit >= 0.85e9 * gb]
    return max(fitting, default=8)


def _lowered(flags, batch):
    """Shapes of (state, batch, frozen) and the traced updates, of one device."""
    words = [f"data.batch_size={batch}", "data.source=synthetic", "mesh.data=1", "mesh.fsdp=1"]
    words += TINY if flags.tiny else ()
    c = load_config(f"{CONFIG}:{flags.size}", [f"--config.{word}" for word in words])
    mesh = setup.mesh_from(c, jax.devices()[:1])
    nets, *shapes = setup.abstract_run(c, mesh)
    return shapes, lower_updates(c, nets, *shapes)


def _memory(program, shapes):
    """Bytes that a run holds between updates, and on top of them while ``program`` runs."""
    memory = program.memory_analysis()
    results = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return held, memory.temp_size_in_bytes + results


def _random(shapes):
    """Arrays of these shapes: moments and counters zero, masks one, all else random."""
    state, batch, frozen = shapes

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, shape, scale):
        return scale * jax.random.normal(key, shape)

    def fill(tree, scale, whole=0):
        leaves, structure = jax.tree.flatten(tree)
        made = []
        for number, leaf in enumerate(leaves):
            array = jnp.full(leaf.shape, whole, leaf.dtype)
            if scale and jnp.issubdtype(leaf.dtype, jnp.floating):
                key = jax.random.fold_in(jax.random.key(0), number)
                array = draw(key, leaf.shape, scale).astype(leaf.dtype)
            made.append(jax.device_put(array, leaf.sharding))
        return structure.unflatten(made)

    moments = {name: getattr(state, name) for name in ("opt_state", "disc_opt_state")}
    rest = fill(state.replace(**dict.fromkeys(moments)), 0.02)
    state = rest.replace(**{name: fill(each, 0) for name, each in moments.items()})
    return state, fill(batch, 1.0, 1), fill(frozen, 0.02, 1)


def main(argv):
    parser = cli.Parser(prog="python benchmarks/gpu_distill.py", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="lines are added")
    add("--size", default="600m", choices=TFLOP, help="of the network (default 600m)")
    add("--batch", type=int, default=0, help="the first to try (default: by memory)")
    add("--pairs", type=int, default=20, help="of updates to time, at most (default 20)")
    add("--seconds", type=float, default=40, help="no pair begins after them (default 40)")
    add("--tiny", action="store_true", help="sizes for CPUs")
    flags = parser.parse_args(argv)
    with line_writer(flags.out, " ".join(["python benchmarks/gpu_distill.py", *argv])) as write:
        distill(flags, write)


if __name__ == "__main__":
    cli.run_command(main)
