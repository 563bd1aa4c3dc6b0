"""Quality of the compiled training step, from what libtpu's compiler makes of it for eight v5e chips.

At the width of 0.6B with two of its 28 blocks: everything here is per block or per image. Nothing is run.
"""

import importlib.util
from math import prod

import jax
import pytest
from helpers.runs import ROOT

from sprint_jax.core.config import load_config
from sprint_jax.models.blocks import compute_params
from sprint_jax.planning import compile as plan_compile
from sprint_jax.planning.counts import analyze, collective_sums, total
from sprint_jax.planning.layout import image_flops
from sprint_jax.planning.topology import open_topology

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra 'plan'"
)

DEVICES, BLOCKS, BATCH = 8, 2, 16


@pytest.fixture(scope="module")
def topology():
    return open_topology("v5e:2x4")


def config(**changes):
    values = {
        "model.num_layers": BLOCKS,
        "ladd.taps": (0, 1),
        "data.batch_size": BATCH,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(str(ROOT / "configs/sprint.py:600m"), values)


@pytest.fixture(scope="module")
def step(topology):
    """Both updates with the state split over all chips: (mesh, state, frozen, programs, works)."""
    c = config()
    mesh, (_, state, _, frozen) = plan_compile.abstract(c, topology)
    programs = [plan_compile.compile_update(c, topology, n, False) for n in range(2)]
    works = [analyze(program.text, dict(mesh.shape)) for program in programs]
    return mesh, state, frozen, programs, works


def moved(works, kind) -> float:
    return sum(size for (_, each, _), (size, _) in collective_sums(works).items() if each == kind)


def gathered(tree, ways, dtype=None) -> float:
    """Bytes that a device receives to hold a tree whole, of which it has one of ``ways`` parts."""
    shapes = jax.eval_shape(lambda t: compute_params(t, dtype), tree) if dtype else tree
    held = sum(prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))
    return held * (ways - 1) / ways


@pytest.mark.slow
def test_weights_are_gathered_once_for_each_use_and_nothing_else_crosses_devices(step):
    """The student's blocks four times (two passes, forward and backward), the teacher's three times."""
    mesh, state, frozen, programs, works = step
    for program, work in zip(programs, works, strict=True):
        assert not program.warnings  # of tensors that were replicated to reshard them
        assert moved(work, "all-to-all") == 0
    ways = mesh.shape["fsdp"]
    student, teacher = dict(state.params), dict(frozen["teacher"])
    blocks = [tree.pop("transformer_blocks") for tree in (student, teacher)]
    of_student, of_teacher = (gathered(tree, ways, "bfloat16") for tree in blocks)
    heads = gathered(state.disc["params"], ways)
    outside = gathered(student, ways), gathered(teacher, ways)
    # One of the terms reads the teacher's outer layers, and both the student's.
    generator = 4 * of_student + 3 * of_teacher + 2 * sum(outside) + heads
    assert moved(works[0], "all-gather") <= 1.05 * generator
    # Fakes, and features of fakes, misaligned pairs and real images; heads forward and backward.
    discriminator = of_student + 3 * of_teacher + sum(outside) + 2 * heads
    assert moved(works[1], "all-gather") <= 1.05 * discriminator
    # No less either, or the count is wrong.
    assert moved(works[0], "all-gather") > 4 * of_student + 3 * of_teacher


@pytest.mark.slow
def test_flops_are_those_of_the_algorithm_and_of_remat(step, topology):
    """Forward-equivalents of both updates: counted by hand for blocks alone.

    A generator update: the teacher twice (CFG), the student's shared pass 3.96 and its second 3, the
    teacher's features and their way back to the images 2. A discriminator update: a forward pass, features
    three times. Two heads: 0.048 of 28 blocks for each batch through them, three times that with gradients.
    Remat costs one forward pass for each backward: of the student twice and of the teacher's features.
    """
    asked = image_flops(config(), topology)
    forward, heads = 1121.5e9 * BLOCKS / 28, 0.0485 * 1121.5e9
    by_hand = {
        "generator": (2 + 3.96 + 3 + 2) * forward + 2 * heads,
        "discriminator": 4 * forward + 3 * 3 * heads,
    }
    assert list(asked) == list(by_hand)
    assert 0.9 < asked["generator"] / by_hand["generator"] <= 1.05
    assert 0.8 < asked["discriminator"] / by_hand["discriminator"] <= 1.05
    compiled = [total(work, "flops") * DEVICES / BATCH for work in step[-1]]
    assert asked["generator"] < compiled[0] <= 1.05 * (asked["generator"] + 3 * forward)
    assert compiled[1] <= 1.05 * asked["discriminator"]


@pytest.fixture(scope="module")
def deep(topology):
    """The sCM update with all 28 blocks, for two batch sizes: a scan compiles as fast as one."""
    found = {}
    for batch in (BATCH, 2 * BATCH):
        c = config(ladd__weight=0.0, data__batch_size=batch, model__num_layers=28)
        found[batch] = c, plan_compile.compile_update(c, topology, 0, False)
    return found


@pytest.mark.slow
def test_activation_memory_of_an_image(deep, topology):
    """The sCM branch with remat at 1024 pixels in bfloat16: at most 0.25 GB for 28 blocks of 0.6B.

    From the slope over two batch sizes.
    """
    held = []
    for c, program in deep.values():
        _, (_, _, shapes, _) = plan_compile.abstract(c, topology)
        arguments = sum(
            prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(shapes)
        )
        held.append(program.bytes - arguments)
    assert 0.1e9 < (held[1] - held[0]) / (BATCH / DEVICES) <= 0.25e9


@pytest.mark.slow
def test_offload_keeps_block_inputs_in_the_hosts_memory(deep, topology):
    c, kept = deep[BATCH]
    offload = c.override({"model.remat": "offload"})
    offloaded = plan_compile.compile_update(offload, topology, 0, False)
    block_inputs = 28 * (BATCH / DEVICES) * 32 * 32 * 1152 * 2
    assert kept.host_bytes == 0
    assert offloaded.host_bytes == pytest.approx(block_inputs, rel=0.05)
    # A few of them are on their way at any time.
    assert offloaded.bytes < kept.bytes - 0.5 * block_inputs
