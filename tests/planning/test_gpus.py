"""GPU programs: counts of short texts against numbers worked out by hand, cards, and links between hosts."""

import math
from types import SimpleNamespace

import pytest
from helpers.runs import ROOT

from sprint_jax.core.config import load_config
from sprint_jax.core.errors import UserError
from sprint_jax.planning import topology
from sprint_jax.planning.chips import CHIPS, GPU_PASSES, link_seconds
from sprint_jax.planning.compile import compile_update, lower
from sprint_jax.planning.counts import Collective, analyze, collective_sums, total
from sprint_jax.planning.gpus import GPUS, VARIABLES, usable
from sprint_jax.planning.topology import has_cuda_compiler, open_topology

needs_cuda = pytest.mark.skipif(
    not has_cuda_compiler(), reason="CUDA's compiler is not installed (extra 'plan-cuda')"
)

# As XLA prints them for an H100, without what is not read.
GEMM = (
    'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
    '{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]},"precision_config":'
    '{"operand_precision":["DEFAULT","DEFAULT"],"algorithm":"ALG_UNSET"},"epilogue":"BIAS"}}'
)
LOOP = f"""HloModule jit_f, is_scheduled=true

%fused_slice (p.0: bf16[6,8,16], p.1: s32[]) -> bf16[8,16] {{
  %p.0 = bf16[6,8,16]{{2,1,0}} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,16]{{2,1,0}} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={{1,8,16}}
  ROOT %bitcast = bf16[8,16]{{1,0}} bitcast(%slice)
}}

%fused_add (p.2: s32[]) -> s32[] {{
  %p.2 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %add = s32[] add(%p.2, %one)
}}

%body (arg: (s32[], bf16[4,8], bf16[6,8,16])) -> (s32[], bf16[4,8], bf16[6,8,16]) {{
  %arg = (s32[], bf16[4,8]{{1,0}}, bf16[6,8,16]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[4,8]{{1,0}} get-tuple-element(%arg), index=1
  %stack = bf16[6,8,16]{{2,1,0}} get-tuple-element(%arg), index=2
  %kernel = bf16[8,16]{{1,0}} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %gemm = (bf16[4,16]{{1,0}}, s8[4194304]{{0}}) custom-call(%x, %kernel), {GEMM}
  %y = bf16[4,16]{{1,0}} get-tuple-element(%gemm), index=0
  %next = s32[] fusion(%i), kind=kLoop, calls=%fused_add
  ROOT %out = (s32[], bf16[4,8]{{1,0}}, bf16[6,8,16]{{2,1,0}}) tuple(%next, %x, %stack)
}}

ENTRY %main (a: bf16[4,8], w: bf16[6,8,16]) -> bf16[4,8] {{
  %a = bf16[4,8]{{1,0}} parameter(0)
  %w = bf16[6,8,16]{{2,1,0}} parameter(1)
  %start = s32[] constant(0)
  %tuple = (s32[], bf16[4,8]{{1,0}}, bf16[6,8,16]{{2,1,0}}) tuple(%start, %a, %w)
  %while = (s32[], bf16[4,8]{{1,0}}, bf16[6,8,16]{{2,1,0}}) while(%tuple), condition=%c, body=%body, \
backend_config={{"known_trip_count":{{"n":"6"}}}}
  ROOT %result = bf16[4,8]{{1,0}} get-tuple-element(%while), index=1
}}
"""


def test_a_loop_over_stacked_weights():
    """In each of six turns: a weight is copied out of its stack, cuBLAS multiplies, the counter grows."""
    works = analyze(LOOP)
    assert total(works, "flops") == 6 * 2 * 4 * 8 * 16
    copy = 8 * 16 * 2 + 4 + 8 * 16 * 2
    gemm = (4 * 8 + 8 * 16 + 4 * 16) * 2  # without the memory that cuBLAS works in
    assert total(works, "hbm") == 6 * (copy + gemm + 2 * 4)
    assert total(works, "kernels") == 6 * 3


