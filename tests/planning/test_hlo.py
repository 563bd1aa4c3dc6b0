"""Programs whose FLOPs and collectives are known, on CPU and compiled for TPU topologies."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sprint_jax.planning import hlo
from sprint_jax.planning.hlo_count import _positions
from sprint_jax.planning.hlo_text import Array, parse, replica_groups, trip_count
from sprint_jax.planning.topology import open_topology

LAYERS, WIDTH, HIDDEN, ROWS = 6, 256, 1024, 256  # ROWS per device
MESH = {"data": 2, "fsdp": 4}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'plan')"
)


def flops(function, *shapes) -> float:
    """FLOPs that the analyzer finds in a function compiled for one device."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.analyze(jax.jit(function).lower(*arguments).compile().as_text()).total_flops


def block(x, weights):
    first, second = (weight.astype(x.dtype) for weight in weights)
    return x + jax.nn.silu(x @ first) @ second, None


def train_step(weights, x):
    """One step of a scanned MLP with remat; per layer 7 products: 2 forward, 1 again, 4 backward."""

    def loss(weights):
        y, _ = jax.lax.scan(jax.checkpoint(block), x, weights)
        return (y.astype(jnp.float32) ** 2).mean()

    return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, jax.grad(loss)(weights))


def sharded_step(devices, dtype):
    """`train_step` lowered for a mesh of data 2 x fsdp 4: kernels over fsdp, batch over both."""
    mesh = jax.make_mesh(
        tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2, devices=devices
    )

    def struct(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    weights = (
        struct((LAYERS, WIDTH, HIDDEN), jnp.float32, None, "fsdp", None),
        struct((LAYERS, HIDDEN, WIDTH), jnp.float32, None, None, "fsdp"),
    )
    x = struct((ROWS * 8, WIDTH), dtype, ("data", "fsdp"))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, weights)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=shardings)
    return step.lower(weights, x)


STEP_FLOPS = 7 * LAYERS * 2 * ROWS * WIDTH * HIDDEN  # per device


def test_nested_scans_count_as_often_as_they_run():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, w):
        return jax.lax.scan(lambda x, _: inner(x, w), x, None, length=5)[0], None

    found = flops(lambda x, ws: jax.lax.scan(outer, x, ws)[0], (8, 16), (3, 16, 16))
    assert found == 3 * 5 * 2 * 8 * 16 * 16


def test_a_loop_that_counts_down_and_one_that_is_carried_its_bound():
    def down(x, w):
        def body(state):
            return state[0] - 2, jnp.tanh(state[1] @ w)

        return jax.lax.while_loop(lambda state: state[0] > 1, body, (jnp.int32(11), x))[1]

    assert flops(down, (8, 16), (16, 16)) == 5 * 2 * 8 * 16 * 16


def test_a_loop_of_unknown_length_is_named():
    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x)

    argument = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    cost = hlo.analyze(jax.jit(function).lower(argument).compile().as_text())
    assert len(cost.unknown_loops) == 1 and "while" in cost.unknown_loops[0]
    assert cost.total_flops == 2 * 8**3  # one turn


def test_remat_and_gradients_agree_with_xla_on_the_unrolled_program():
    weights = ((LAYERS, WIDTH, HIDDEN), (LAYERS, HIDDEN, WIDTH))
    arguments = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in weights)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    lowered = jax.jit(train_step).lower(arguments, x)
    assert hlo.analyze(lowered.compile().as_text()).total_flops == STEP_FLOPS
    # Before any optimization, too: what MFU is counted from.
    assert hlo.analyze(lowered.as_text(dialect="hlo")).total_flops == STEP_FLOPS

    def unrolled(weights, x):
        def loss(weights):
            y = x
            for i in range(LAYERS):
                y, _ = block(y, [w[i] for w in weights])
            return (y**2).mean()

        return jax.grad(loss)(weights)

    compiled = jax.jit(unrolled).lower(arguments, x).compile()
    found = hlo.analyze(compiled.as_text()).total_flops
    # Without remat, and without the gradient of the first layer's input.
    assert found == (6 * LAYERS - 1) * 2 * ROWS * WIDTH * HIDDEN
    # XLA counts elementwise operations as well.
    assert found <= compiled.cost_analysis()["flops"] <= 1.05 * found


