"""The benchmark of the training step: its lines, and its FLOPs against counts made here.

Milliseconds are not judged: one round of a network of one block, compiled in a hurry.
"""

import importlib.util
import json
import math
import signal
import subprocess

import jax
import numpy as np
import pytest
from helpers.runs import ROOT, quick_compilation, tiny, write_digits

from sprint_jax.core.errors import UserError
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.training import updates

TINY = ["--rounds=1", "--batch=4", "--world=small", "--config.model.num_layers=1"]
TINY += ["--config.ladd.taps=0"]
UPDATES = ("generator update", "discriminator update")


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    return load("train_step")


@pytest.fixture(scope="module")
def lines(benchmark):
    """The lines that it prints; ``benchmark.forward`` is then the jaxpr of its student forward."""
    printed, build = [], benchmark.build

    def build_and_trace(*arguments):
        c, nets, state, batch, given = build(*arguments)
        student = updates.student_of(nets, batch["text"], batch["mask"], given["guidance"])
        jaxpr = jax.make_jaxpr(student)(state.params, batch["latents"], given["t"])
        benchmark.forward = jaxpr.jaxpr
        return c, nets, state, batch, given

    with pytest.MonkeyPatch.context() as patch, quick_compilation():
        patch.setattr(benchmark, "print", lambda line, flush: printed.append(line), raising=False)
        patch.setattr(benchmark, "build", build_and_trace)
        benchmark.main(TINY)
    return [json.loads(line) for line in printed]


@pytest.fixture(scope="module")
def arms(lines):
    return {line["arm"]: line for line in lines if "ms" in line}


def test_first_line_tells_how_the_numbers_came_about(lines):
    header = lines[0]
    assert header["command"] == " ".join(["python benchmarks/train_step.py", *TINY])
    assert (header["device"], header["jax"]) == (jax.devices()[0].device_kind, jax.__version__)
    assert header["shapes"]["latents"] == [4, 4, 4, 12]
    assert header["dtype"] == "float32" and header["cores"] >= 1 and header["parameters"] > 1e5
    assert header["compilation_cache"] is True  # see conftest.py


def test_arms_have_times_and_counts(arms):
    for line in arms.values():
        low, median, high = line["ms"]
        assert 0 < low == median == high, line  # one round
        assert line["compile_s"] > 0 and min(line["gflop"]) > 0 and min(line["forwards"]) > 0
    assert arms["student forward"]["forwards"] == [1, 1]


def test_parts_and_what_they_leave_are_the_update(lines):
    for update in UPDATES:
        its = [line for line in lines if line.get("part_of") == update]
        assert len(its) == 5 and its[-1]["arm"] == "everything else"
        assert math.isclose(sum(line["share"][1] for line in its), 1, abs_tol=1e-2)


def test_parts_do_the_work_of_the_update(arms):
    # The rest is noise, times, metrics and checks; XLA merges what parts have in common.
    for update in UPDATES:
        its = [line for line in arms.values() if line.get("part_of") == update]
        for column in (0, 1):
            parts = sum(line["gflop"][column] for line in its)
            assert 0.9 < parts / arms[update]["gflop"][column] < 1.1, update


def test_one_pass_saves_a_forward(lines):
    comparisons = {
        line["separate_over_shared"]: line for line in lines if "separate_over_shared" in line
    }
    assert list(comparisons) == ["sCM without teacher", UPDATES[0], " + ".join(UPDATES)]
    for line in comparisons.values():
        shared, separate = line["forwards_shared"], line["forwards_separate"]
        assert shared[0] < separate[0] and shared[1] < separate[1]
        assert separate[1] - shared[1] == pytest.approx(1, abs=0.02)
        assert line["time_ratio"][1] == pytest.approx(
            line["forward_times_separate"][1] / line["forward_times_shared"][1], rel=1e-2
        )


def matmul_flops(jaxpr):
    """2 per multiply-add of matmuls and depthwise convolutions."""
    total = 0
    for equation in jaxpr.eqns:
        size = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            total += 2 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in axes)
        elif equation.primitive.name == "depthwise_convolve":
            total += 2 * 9 * size
        inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
        total += sum(matmul_flops(each) for each in inner if hasattr(each, "eqns"))
    return total


def test_no_matmul_is_missing_from_the_counts(benchmark, arms):
    matmuls = matmul_flops(benchmark.forward) / 1e9
    for count in arms["student forward"]["gflop"]:
        assert 1 < count / matmuls < 1.1  # element-wise work is the rest


def test_a_wrong_flag_is_one_line(benchmark):
    with pytest.raises(UserError, match="--rounds 0"):
        benchmark.main(["--rounds=0"])
    with pytest.raises(UserError, match="scan=false"):
        benchmark.build("small", ["--config.model.scan=true"])