IMAGE, KERNEL, OUT = (
    "bf16[2,8,8,16]{3,2,1,0}",
    "bf16[32,3,3,16]{3,2,1,0}",
    "bf16[2,8,8,32]{3,2,1,0}",
)
DEPTHWISE, SAME = "bf16[16,3,3,1]{3,2,1,0}", IMAGE


@pytest.mark.parametrize(
    ("target", "operands", "result", "channels"),
    [
        ("convForward", (IMAGE, KERNEL), OUT, 16 * 32),
        ("convBiasActivationForward", (IMAGE, KERNEL, "bf16[32]{0}"), OUT, 16 * 32),
        ("convBackwardFilter", (IMAGE, OUT), KERNEL, 16 * 32),
        ("convBackwardInput", (OUT, KERNEL), IMAGE, 16 * 32),
        ("convForward", (IMAGE, DEPTHWISE), SAME, 16),
    ],
)
def test_convolutions_of_cudnn(target, operands, result, channels):
    names = [f"a.{i}" for i in range(len(operands))]
    parameters = (
        f"  %{name} = {shape} parameter({i})\n"
        for i, (name, shape) in enumerate(zip(names, operands, strict=True))
    )
    text = (
        "ENTRY %main {\n" + "".join(parameters) + f"  ROOT %conv = ({result}, u8[777]{{0}}) "
        f"custom-call({', '.join(f'%{name}' for name in names)}), window={{size=3x3 pad=1_1x1_1}}, "
        f'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn${target}"\n}}'
    )
    works = analyze(text)
    # At the borders a row of the kernel stands on padding.
    assert total(works, "flops") == 2 * 2 * channels * (8 * 3 - 2) ** 2
    shapes = [shape.partition("{")[0][5:-1].split(",") for shape in (*operands, result)]
    assert total(works, "hbm") == 2 * sum(math.prod(map(int, shape)) for shape in shapes)


@pytest.mark.parametrize(("precision", "passes"), [("DEFAULT", 2), ("HIGHEST", 15)])
def test_float32_takes_longer(precision, passes):
    text = f"""ENTRY %main {{
  %a = f32[4,8]{{1,0}} parameter(0)
  %b = f32[8,16]{{1,0}} parameter(1)
  ROOT %gemm = (f32[4,16]{{1,0}}, s8[99]{{0}}) custom-call(%a, %b), {GEMM}
}}""".replace("DEFAULT", precision)
    (work,) = (work for work in analyze(text, passes=GPU_PASSES) if work.flops)
    assert (work.flops, work.passes) == (2 * 4 * 8 * 16, passes * 2 * 4 * 8 * 16)


def test_attention_of_cudnn():
    """Two products for each head: of 8 places with 3 keys of 16 channels."""
    text = """ENTRY %main {
  %q = bf16[2,8,4,16]{3,2,1,0} parameter(0)
  %k = bf16[2,3,4,16]{3,2,1,0} parameter(1)
  %bias = bf16[2,1,8,3]{3,2,1,0} parameter(2)
  ROOT %a = (bf16[2,4,8,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k, %bias), \
custom_call_target="__cudnn$fmhaScaleBiasSoftmax"
}"""
    assert total(analyze(text), "flops") == 2 * (2 * 2 * 4 * 8 * 3 * 16)


def test_asynchronous_collectives_of_several_arrays():
    groups = "channel_id=1, replica_groups=mesh['axis_0'=8] {'axis_0'}"
    text = f"""ENTRY %main {{
  %a = bf16[1,16]{{1,0}} parameter(0)
  %b = f32[2]{{0}} parameter(1)
  %c = f32[8,4]{{1,0}} parameter(2)
  %ag = ((bf16[1,16]{{1,0}}, f32[2]{{0}}), (bf16[8,16]{{1,0}}, /*index=1*/f32[16]{{0}})) \
all-gather-start(%a, %b), {groups}, dimensions={{0}}
  %ag-done = (bf16[8,16]{{1,0}}, f32[16]{{0}}) all-gather-done(%ag)
  %rs = ((f32[8,4]{{1,0}}), f32[1,4]{{1,0}}) reduce-scatter-start(%c), {groups}, to_apply=%add
  %rs-done = f32[1,4]{{1,0}} reduce-scatter-done(%rs)
  %ar = f32[8,4]{{1,0}} all-reduce-start(%c), {groups}, to_apply=%add
  ROOT %ar-done = f32[8,4]{{1,0}} all-reduce-done(%ar)
}}"""
    works = analyze(text, {"fsdp": 8})
    gathered, whole, part = 8 * 16 * 2 + 16 * 4, 8 * 4 * 4, 4 * 4
    sums = {kind: moved for (_, kind, _), (moved, _) in collective_sums(works).items()}
    assert sums == {
        "all-gather": 7 / 8 * gathered,
        "reduce-scatter": 7 / 8 * whole,
        "all-reduce": 7 / 8 * 2 * whole,
    }
    assert total(works, "kernels") == 3
    assert total(works, "hbm") == (gathered / 8 + gathered) + (whole + part) + 2 * whole


