"""FLOPs, bytes and collectives of programs: beside XLA's own counts, and of texts worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import ROOT, quick_compilation
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sprint_jax.core.config import load_config
from sprint_jax.core.errors import UserError
from sprint_jax.planning.compile import lower
from sprint_jax.planning.counts import analyze, collective_sums, total
from sprint_jax.planning.flops import _met
from sprint_jax.planning.hlo import Array, argument_bytes, parse, replica_group, trip_count
from sprint_jax.planning.topology import open_topology

LAYERS, WIDTH, HIDDEN, ROWS = 6, 256, 1024, 256  # ROWS per device
MESH = {"data": 2, "fsdp": 4}


def flops(function, *shapes) -> float:
    """FLOPs that are counted in a function compiled for one device."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return total(analyze(jax.jit(function).lower(*arguments).compile().as_text()), "flops")


def moved(works) -> dict:
    """Bytes over links by kind and axes."""
    found = {}
    for (_, kind, axes), (size, _) in collective_sums(works).items():
        found[kind, axes] = found.get((kind, axes), 0.0) + size
    return found


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["configs/teacher.py:600m", "configs/sprint.py:600m"])
def test_xla_counts_the_same_in_programs_without_loops(spec):
    """XLA's counts of one and two unrolled blocks, extrapolated, beside ours of a scan over four.

    The true updates at the width of 0.6B, in float32 and without remat, on few tokens and 8 devices.
    """
    values = {"data.source": "synthetic", "data.latent_size": (8, 8), "data.text_length": 16}
    values |= {"data.batch_size": 16, "ladd.taps": (0,), "mesh.fsdp": 8}
    values |= {"model.dtype": "float32", "model.remat": "none"}

    def counts(layers: int, scan: bool) -> dict[str, tuple[float, float]]:
        changes = {"model.num_layers": layers, "model.scan": scan}
        lowered = lower(load_config(str(ROOT / spec), values | changes), open_topology("local"))[0]
        with quick_compilation():
            compiled = lowered.compile()
        memory, theirs, text = (
            compiled.memory_analysis(),
            compiled.cost_analysis(),
            compiled.as_text(),
        )
        works = analyze(text)
        return {
            "flops": (total(works, "flops"), theirs["flops"]),
            "bytes": (total(works, "hbm"), theirs["bytes accessed"]),
            "arguments": (sum(argument_bytes(text).values()), memory.argument_size_in_bytes),
        }

    one, two, scanned = counts(1, False), counts(2, False), counts(4, True)
    theirs = {key: one[key][1] + 3 * (two[key][1] - one[key][1]) for key in one}
    # XLA counts elementwise arithmetic as well.
    assert scanned["flops"][0] <= theirs["flops"] <= 1.05 * scanned["flops"][0]
    assert scanned["flops"][1] < 0.5 * theirs["flops"]  # of a loop it counts one turn
    assert scanned["arguments"][0] == pytest.approx(theirs["arguments"], rel=1e-3)
    # A scan copies each block's weights out of the stack and its activations into one, so that bytes can be
    # compared in programs of one kind alone.
    for mine, xla in (one["bytes"], two["bytes"]):
        assert 0.85 * xla <= mine <= xla


def test_nested_scans_count_as_often_as_they_run():
    def outer(x, w):
        inner = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)
        return inner[0], None

    found = flops(lambda x, ws: jax.lax.scan(outer, x, ws)[0], (8, 16), (3, 16, 16))
    assert found == 3 * 5 * 2 * 8 * 16 * 16


def test_trip_count_without_xlas_own():
    loop = jax.jit(lambda x: jax.lax.fori_loop(2, 9, lambda i, x: x * i, x)).lower(1.0)
    computations, entry = parse(loop.as_text(dialect="hlo"))
    entry = computations[entry]
    loops = [each for each in entry.values() if each.opcode == "while"]
    assert [trip_count(computations, entry, each) for each in loops] == [7]


def test_a_loop_of_unknown_length_is_named():
    with pytest.raises(UserError, match="while"):
        flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x), (8, 8))


