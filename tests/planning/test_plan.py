"""The command: bad input, local plans and sweeps on 8 virtual devices, TPU topologies."""

import importlib.util
import json
import math

import pytest
from helpers.runs import ROOT, quick_compilation, run_here

from sprint_jax import plan
from sprint_jax.core.config import load_config
from sprint_jax.core.errors import UserError
from sprint_jax.data.feed import batch_shapes
from sprint_jax.planning import compile as plan_compile
from sprint_jax.planning import layout, search, topology
from sprint_jax.planning.compile import Program, compile_update, lower, out_of_memory
from sprint_jax.planning.counts import analyze
from sprint_jax.planning.layout import KINDS, image_flops, plan_layout
from sprint_jax.planning.topology import open_topology

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
STUDENT = (
    "--config",
    str(ROOT / "configs/digits.py:student,small,sprint"),
    *TINY,
    "--config.ladd.taps=1",
)
TEACHER = ("--config", str(ROOT / "configs/digits.py:teacher,small"), *TINY)
FLOPS = {"flow": 1.0}


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


@pytest.fixture
def teacher():
    return load_config(TEACHER[1], list(TINY))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--topology", "v9:2x2"), "v9:2x2"),
        (("--topology", "v5e:0x4"), "v5e:0x4"),
        (("--topology", "local", "--slices", "2"), "--slices"),
        (("--topology", "local", "--sweep", "batch,speed"), "'speed'"),
        (("--topology", "local", "--out", "plan.txt"), "plan.txt"),
        (("--topology", "local", "--config.mesh.fsdp=3"), "8 devices"),
        (("--topology", "local", "--config.data.batch_size=12"), "data.batch_size=12"),
        pytest.param(("--topology", "v5e:3x5"), "v5e:3x5", marks=needs_libtpu),
        ((), "--topology"),
    ],
)
def test_wrong_usage_is_one_line(command, words, name):
    ended = command(*TEACHER, *words)
    assert ended.code == 2
    assert name in ended.error and len(ended.err.splitlines()) == 1


def test_without_libtpu_the_extra_is_named(command, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    ended = command(*TEACHER, "--topology", "v5e:2x4")
    assert ended.code == 1
    assert "sprint_jax[plan]" in ended.error


@needs_libtpu
def test_a_compiler_that_fails_is_one_line(teacher, monkeypatch):
    monkeypatch.setattr(plan_compile.sys, "executable", "false")
    with pytest.raises(UserError, match="v5e:2x2"):
        compile_update(teacher, open_topology("v5e:2x2"), 0, full=False)


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
    assert 0 < found["mfu"] <= 1
    assert found["collective_bytes"]["all-gather"]["fsdp"] > 0
    # The state as it lies: EMA like the parameters.
    assert found["memory"]["ema"] == found["memory"]["params"] > 0


@pytest.mark.slow
def test_a_program_that_runs_twice_a_step_is_compiled_once_and_counted_twice():
    """The fake score of a student with reverse divergence."""
    words = [*STUDENT[2:], "--config.dmd.weight=1.0", "--config.dmd.fake_updates=2"]
    c = load_config(STUDENT[1], words)
    local = open_topology("local")
    flops = image_flops(c, local)
    assert [*flops] == ["generator", "fake", "fake 2", "discriminator"]
    assert flops["fake"] == flops["fake 2"] < flops["generator"]
    found = plan_layout(c, local, flops)
    first, second = (each for each in found["updates"] if each["name"].startswith("fake"))
    assert first | {"name": "fake 2"} == second
    assert found["memory"]["fake"] > found["memory"]["params"] > 0


@pytest.mark.slow
def test_flops_of_an_image_depend_on_neither_batch_nor_remat(teacher):
    local = open_topology("local")
    plain = image_flops(teacher, local)
    assert image_flops(teacher.override({"model.remat": "full"}), local) == plain
    assert image_flops(teacher.override({"data.batch_size": 32}), local) == plain


def test_a_plan_says_what_does_not_fit_and_by_how_much(teacher):
    local = open_topology("local")
    whole = plan_layout(teacher, local, FLOPS)
    small = local._replace(hbm_bytes=whole["bytes_per_device"] - 1024)
    found = plan_layout(teacher, small, FLOPS)
    assert not found["fits"]
    assert found["spare_bytes"] == pytest.approx(-1024)
    # Where the state alone is too large nothing is compiled.
    found = plan_layout(teacher, local._replace(hbm_bytes=1024.0), FLOPS)
    assert not found["fits"] and found["updates"] == [] and found["step_seconds"] is None


@pytest.mark.slow
def test_sweep_finds_the_largest_batch_that_fits(command, teacher, tmp_path, monkeypatch):
    limit = plan_layout(teacher, open_topology("local"), FLOPS)["bytes_per_device"] * 1.01
    monkeypatch.setattr(topology, "_local_memory", lambda devices, chip: limit)
    out = tmp_path / "plan.json"
    ended = command(*TEACHER, "--topology", "local", "--sweep", "batch", "--out", str(out))
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert found["fits"] and found["batch"] == 16
    assert any(not each["fits"] for each in found["sweep"])


def sweep(teacher, keys, memory, speed):
    """A search among stand-ins for `plan_layout` whose GiB and images/s are functions of a layout."""

    def plan(c):
        layout = c.data.batch_size // 8, c.mesh.fsdp, c.model.remat
        size, rate = memory(*layout) * GIB, speed(*layout)
        found = dict.fromkeys(search.SUMMARY) | {"fits": size <= 16 * GIB, "bytes_per_device": size}
        found |= {"limit_bytes": 16 * GIB, "batch": c.data.batch_size, "mesh": dict(c.mesh)}
        return found | {"remat": c.model.remat, "images_per_second": rate, "bound": "compute"}

    lines = []
    tried = search.sweep(teacher, open_topology("local"), keys, plan, lines.append)
    return tried, search.best(tried), lines


def test_sweep_leaves_out_what_cannot_be_faster(teacher):
    cost = {"none": 1.0, "dots": 0.5, "dots_no_batch": 0.4, "full": 0.1}
    tried, best, lines = sweep(
        teacher,
        search.KEYS,
        lambda batch, fsdp, remat: 8 / fsdp + cost[remat] * batch,
        lambda batch, fsdp, remat: 100.0 + cost[remat],
    )
    # fsdp 1 without remat holds 8 images, and more of either would only cost memory.
    assert {(each["mesh"]["fsdp"], each["remat"]) for each in tried} == {(1, "none")}
    assert best["batch"] == 8 * 8
    assert any("left out" in line for line in lines)


def test_sweep_takes_a_larger_fsdp_where_it_is_needed(teacher):
    _, best, _ = sweep(
        teacher,
        ("batch", "fsdp"),
        lambda batch, fsdp, remat: 40 / fsdp + batch,
        lambda batch, fsdp, remat: 10.0 * batch,
    )
    assert (best["mesh"]["fsdp"], best["batch"]) == (8, 8 * 11)


def test_batches_follow_a_straight_line(teacher):
    """Two plans say how memory grows; two more show that it fits up to there and no further."""
    tried, best, _ = sweep(
        teacher,
        ("batch",),
        lambda batch, fsdp, remat: 2 + 0.1 * batch,
        lambda batch, fsdp, remat: 10.0 * batch,
    )
    assert [each["batch"] // 8 for each in tried] == [2, 4, 140, 157]
    assert best["batch"] == 8 * 140


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory: Used 20.50G of 15.75G hbm.", 20.5),
        ("RESOURCE_EXHAUSTED: memory for HLO temporaries (384.00G) exceeds available", 384),
        ("INTERNAL: Mosaic failed", None),
    ],
)
def test_words_of_the_compiler_about_memory(text, size):
    assert out_of_memory(text) == (size * GIB if size else None)