@pytest.mark.parametrize(
    ("kind", "group", "network", "seconds"),
    [
        ("all-gather", range(8), "ici", 1 / 450),
        ("all-gather", range(16), "dcn", 1 / (8 * 50)),  # a ring over eight network cards each
        ("all-reduce", (0, 8), "dcn", 1 / 50),
        ("all-to-all", range(16), "dcn", 1 / 50),
    ],
)
def test_links_between_hosts(kind, group, network, seconds):
    devices = [SimpleNamespace(process_index=number // 8, slice_index=0) for number in range(16)]
    each = Collective(kind, "fsdp", len(group), tuple(group), 1e9)
    assert link_seconds(CHIPS["H100"], each, devices) == (network, pytest.approx(seconds))


def test_memory_that_jax_takes(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert usable(80e9) == 60e9
    monkeypatch.setenv(VARIABLES[1], ".9")
    assert usable(80e9) == pytest.approx(72e9)
    monkeypatch.setenv(VARIABLES[0], "75%")
    with pytest.raises(UserError, match=VARIABLES[0]) as info:
        usable(80e9)
    assert info.value.exit_code == 2


def test_cards_are_those_of_the_table():
    for gpu in GPUS.values():
        assert gpu.chip in CHIPS and f"device_memory_size: {gpu.memory} " in gpu.target
        assert abs(gpu.memory / CHIPS[gpu.chip].hbm_bytes - 1) < 0.08


@pytest.mark.parametrize("name", ["h100:0", "h100:2x2x2", "h100", "h300:1", "h200:8x"])
def test_names_that_are_no_topology(name):
    with pytest.raises(UserError, match="h100:8") as info:
        open_topology(name)
    assert info.value.exit_code == 2


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sprint_jax\[plan-cuda\]") as info:
        open_topology("h100:8")
    assert info.value.exit_code == 1


@needs_cuda
def test_hosts_and_cards():
    found = open_topology("h200:2x4")
    assert (found.chip_name, len(found.devices)) == ("H200", 8)
    assert [device.process_index for device in found.devices] == [0] * 4 + [1] * 4
    assert found.hbm_bytes == usable(GPUS["h200"].memory)


@needs_cuda
@pytest.mark.slow
def test_a_plan_is_what_the_whole_compilation_gives():
    """Of a small teacher on two cards: the process that ends early sees the same program and memory."""
    words = ["model.num_layers=2", "model.num_attention_heads=1", "data.batch_size=16"]
    words += ["model.num_cross_attention_heads=1", "mesh.fsdp=2"]
    c = load_config(
        str(ROOT / "configs/digits.py:teacher,small"), [f"--config.{word}" for word in words]
    )
    cards = open_topology("h100:2")
    early = compile_update(c, cards, 0, full=False)
    compiled = lower(c, cards)[0].compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes + max(0, results)
    assert early.fits and early.bytes == pytest.approx(whole, rel=0.01)
    mine, theirs = (analyze(text, {"fsdp": 2}) for text in (early.text, compiled.as_text()))
    assert total(mine, "kernels") > 100 and total(mine, "flops") > 0
    for field in ("flops", "hbm", "kernels"):
        assert total(mine, field) == total(theirs, field)
    assert "all-gather" in {kind for _, kind, _ in collective_sums(mine)}