def test_positions_of_a_convolution_agree_with_counting_them():
    rng = np.random.default_rng(0)
    for size, kernel, out, stride, dilate, kernel_dilate in rng.integers(1, 7, (300, 6)).tolist():
        low = int(rng.integers(-3, 7))
        at = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilate - low
        met = (at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)
        assert _met(size, kernel, out, stride, dilate, kernel_dilate, low) == met.sum()


def test_a_batched_product_written_as_a_convolution():
    text = """HloModule m
ENTRY %main {
  %a = bf16[24,8,16] parameter(0)
  %b = bf16[24,16,32] parameter(1)
  ROOT %c = bf16[24,8,32] convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
}""".replace("WINDOW", "window={size=24 stride=23 lhs_dilate=24}")
    assert total(analyze(text), "flops") == 24 * 2 * 8 * 16 * 32


def test_a_sharded_step():
    """A scanned MLP with remat: kernels are split over fsdp, the batch over both axes."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)

    def struct(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def block(x, weights):
        return x + jax.nn.silu(x @ weights[0]) @ weights[1], None

    def loss(weights, x):
        return (jax.lax.scan(jax.checkpoint(block), x, weights)[0] ** 2).mean()

    def step(weights, x):
        return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, jax.grad(loss)(weights, x))

    into = struct((LAYERS, WIDTH, HIDDEN), None, "fsdp", None)
    out = struct((LAYERS, HIDDEN, WIDTH), None, None, "fsdp")
    x = struct((ROWS * 8, WIDTH), ("data", "fsdp"))
    jitted = jax.jit(step, out_shardings=(into.sharding, out.sharding))
    works = analyze(jitted.lower((into, out), x).compile().as_text(), MESH)
    # Per layer 7 products: 2 forward, 1 again, 4 backward.
    assert total(works, "flops") == 7 * LAYERS * 2 * ROWS * WIDTH * HIDDEN
    kernels = LAYERS * 2 * WIDTH * HIDDEN * 4
    assert moved(works) == {
        ("all-gather", "fsdp"): 2 * kernels * 3 / 4,  # forward and backward
        # In place of a reduce-scatter: twice its bytes.
        ("all-reduce", "fsdp"): 2 * kernels * 3 / 4,
        ("all-reduce", "data"): 2 * (kernels / 4) * 1 / 2,
    }
    assert all(work.count == LAYERS for work in works if work.collectives)


ASYNCHRONOUS = """HloModule m
%start {
  %p = bf16[4,8] parameter(0)
  %g.1 = bf16[16,8] all-gather(%p), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %s = (bf16[4,8], bf16[16,8]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}
%done {
  %p = bf16[4,8] parameter(0)
  %g.2 = bf16[16,8] all-gather(%p), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %e = bf16[16,8] custom-call(%p, %g.2), custom_call_target="AsyncCollectiveDone"
}
%scatter {
  %p = f32[16,8] parameter(0)
  %zero = s32[] constant(0)
  %r = f32[16,8] all-reduce(%p), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %k = f32[4,8] dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={4,8}
}
ENTRY %main {
  %a = bf16[4,8] parameter(0)
  %c = f32[16,8] parameter(1)
  %f1 = (bf16[4,8], bf16[16,8]) fusion(%a), kind=kCustom, calls=%start
  %f2 = f32[4,8] fusion(%c), kind=kCustom, calls=%scatter
  %sent = (f32[4,8], f32[4,8]) collective-permute-start(%f2), source_target_pairs={{0,4},{4,0}}
  %got = f32[4,8] collective-permute-done(%sent)
  ROOT %f3 = bf16[16,8] fusion(%a), kind=kCustom, calls=%done
}
"""

BETWEEN_SLICES = """HloModule m
ENTRY %main {
  %a = f32[16,8] parameter(0)
  %t = token[] after-all()
  %s = (f32[16,8], u32[], token[]) send(%a, %t), channel_id=9, ATTRIBUTES
  %g = f32[64,8] all-gather(%a), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %r = f32[16,8] copy(%a)
}
""".replace(
    "ATTRIBUTES",
    'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
)


def test_an_asynchronous_collective_counts_once_and_a_sliced_all_reduce_is_a_reduce_scatter():
    assert moved(analyze(ASYNCHRONOUS, MESH)) == {
        ("all-gather", "fsdp"): 16 * 8 * 2 * 3 / 4,
        ("reduce-scatter", "fsdp"): 16 * 8 * 4 * 3 / 4,
        ("collective-permute", "data"): 4 * 8 * 4,
    }
    # The program of one of several slices names its own groups alone.
    assert moved(analyze(BETWEEN_SLICES, MESH)) == {
        ("all-reduce", "dcn"): 16 * 8 * 4,
        ("all-gather", "fsdp"): 64 * 8 * 4 * 3 / 4,
    }


SLICED = """HloModule m
%update {
  %stack = f32[6,4,8] parameter(0)
  %x = f32[4,8] parameter(1)
  %i = s32[] parameter(2)
  %y = f32[1,4,8] bitcast(%x)
  %new = f32[6,4,8] dynamic-update-slice(%stack, %y, %i, %i, %i)
  %double = f32[4,8] add(%x, %x)
  ROOT %t = (f32[6,4,8], f32[4,8]) tuple(%new, %double)
}
%take {
  %stack = f32[6,4,8] parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,4,8] dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={1,4,8}
  ROOT %b = f32[4,8] bitcast(%s)
}
ENTRY %main {
  %stack = f32[6,4,8] parameter(0)
  %x = f32[4,8] parameter(1)
  %i = s32[] parameter(2)
  %u = (f32[6,4,8], f32[4,8]) fusion(%stack, %x, %i), kind=kLoop, calls=%update
  %v = f32[4,8]{1,0:S(1)} fusion(%stack, %i), kind=kLoop, calls=%take
  %w = f32[4,8]{1,0:S(1)} negate(%v)
  %started = (f32[4,8], f32[4,8]{1,0:S(1)}, u32[]) copy-start(%w)
  ROOT %r = f32[4,8] copy-done(%started)
}
"""


def test_traffic_counts_slices_and_updates_and_leaves_fast_memory_out():
    part, number = 4 * 8 * 4, 4
    expected = 3 * part + number  # update: reads x, writes its part of the stack, and the double
    expected += part + number  # take: reads a slice, writes to fast memory
    expected += part  # the copy back: written to main memory; negate touches fast memory alone
    assert total(analyze(SLICED), "hbm") == expected


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("={{0,1},{2,3}}", (0, 1)),
        ("=[2,2]<=[4]", (0, 1)),
        ("=[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("=mesh['a'=2,'b'=2] {'b'}", (0, 1)),
        ("=mesh['a'=2,'b'=2] {'a'}", (0, 2)),
        ("=mesh['a'=2,'b'=2] {'a','b'}", (0, 1, 2, 3)),
        ("=mesh['a'=4] {'a':(1)2}", (0, 2)),
        ("=mesh['a'=4] {'a':(2)2}", (0, 1)),
        ("=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", (0, 2)),
        ("=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", (3, 1)),
        ("={}", (0, 1, 2, 3)),
    ],
)
def test_replica_groups(text, group):
    assert replica_group(f"channel_id=1, replica_groups{text}, dimensions={{1}}", 4) == group


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (Array("f32", (8, 1024, 36, 32), "3,2,1,0:T(8,128)"), 8 * 1024 * 40 * 128 * 4),
        (Array("bf16", (300, 2304), "1,0:T(8,128)(2,1)"), 304 * 2304 * 2),
        (Array("f32", (1000,), "0:T(1024)"), 4096),
        (Array("f32", (30, 128), "0,1:T(8,128)"), 128 * 128 * 4),
        (Array("s4", (3,)), 2),
    ],
)
def test_bytes_of_tiled_layouts(array, size):
    assert array.padded_bytes == size