@pytest.mark.parametrize("groups", [1, 8])
def test_convolutions_agree_with_xla(groups):
    def function(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (2, 1),
            ((1, 1), (0, 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    shapes = ((2, 9, 7, 8), (3, 3, 8 // groups, 16))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    assert hlo.analyze(compiled.as_text()).total_flops == compiled.cost_analysis()["flops"]


def test_a_batched_product_written_as_a_convolution():
    text = """HloModule m
ENTRY %main (a: bf16[24,8,16], b: bf16[24,16,32]) -> bf16[24,8,32] {
  %a = bf16[24,8,16]{2,1,0} parameter(0)
  %b = bf16[24,16,32]{2,1,0} parameter(1)
  ROOT %c = bf16[24,8,32]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
}
""".replace("WINDOW", "window={size=24 stride=23 lhs_dilate=24}")
    assert hlo.analyze(text).flops == {("bf16", "default"): 24 * 2 * 8 * 16 * 32}


def test_collectives_of_a_sharded_step_on_cpu():
    compiled = sharded_step(jax.devices(), jnp.float32).compile()
    cost = hlo.analyze(compiled.as_text(), MESH)
    assert cost.total_flops == STEP_FLOPS
    kernels = LAYERS * 2 * WIDTH * HIDDEN * 4
    assert cost.bytes_by("kind", "axes") == {
        ("all-gather", "fsdp"): 2 * kernels * 3 / 4,  # forward and backward
        ("all-reduce", "fsdp"): 2
        * kernels
        * 3
        / 4,  # in place of a reduce-scatter: twice its bytes
        ("all-reduce", "data"): 2 * (kernels / 4) * 1 / 2,
    }
    assert all(each.count == LAYERS for each in cost.collectives)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_collectives_of_a_sharded_step_on_tpu(topology):
    lowered = sharded_step(open_topology(topology).devices, jnp.bfloat16)
    cost = hlo.analyze(lowered.compile().as_text(), MESH, (197e12, 819e9))
    assert cost.total_flops == STEP_FLOPS
    assert {key[0] for key in cost.flops} == {"bf16"}
    kernels = LAYERS * 2 * WIDTH * HIDDEN * 2
    found = cost.bytes_by("kind", "axes")
    assert found["all-gather", "fsdp"] == 2 * kernels * 3 / 4
    # One of the two scatters is padded to tiles, and puts that right with its neighbours.
    assert kernels * 3 / 4 <= found["reduce-scatter", "fsdp"] <= 1.1 * kernels * 3 / 4
    assert found["all-reduce", "data"] <= 2 * (kernels / 4) * 1 / 2 * 1.1
    assert set(found) <= {
        ("all-gather", "fsdp"),
        ("reduce-scatter", "fsdp"),
        ("all-reduce", "data"),
        ("collective-permute", "fsdp"),
    }
    assert cost.compute_seconds + cost.memory_seconds >= STEP_FLOPS / 197e12
    # Parameters in and out once, at least.
    assert cost.traffic >= 2 * kernels * 2 / 4


ASYNCHRONOUS = """HloModule m
%start (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %g.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}
%middle (p: bf16[4,8], x: bf16[8,8]) -> (bf16[8,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %x = bf16[8,8]{1,0} parameter(1)
  %d = bf16[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g.2 = bf16[16,8]{1,0} all-gather(%p), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %t = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) tuple(%d, %g.2)
}
%done (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %g.3 = bf16[16,8]{1,0} all-gather(%p), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %e = bf16[16,8]{1,0} custom-call(%p, %g.3), custom_call_target="AsyncCollectiveDone"
}
%scatter (p: f32[16,8]) -> f32[4,8] {
  %p = f32[16,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %r = f32[16,8]{1,0} all-reduce(%p), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %k = f32[4,8]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={4,8}
}
ENTRY %main (a: bf16[4,8], b: bf16[8,8], c: f32[16,8]) -> bf16[16,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  %c = f32[16,8]{1,0} parameter(2)
  %f1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %f2 = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) fusion(%a, %b), kind=kOutput, calls=%middle
  %f4 = f32[4,8]{1,0} fusion(%c), kind=kCustom, calls=%scatter
  %sent = (f32[4,8]{1,0}, f32[4,8]{1,0}) collective-permute-start(%f4), source_target_pairs={{0,4},{4,0}}
  %got = f32[4,8]{1,0} collective-permute-done(%sent)
  ROOT %f3 = bf16[16,8]{1,0} fusion(%a), kind=kCustom, calls=%done
}
"""


def test_an_asynchronous_collective_counts_once_and_a_sliced_all_reduce_is_a_reduce_scatter():
    cost = hlo.analyze(ASYNCHRONOUS, MESH)
    assert cost.bytes_by("kind", "axes") == {
        ("all-gather", "fsdp"): 16 * 8 * 2 * 3 / 4,
        ("reduce-scatter", "fsdp"): 16 * 8 * 4 * 3 / 4,
        ("collective-permute", "data"): 4 * 8 * 4,
    }
    assert [each.raw for each in cost.collectives if each.kind == "reduce-scatter"] == [4 * 8 * 4]
    assert cost.total_flops == 2 * 8**3


def test_collectives_between_slices():
    text = """HloModule m
ENTRY %main (a: f32[16,8]) -> f32[16,8] {
  %a = f32[16,8]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (f32[16,8]{1,0}, u32[], token[]) send(%a, %t), channel_id=9, is_host_transfer=true, ATTRIBUTES
  %g = f32[64,8]{1,0} all-gather(%a), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %r = f32[16,8]{1,0} copy(%a)
}
"""
    attributes = (
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    cost = hlo.analyze(text.replace("ATTRIBUTES", attributes), MESH)
    # The program of one slice names its own groups alone.
    assert cost.bytes_by("kind", "axes") == {
        ("all-reduce", "dcn"): 16 * 8 * 4,
        ("all-gather", "fsdp"): 64 * 8 * 4 * 3 / 4,
    }


SLICED = """HloModule m
%update (stack: f32[6,4,8], x: f32[4,8], i: s32[]) -> (f32[6,4,8], f32[4,8]) {
  %stack = f32[6,4,8]{2,1,0} parameter(0)
  %x = f32[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %y = f32[1,4,8]{2,1,0} bitcast(%x)
  %new = f32[6,4,8]{2,1,0} dynamic-update-slice(%stack, %y, %i, %zero, %zero)
  %double = f32[4,8]{1,0} add(%x, %x)
  ROOT %t = (f32[6,4,8]{2,1,0}, f32[4,8]{1,0}) tuple(%new, %double)
}
%take (stack: f32[6,4,8], i: s32[]) -> f32[4,8] {
  %stack = f32[6,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %s = f32[1,4,8]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %b = f32[4,8]{1,0} bitcast(%s)
}
ENTRY %main (stack: f32[6,4,8], x: f32[4,8], i: s32[]) -> f32[4,8] {
  %stack = f32[6,4,8]{2,1,0} parameter(0)
  %x = f32[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %u = (f32[6,4,8]{2,1,0}, f32[4,8]{1,0}) fusion(%stack, %x, %i), kind=kLoop, calls=%update
  %v = f32[4,8]{1,0:S(1)} fusion(%stack, %i), kind=kLoop, calls=%take
  %w = f32[4,8]{1,0:S(1)} negate(%v)
  %started = (f32[4,8]{1,0}, f32[4,8]{1,0:S(1)}, u32[]) copy-start(%w)
  ROOT %r = f32[4,8]{1,0} copy-done(%started)
}
"""


def test_traffic_counts_slices_and_updates_and_leaves_fast_memory_out():
    part, number = 4 * 8 * 4, 4
    expected = 3 * part + number  # update: reads x, writes its part of the stack, and the double
    expected += part + number  # take: reads a slice, writes to fast memory
    expected += part  # the copy back: written to main memory; negate touches fast memory alone
    assert hlo.analyze(SLICED).traffic == expected


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [(1, 3), (0, 2)]),
        ("replica_groups={}", [(0, 1, 2, 3)]),
        ("channel_id=1", [(0, 1, 2, 3)]),
    ],
)
def test_replica_groups(text, groups):
    found = replica_groups(f"{text}, dimensions={{1}}", 4)
    assert [tuple(sorted(group)) for group in found] == groups


def test_axes_of_groups_names_every_subset():
    shape = {"data": 2, "fsdp": 4, "tensor": 1, "other": 2}
    ids = np.arange(16).reshape(2, 4, 2)
    named = hlo.axes_of_groups(shape)
    assert len(named) == 7
    groups = frozenset(frozenset(ids[:, i, :].ravel().tolist()) for i in range(4))
    assert named[groups] == "data+other"


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (Array("f32", (8, 1024, 36, 32), 0, "3,2,1,0:T(8,128)"), 8 * 1024 * 40 * 128 * 4),
        (Array("bf16", (300, 2304), 0, "1,0:T(8,128)(2,1)"), 304 * 2304 * 2),
        (Array("f32", (1000,), 0, "0:T(1024)"), 4096),
        (Array("f32", (30, 128), 0, "0,1:T(8,128)"), 128 * 128 * 4),
        (Array("f32", (3, 5), 0, "1,0"), 60),
        (Array("pred", (), 0, ""), 1),
        (Array("s4", (3,), 0, ""), 2),
    ],
)
def test_bytes_of_tiled_layouts(array, size):
    assert array.padded_bytes == size


def test_text_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.analyze("module @jit_f { }")


def test_trip_count_without_xlas_own():
    text = jax.jit(lambda x: jax.lax.fori_loop(2, 9, lambda i, x: x * i, x)).lower(1.0)
    computations, entry = parse(text.as_text(dialect="hlo"))
    loops = [
        (computation, each)
        for computation in computations.values()
        for each in computation.values()
        if each.opcode == "while"
    ]
    assert [trip_count(computations, *loop) for loop in loops] == [7]
    assert entry in computations


def test_positions_agree_with_counting_them():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, kernel, out, stride, dilate, kernel_dilate = (int(n) for n in rng.integers(1, 7, 6))
        low = int(rng.integers(-3, 7))
        at = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilate - low
        met = (at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)
        numbers = (size, kernel, out, stride, dilate, kernel_dilate, low)
        assert _positions(*numbers) == met.sum(), numbers
