"""The command: bad input, local plans and sweeps on 8 virtual devices, TPU topologies."""

import importlib.util
import json

import jax
import pytest
from helpers.runs import ROOT, quick_compilation, run_here

from sprint_jax import plan
from sprint_jax.core.config import load_config
from sprint_jax.planning import search as plan_sweep
from sprint_jax.planning import topology
from sprint_jax.planning.compile import compile_update, lower
from sprint_jax.planning.hlo import analyze
from sprint_jax.planning.layout import KINDS, algorithm_flops, plan_layout
from sprint_jax.planning.topology import open_topology, out_of_memory

GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra 'plan')"
)
TINY = (
    "--config.model.num_layers=2",
    "--config.model.num_attention_heads=1",
    "--config.model.num_cross_attention_heads=1",
    "--config.data.batch_size=16",
)
STUDENT = ("--config", str(ROOT / "configs/digits.py:student,small"), *TINY, "--config.ladd.taps=1")
TEACHER = ("--config", str(ROOT / "configs/digits.py:teacher,small"), *TINY)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Compiling is what these tests cost."""
    with quick_compilation():
        yield


@pytest.fixture
def command(monkeypatch, capfd):
    def run(*words):
        return run_here(list(words), monkeypatch, capfd, main=plan.main)

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--topology", "v9:2x2"), "v9:2x2"),
        (("--topology", "v5e"), "v5e:16x16"),
        (("--topology", "v5e:0x4"), "v5e:0x4"),
        (("--topology", "local", "--slices", "2"), "--slices"),
        (("--topology", "local", "--sweep", "batch,speed"), "'speed' is not one of batch, fsdp"),
        (("--topology", "local", "--out", "plan.txt"), "must end in .json"),
        (("--topologie", "local"), "nearest is --topology"),
        (("--topology", "local", "--config.data.batchsize=8"), "nearest is 'data.batch_size'"),
        (("--topology", "local", "--config.mesh.fsdp=3"), "does not cover 8 devices"),
        (("--topology", "local", "--config.data.batch_size=12"), "not divisible"),
        ((), "--topology"),
    ],
)
def test_wrong_usage_is_one_line(command, words, message):
    ended = command(*TEACHER, *words)
    assert ended.code == 2
    assert message in ended.error


@needs_libtpu
def test_a_shape_that_libtpu_does_not_know(command):
    ended = command(*TEACHER, "--topology", "v5e:3x5")
    assert ended.code == 2
    assert "v5e:3x5" in ended.error and "v5p:4x4x4" in ended.error
    assert "TPU_WORKER" not in ended.err and len(ended.err.splitlines()) == 1


def test_without_libtpu_the_extra_is_named(command, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    ended = command(*TEACHER, "--topology", "v5e:2x4")
    assert ended.code == 1
    assert "pip install 'sprint_jax[plan]'" in ended.error


@pytest.mark.slow
def test_local_plan_of_a_distillation(command, tmp_path):
    out = tmp_path / "plans" / "plan.json"
    ended = command(*STUDENT, "--topology", "local", "--config.mesh.fsdp=8", "--out", str(out))
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert {"fits", "bytes_per_device", "flops_per_device", "collective_bytes"} <= found.keys()
    assert found["fits"] and "fits" in ended.out and out.with_suffix(".png").is_file()
    assert found["bytes_per_device"] == sum(found["memory"].values())
    assert set(found["memory"]) == set(KINDS)
    assert [update["name"] for update in found["updates"]] == ["generator", "discriminator"]
    assert found["step_seconds"] == sum(update["seconds"] for update in found["updates"]) > 0
    assert found["flops_per_device"] == sum(u["flops_per_device"] for u in found["updates"])
    assert 0 < found["mfu"] <= 1
    assert found["collective_bytes"]["all-gather"]["fsdp"] > 0
    # The state as it lies: EMA like the parameters.
    assert found["memory"]["ema"] == found["memory"]["params"] > 0


def test_algorithm_flops_are_proportional_to_the_batch_and_free_of_remat():
    local = open_topology("local")
    c = load_config(TEACHER[1], list(TINY))
    plain = algorithm_flops(c, local)
    assert algorithm_flops(c.override({"model.remat": "full"}), local) == plain
    doubled = algorithm_flops(c.override({"data.batch_size": 32}), local)
    assert doubled == [2 * value for value in plain]


def test_a_plan_says_what_does_not_fit_and_by_how_much():
    c = load_config(TEACHER[1], list(TINY))
    local = open_topology("local")
    whole = plan_layout(c, local, lambda c: [1.0])
    small = local._replace(hbm_bytes=whole["bytes_per_device"] - 1024)
    found = plan_layout(c, small, lambda c: [1.0])
    assert not found["fits"]
    assert found["spare_bytes"] == pytest.approx(-1024)
    # Where the state alone is too large nothing is compiled.
    found = plan_layout(c, local._replace(hbm_bytes=1024.0), lambda c: [1.0])
    assert not found["fits"] and found["updates"] == [] and found["step_seconds"] is None


@pytest.mark.slow
def test_sweep_finds_the_largest_batch_that_fits(command, tmp_path, monkeypatch):
    c = load_config(TEACHER[1], list(TINY))
    limit = plan_layout(c, open_topology("local"), lambda c: [1.0])["bytes_per_device"] * 1.01
    monkeypatch.setattr(topology, "_local_memory", lambda devices, chip: limit)
    out = tmp_path / "plan.json"
    ended = command(*TEACHER, "--topology", "local", "--sweep", "batch", "--out", str(out))
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert found["fits"] and found["batch"] == 16
    assert any(not each["fits"] for each in found["sweep"])
    assert "min left" in ended.err


def fake_plans(memory, speed):
    """A stand-in for `plan_layout` whose memory and images/s are functions of a layout."""

    def plan(c):
        size = memory(c.data.batch_size // 8, c.mesh.fsdp, c.model.remat)
        rate = speed(c.data.batch_size // 8, c.mesh.fsdp, c.model.remat)
        return {
            "fits": size <= 16 * GIB,
            "spare_bytes": 16 * GIB - size,
            "bytes_per_device": size,
            "limit_bytes": 16 * GIB,
            "batch": c.data.batch_size,
            "mesh": dict(c.mesh),
            "remat": c.model.remat,
            "step_seconds": c.data.batch_size / rate,
            "images_per_second": rate,
            "mfu": 0.5,
            "bound": "compute",
        }

    return plan


def test_sweep_leaves_out_what_cannot_be_faster():
    c = load_config(TEACHER[1], list(TINY))
    cost = {"none": 1.0, "dots": 0.5, "dots_no_batch": 0.4, "full": 0.1}

    def memory(batch, fsdp, remat):
        return (8 / fsdp + cost[remat] * batch) * GIB

    def speed(batch, fsdp, remat):
        return 100.0 + cost[remat]

    lines = []
    local = open_topology("local")._replace(hbm_bytes=16 * GIB)
    tried = plan_sweep.sweep(c, local, plan_sweep.KEYS, fake_plans(memory, speed), lines.append)
    # fsdp 1 without remat holds 8 images, and more of either would only cost memory.
    assert {each["mesh"]["fsdp"] for each in tried} == {1}
    assert {each["remat"] for each in tried} == {"none"}
    assert plan_sweep.best(tried)["batch"] == 8 * 8
    assert any("left out" in line for line in lines)


def test_sweep_takes_a_larger_fsdp_where_it_is_needed():
    c = load_config(TEACHER[1], list(TINY))

    def memory(batch, fsdp, remat):
        return (40 / fsdp + batch) * GIB

    tried = plan_sweep.sweep(
        c,
        open_topology("local")._replace(hbm_bytes=16 * GIB),
        ("batch", "fsdp"),
        fake_plans(memory, lambda batch, fsdp, remat: 10.0 * batch),
        lambda line: None,
    )
    found = plan_sweep.best(tried)
    assert (found["mesh"]["fsdp"], found["batch"]) == (8, 8 * 11)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
            20.5,
        ),
        (
            "RESOURCE_EXHAUSTED: memory required for HLO temporaries (384.00G) exceeds available",
            384,
        ),
        ("INTERNAL: Mosaic failed", None),
    ],
)
def test_words_of_the_compiler_about_memory(text, size):
    assert out_of_memory(text) == (size * GIB if size else None)


@needs_libtpu
def test_tpu_plan_is_what_the_whole_compilation_gives():
    c = load_config(TEACHER[1], [*TINY, "--config.mesh.fsdp=2"])
    tpu = open_topology("v5e:2x2")
    assert len(tpu.devices) == 4 and jax.default_backend() == "cpu"
    early = compile_update(c, tpu, 0, full=False)
    compiled = lower(c, tpu)[0].compile()
    memory = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert early.fits and early.bytes == pytest.approx(whole, rel=0.05, abs=2**21)
    assert not early.code_is_known and early.code > 0
    shape = {"data": 2, "fsdp": 2, "tensor": 1}
    mine, theirs = (analyze(text, shape) for text in (early.text, compiled.as_text()))
    assert mine.flops == theirs.flops and mine.traffic == theirs.traffic
    assert mine.bytes_by("kind", "axes") == theirs.bytes_by("kind", "axes")


@needs_libtpu
def test_a_tpu_program_that_is_too_large():
    words = ["--config.data.batch_size=400000", *TINY[:3]]
    c = load_config(TEACHER[1], words)
    found = plan_layout(c, open_topology("v5e:2x2"), lambda c: [1.0])
    assert not found["fits"] and found["spare_bytes"] < 0
