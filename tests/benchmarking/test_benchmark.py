"""Tests of the command that times networks: rounds, ratios and lines. Milliseconds are not judged."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.runs import quick_compilation

from sprint_jax import benchmark
from sprint_jax.benchmarking import measure, parts, timing, workloads
from sprint_jax.core.errors import UserError
from sprint_jax.models import blocks
from sprint_jax.models.dc_ae import AutoencoderDC

pytestmark = pytest.mark.usefixtures("quick")

# One narrow block: the command's paths, compiled in a second or two.
SMALL = workloads.STUDENTS["tiny"] | dict(num_layers=1, num_attention_heads=2, caption_channels=16)
SMALL |= dict(num_cross_attention_heads=2, cross_attention_head_dim=32)

TINY_DECODER = AutoencoderDC(
    **{
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_out_channels": (32, 32),
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "layers_per_block": (1, 1),
            "qkv_multiscales": ((), (5,)),
        }.items()
    }
)


def test_arms_take_turns_after_warm_calls_and_one_that_does_not_count():
    now, log = [0.0], []

    def arm(name, *seconds):
        """A call that takes the next of ``seconds``, then the last again and again."""
        left = list(seconds)

        def call():
            log.append(name)
            now[0] += left.pop(0) if len(left) > 1 else left[0]

        return call

    # Three warm calls, then per turn one that does not count and as many as fill a turn.
    arms = {"a": arm("a", 5, 5, 0.1, 7, 0.2), "b": arm("b", 9, 9, 0.3, 8, 0.6)}
    times = np.array([[0, 0, 0], [0.5, 1, 0.5], [1, 2, 1], [1.55, 3, 1.5]])  # busy, passed, own
    load = iter(times).__next__
    rounds = timing.paired_rounds(arms, 2, clock=lambda: now[0], load=load)
    turn = ["a"] * 3 + ["b"] * 2
    assert log == ["a"] * 3 + ["b"] * 3 + turn + turn
    assert [each.foreign for each in rounds] == pytest.approx([0.0, 0.05])
    for each in rounds:
        assert each.ms == pytest.approx({"a": 200, "b": 600})


def test_ratios_are_taken_within_rounds_and_loud_rounds_are_dropped():
    rounds = [
        timing.Round({"ours": 1, "theirs": 4}, 0.0),
        timing.Round({"ours": 100, "theirs": 1}, 0.13),
        timing.Round({"ours": 3, "theirs": 9}, 0.12),
        timing.Round({"ours": 4, "theirs": 8}, 0.01),
    ]
    assert timing.summarize(rounds, "ours") == {
        "rounds": 3,
        "dropped": 1,
        "foreign": [0.0, 0.065, 0.13],
        "ms": {"ours": [1, 3, 4], "theirs": [4, 8, 9]},
        "ratio": {"theirs": [2, 3, 4]},
    }


def test_rounds_without_numbers(tmp_path):
    summary = timing.summarize([timing.Round({"ours": 1, "theirs": 4}, 0.5)], "ours")
    assert (summary["rounds"], summary["dropped"]) == (0, 1)  # none is clean
    assert summary["ms"] == summary["ratio"] == {}
    none = timing.processor_times(tmp_path / "none")
    assert none is None and timing.foreign_share(none, none) is None
    summary = timing.summarize([timing.Round({"ours": 2.0}, None)], "ours")
    assert summary["foreign"] == "not recorded" and summary["rounds"] == 1


def test_foreign_load_is_what_our_cores_did_without_us(tmp_path, monkeypatch):
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda _: {0, 2})
    monkeypatch.setattr(timing.os, "sysconf", lambda _: 100)
    times = iter([(9.0, 0.5, 0.5, 0.0, 99.0), (9.2, 0.6, 1.0, 0.2, 101.0)])  # a child has ended
    monkeypatch.setattr(timing.os, "times", times.__next__)
    stat = tmp_path / "stat"
    # user nice system idle iowait irq softirq steal guest guest_nice
    line = "cpu{} {} 0 0 {} {} 0 0 {} 9 9\n".format
    stat.write_text("cpu 7 7\n" + line(0, 0, 0, 0, 0) + line(1, 0, 0, 0, 0) + line(2, 5, 5, 5, 5))
    before = timing.processor_times(stat)
    # Core 0: 1.2 s busy and 0.8 s not; core 2: 0.3 s of it stolen, 1.7 s not; core 1 is not ours.
    stat.write_text(line(0, 120, 50, 30, 0) + line(1, 9, 0, 0, 0) + line(2, 5, 175, 5, 35))
    share = timing.foreign_share(before, timing.processor_times(stat))
    assert share == pytest.approx((1.2 + 0.3 - 1.0) / 4)


def test_calls_in_a_row_wait_once():
    log = []
    call = timing.Waiting(lambda: log.append("start"), lambda out: log.append("wait"))
    now = iter([1.0, 1.5]).__next__
    assert timing.pipelined(call, 5, clock=now) == pytest.approx(100)
    assert log == ["start", "wait", *["start"] * 5, "wait"]


def test_a_compiler_of_others_that_fails_costs_its_arm():
    def fail():
        raise RuntimeError("no\n  triton")

    ours, theirs = timing.waiting(lambda: 1), timing.waiting(lambda: 2)
    arms = {"diffusers": theirs, "diffusers compiled": timing.Waiting(fail, lambda out: out)}
    part = parts.Part("transformer", 1, ours, 0.0, arms, lambda a, b: 0.01 * (b - a))
    line = measure.measure(part, 0.1, 1, queue=2)
    assert line["failed"] == {"diffusers compiled": "no triton"}
    assert set(line["pipelined_ms"]) == {"sprint_jax", "diffusers"}
    assert line["relative_error"] == {"diffusers": 0.01}
    with pytest.raises(RuntimeError):
        measure.measure(part._replace(theirs={"diffusers": arms["diffusers compiled"]}), 0.1, 1)


def test_lines_are_printed_or_go_to_a_file_beside_a_table(tmp_path, monkeypatch, capsys):
    lines = [{"command": "c"}, {"workload": "forward", "relative_error": {"diffusers": 0.01}}]
    monkeypatch.setattr(measure, "lines", lambda *_: lines)
    benchmark.main(["train"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    benchmark.main(["train", f"--out={tmp_path}/out.jsonl"])
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == lines
    assert capsys.readouterr().out == measure.table_row(lines[1]) + "\n"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(workloads.STUDENTS, "tiny", SMALL)


@pytest.mark.slow
def test_train_writes_a_line_per_workload(small, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    words = ["train", "--image=64x96", "--batch=2", "--rounds=1", f"--out={out}"]
    benchmark.main([*words, "--only=forward,scm"])
    head, forward, scm = map(json.loads, out.read_text().splitlines())
    assert head["command"].startswith("python -m sprint_jax.benchmark train --image=64x96")
    assert (forward["workload"], scm["workload"]) == ("forward", "scm")
    for line in forward, scm:
        assert (line["image"], line["batch"]) == ([64, 96], 2)
        assert line["rounds"] + line["dropped"] == 1 and line["cold_s"]["sprint_jax"] > 0
        assert line["relative_error"] == line["ratio"] == {}
    assert "forward" in capsys.readouterr().out


def test_workloads_agree_with_one_another():
    model = workloads.SanaTransformer(**SMALL)
    inputs = workloads.network_inputs(SMALL, 2, 64, 64)
    params = workloads.random_params(model, inputs)
    calls = {name: jax.jit(call) for name, call in workloads.network_calls(model).items()}
    assert tuple(calls) == workloads.NETWORK
    out = calls["forward"](params, inputs)
    primal, tangent = calls["jvp"](params, inputs)
    np.testing.assert_allclose(primal, out, rtol=1e-5, atol=1e-5)
    step = {key: inputs[key] + 1e-3 * inputs[f"d{key}"] for key in ("x", "t")}
    change = calls["forward"](params, inputs | step) - out
    np.testing.assert_allclose(change / 1e-3, tangent, atol=2e-2 * np.abs(tangent).max())
    loss, gradient = calls["backward"](params, inputs)
    np.testing.assert_allclose(loss, np.square(out - inputs["target"]).mean(), rtol=1e-5)
    assert all(np.any(leaf != 0) for leaf in (gradient["proj_out"]["kernel"], out))


def test_sample_times_transformer_and_decoder(small, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "AutoencoderDC", lambda: TINY_DECODER)
    out = tmp_path / "out.jsonl"
    words = ["sample", "--image=32x64", "--batch=1,2", "--rounds=1", f"--out={out}"]
    benchmark.main(words)
    head, *lines = map(json.loads, out.read_text().splitlines())
    assert head["command"].startswith("python -m sprint_jax.benchmark sample")
    found = [(line["workload"], line["batch"]) for line in lines]
    assert found == [("transformer", 1), ("transformer", 2), ("decoder", 1), ("decoder", 2)]
    for line in lines:
        assert line["image"] == [32, 64] and line["dtype"] == "float32"
        assert line["peak_gb"]["process"] > 0 and line["cold_s"]["sprint_jax"] > 0
        assert ("pictures_per_s" in line) == (line["rounds"] == 1)


@pytest.mark.slow
def test_blocks_apart_compute_what_the_stack_does():
    fields = SMALL | dict(num_layers=2)
    inputs = workloads.network_inputs(fields, 1, 32, 64)
    model = workloads.SanaTransformer(**fields)
    params = workloads.random_params(model, inputs)
    apart = blocks.unstack_blocks(params)
    assert len(apart["transformer_blocks"]) == 2
    call = jax.jit(workloads.network_calls(model)["backward"])
    with quick_compilation():
        (loss, gradient), (loss_apart, gradient_apart) = call(params, inputs), call(apart, inputs)
    stacked = blocks.stack(gradient_apart["transformer_blocks"])
    gradient_apart = gradient_apart | {"transformer_blocks": stacked}
    np.testing.assert_allclose(loss, loss_apart, rtol=1e-6)
    limits = jax.tree.map(lambda a: 1e-5 * np.abs(a).max() + 1e-4 * np.abs(a), gradient)
    # Two orders of the same float32 sums.
    within = jax.tree.map(
        lambda a, b, c: np.all(np.abs(a - b) <= c), gradient, gradient_apart, limits
    )
    assert all(jax.tree.leaves(within))


def test_a_first_picture_is_drawn_twice_with_one_folder_of_programs(monkeypatch):
    calls = []

    def run(command, env, **_):
        out = Path(command[command.index("--out") + 1])
        calls.append((command[1:4], out.name, env["JAX_COMPILATION_CACHE_DIR"]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(measure.subprocess, "run", run)
    flags = SimpleNamespace(model="DIR", name="DIR", steps=(2, 4), image=(32, 64), dtype="float32")
    line = measure.first_picture(flags)
    assert line["workload"] == "first, 2 steps" and set(line["first_s"]) == {"cold", "warm"}
    assert "cold 0.0 s" in measure.table_row(line)
    (words, *first), (_, *second) = calls
    assert words == ["-m", "sprint_jax.sample", "--model"]
    assert (first[0], second[0]) == ("cold", "warm") and first[1] == second[1]
    failed = subprocess.CompletedProcess([], 2, "", "sample: DIR is not there")
    monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="DIR is not there"):
        measure.first_picture(flags)


def test_without_torch_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"(torch|diffusers).*\[parity\]"):
        benchmark.main(["train", "--against=diffusers"])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["train", "--image=512"], "--image 512"),
        (["train", "--image=500x512"], "--image 500x512"),
        (["train", "--rounds=0"], "--rounds"),
        (["parity", "--only=forward,backwards"], "'backwards'"),
        (["train", "--threads=999"], "--threads 999"),
        (["parity", "--rounds=3"], "--rounds"),
        (["sample", "--parts=whole"], "--parts whole"),
        (["sample", "--batch=1,x"], "'1,x'"),
    ],
)
def test_wrong_flags_are_one_line(words, name):
    with pytest.raises(UserError, match=name) as error:
        benchmark.main(words)
    assert error.value.exit_code == 2