@needs_libtpu
@pytest.mark.slow
def test_tpu_plan_is_what_the_whole_compilation_gives(teacher, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # libtpu knows not all of them
    c, tpu = teacher.override({"mesh.fsdp": 2}), open_topology("v5e:2x2")
    early = compile_update(c, tpu, 0, full=False)
    compiled = lower(c, tpu)[0].compile()
    memory = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert early.fits and early.bytes == pytest.approx(whole, rel=0.05, abs=2**21)
    assert not early.code_is_known and early.code > 0
    mine, theirs = (analyze(text, {"fsdp": 4}) for text in (early.text, compiled.as_text()))
    assert mine == theirs  # making machine code changes nothing that is counted


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_program_that_is_too_large(teacher):
    c = teacher.override({"data.batch_size": 400000})
    found = plan_layout(c, open_topology("v5e:2x2"), FLOPS)
    assert not found["fits"] and found["spare_bytes"] < 0


@pytest.mark.parametrize(
    ("source", "sizes", "loaded", "count"),
    [
        ("synthetic", "", 0, 1),
        ("latents", "", 0, 33),
        ("latents", "", 7, 7),
        ("images", "512x512,256x1024", 7, 2),
    ],
)
def test_programs_of_all_sizes_and_all_batches_on_the_devices_are_counted(
    teacher, monkeypatch, source, sizes, loaded, count
):
    made = Program("", 0.0, 2e6, False, 0.0, [], True, [])
    monkeypatch.setattr(layout, "compile_update", lambda *_: made)
    changes = {"data.source": source, "data.sizes": tuple(sizes.split(",")) if sizes else ()}
    changes |= {"data.loaded_sizes": loaded}
    c = teacher.override(changes | {"data.prefetch": 3, "data.latent_size": (4, 4)})
    plan = plan_layout(c, open_topology("local", 1), FLOPS)
    assert plan["programs"] == count and plan["memory"]["code"] == count * 2e6
    shapes = batch_shapes(c).values()
    whole = sum(math.prod(each.shape) * each.dtype.itemsize for each in shapes)
    # One in use, the one before it, and three that wait; on eight devices.
    assert plan["memory"]["batch"] == 5 * whole / 8
