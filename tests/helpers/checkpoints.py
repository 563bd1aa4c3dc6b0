"""A small state with every kind of leaf, saved checkpoints of it, and ways to look at them."""

from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from sprint_jax.checkpoints.checkpoint import Checkpoints

META = {"stage": "distill", "model": {"width": 16, "heads": [1, 2]}, "optimizer": "came"}


@flax.struct.dataclass
class State:
    """As the train state: nested dicts, an optax state, absent parts, several dtypes."""

    step: Any
    params: Any
    ema: Any
    opt_state: Any
    disc: Any = None


def random_bits(seed, shape):
    """float32 of random bits (NaN and infinities among them): incompressible, so stored as is."""
    words = np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)
    return jnp.asarray(words.view(np.float32))


def make_state(seed=0):
    params = {
        "transformer_blocks": {"kernel": random_bits(seed, (2, 16, 24))},
        "out": {"kernel": random_bits(seed + 1, (16, 8)).astype(jnp.bfloat16)},
        "flag": jnp.array([True, False]),
    }
    ema = {**params, "transformer_blocks": {"kernel": random_bits(seed + 2, (2, 16, 24))}}
    floats = {"kernel": random_bits(seed + 3, (32, 16))}
    opt_state = optax.adamw(1e-3).init(floats)
    opt_state = jax.tree.map(
        lambda x: random_bits(seed + 4, x.shape) if x.ndim else x + seed, opt_state
    )
    return State(jnp.int32(seed), params, ema, opt_state)


def data_file(checkpoint: Path, content) -> tuple[Path, int]:
    """The file of a checkpoint that holds the bytes of an array, and where."""
    content = np.asarray(content).tobytes()
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and (at := path.read_bytes().find(content)) >= 0:
            return path, at
    raise AssertionError("the array is not stored as is")


def flip_bit(path: Path, at: int, bit: int = 2):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def mesh(*sizes):
    return jax.make_mesh(
        sizes, ("data", "fsdp")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes)
    )


def save_two(workdir: Path) -> tuple[Path, dict[int, State]]:
    """Writes checkpoints of steps 10 and 20 into a workdir; returns it and the states by step."""
    states = {10: make_state(10), 20: make_state(20)}
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        for step, state in states.items():
            assert checkpoints.save(step, state, META)
    return workdir, states


def restore(workdir, expect=META, abstract=None):
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        return checkpoints.restore_latest(abstract or make_state(), expect)