def test_arms_of_the_cpu_benchmark_compute_the_same():
    cpu = load("cpu")
    (dense, arguments), (linear, _) = (
        cpu.projection(arm(640)) for arm in (cpu.nn.Dense, cpu.Linear)
    )
    for one, other in zip(
        *(jax.tree.leaves(arm(*arguments)) for arm in (dense, linear)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)  # sums of 1,024 products


def test_memory_settings_reach_a_process_of_their_own(monkeypatch):
    cpu, seen = load("cpu"), []

    def run(words, env, **_):
        seen.append((words[1:], env["GLIBC_TUNABLES"]))
        return subprocess.CompletedProcess(words, 0, stdout="2.5\n")

    monkeypatch.setattr(cpu.subprocess, "run", run)
    assert [cpu.in_environment(tunables) for tunables in cpu.ENVIRONMENTS.values()] == [2.5] * 3
    assert [tunables for _, tunables in seen] == list(cpu.ENVIRONMENTS.values())
    assert all(words == [cpu.__file__, "--child"] for words, _ in seen)


def test_ratios_are_taken_within_rounds(capsys):
    load("cpu").report("projection", {"slow": [4.0, 9.0, 8.0], "fast": [1.0, 3.0, 4.0]})
    line = json.loads(capsys.readouterr().out)
    assert line["ms"] == {"slow": [4, 8, 9], "fast": [1, 3, 4]}
    assert line["ratio to fast"] == {"slow": [2, 3, 4]} and line["rounds"] == 3


def test_savings_compare_equal_things(monkeypatch):
    savings, printed = load("savings"), []
    monkeypatch.setattr(savings, "STAGES", [(2, 8, 4)])
    monkeypatch.setattr(savings, "INSTRUCTION", 5)
    monkeypatch.setattr(savings, "PROMPT", 4)
    tiny = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=32, vocab_size=1000)
    tiny |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8)
    monkeypatch.setattr(savings, "Gemma2", lambda **_: Gemma2(**tiny))
    monkeypatch.setattr(savings, "print", lambda line, flush: printed.append(line), raising=False)
    savings.main(["--rounds=1"])
    about, *lines = map(json.loads, printed)
    assert about["jax"] == jax.__version__
    assert [line["what"] for line in lines] == ["upsampling", "instruction"]
    # Sums of float32 products in another order.
    assert all(line["error"] < 1e-5 for line in lines)
    assert all(line["rounds"] + line["dropped"] == 1 for line in lines)


@pytest.mark.slow
def test_the_loop_benchmark_on_the_shrunk_world(tmp_path_factory, monkeypatch):
    """Its arms make the same numbers, and its lines have what the README quotes."""
    loop, printed = load("loop"), []
    monkeypatch.setattr(loop, "print", lambda line, flush: printed.append(line), raising=False)
    monkeypatch.setattr(loop, "STAGES", ("teacher",))
    data = write_digits(tmp_path_factory.getbasetemp() / "digits")
    words = ["--config.model.num_layers=1", "--config.data.batch_size=8", "--steps=30"]
    handler = signal.getsignal(signal.SIGTERM)
    with quick_compilation():
        loop.main([*words, "--rounds=1", "--world=small", f"--data={data}"])
        assert signal.getsignal(signal.SIGTERM) is handler
        arms = loop.step_arms(tiny("configs/digits.py:teacher,small", data))
        losses = {name: float(arm()[1]["loss/flow"]) for name, arm in arms.items()}
    about, shares, sharding = map(json.loads, printed)
    assert about["jax"] == jax.__version__ and shares["lines"] == 4
    parts = [shares[name] for name in ("data_wait", "step", "log", "checkpoint")]
    assert all(0 <= low <= middle <= high <= 1 for low, middle, high in parts)
    assert shares["data_wait"][1] < 0.5  # quick, in a network that does next to nothing
    assert sharding["rounds"] + sharding["dropped"] == 1
    assert losses["sharded"] == pytest.approx(losses["plain"], rel=1e-5)
    with pytest.raises(UserError, match="--steps must be at least 30"):
        loop.main(["--steps=3"])


def test_checkpoint_memory_measures_every_mode(monkeypatch, tmp_path):
    memory = load("checkpoint_memory")
    monkeypatch.setattr(memory, "LEAF", (8, 16, 64))
    for mode in ("save stream", "restore", "save async"):
        # The second mode reads what the first has written.
        folder = tmp_path / ("one" if mode != "save async" else "two")
        line = memory.run(mode, str(folder), 1e-4, 8)
        assert line["state_bytes"] == 3 * 4 * 8 * 16 * 64 and line["mode"] == mode
        assert 0 <= line["returned_seconds"] <= line["seconds"]
