"""The scripts of the folder benchmarks: their lines, FLOPs against counts made here, and the page of results.

Milliseconds are not judged: one round of a network of one block, compiled in a hurry.
"""

import importlib.util
import json
import math
import signal
import subprocess

import chex
import jax
import pytest
from helpers.runs import ROOT, quick_compilation, tiny, write_digits

from sprint_jax.benchmarking.timing import Round
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


def printing(monkeypatch, name):
    """A script, and the lines that it prints, parsed."""
    script, printed = load(name), []
    monkeypatch.setattr(
        script, "print", lambda line, flush: printed.append(json.loads(line)), raising=False
    )
    return script, printed


def test_the_committed_page_is_what_its_script_makes():
    script = load("make_readme")
    page = script.page()
    assert (ROOT / "benchmarks/README.md").read_text() == page
    patterns = [pattern for pattern, *_ in script.SECTIONS]
    for path in [*(ROOT / "benchmarks/results").iterdir(), *(ROOT / "benchmarks/plans").iterdir()]:
        assert path.suffix == ".png" or any(path.match(pattern) for pattern in patterns), path
    for section in page.split("\n## ")[1:]:
        assert "python " in section.split("```")[1] and "\n| ---" in section, section
    line = json.loads((ROOT / "benchmarks/results/pruning.jsonl").read_text().splitlines()[1])
    assert f"| {line['accuracy']:.1%} |" in page


@pytest.fixture(scope="module")
def train_step():
    """The script, its lines, and the jaxpr of its student forward."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, quick_compilation():
        script, lines = printing(patch, "train_step")
        build = script.build

        def build_and_trace(*arguments):
            c, nets, state, batch, given = build(*arguments)
            student = updates.student_of(nets, batch["text"], batch["mask"], given["guidance"])
            inputs = state.params, batch["latents"], given["t"]
            found["forward"] = jax.make_jaxpr(student)(*inputs).jaxpr
            return c, nets, state, batch, given

        patch.setattr(script, "build", build_and_trace)
        script.main(TINY)
    return script, lines, found["forward"]


def arms_of(lines):
    return {line["arm"]: line for line in lines if "ms" in line}


def test_train_step_times_and_counts_an_update_and_its_parts(train_step):
    script, (header, *lines), _ = train_step
    assert header["command"] == " ".join(["python benchmarks/train_step.py", *TINY])
    assert header["shapes"]["latents"] == [4, 4, 4, 12] and header["parameters"] > 1e5
    for line in arms_of(lines).values():
        low, median, high = line["ms"]
        assert 0 < low == median == high, line  # one round
        assert line["compile_s"] > 0 and min(line["gflop"]) > 0 and min(line["forwards"]) > 0
    for update in UPDATES:
        its = [line for line in lines if line.get("part_of") == update]
        assert len(its) == 5 and its[-1]["arm"] == "everything else"
        assert math.isclose(sum(line["share"][1] for line in its), 1, abs_tol=1e-2)
        # The rest is noise, times, metrics and checks; XLA merges what parts have in common.
        for column in (0, 1):
            parts = sum(line["gflop"][column] for line in its[:-1])
            assert 0.9 < parts / arms_of(lines)[update]["gflop"][column] < 1.1, update
    with pytest.raises(UserError, match="--rounds 0"):
        script.main(["--rounds=0"])


def test_one_pass_saves_a_forward(train_step):
    found = {
        line["separate_over_shared"]: line
        for line in train_step[1]
        if "separate_over_shared" in line
    }
    assert list(found) == ["sCM without teacher", UPDATES[0], " + ".join(UPDATES)]
    for line in found.values():
        shared, separate = line["forwards_shared"], line["forwards_separate"]
        assert shared[0] < separate[0] and separate[1] - shared[1] == pytest.approx(1, abs=0.02)


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
        values = jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns"))
        inner = (getattr(value, "jaxpr", value) for value in values)
        total += sum(matmul_flops(each) for each in inner if hasattr(each, "eqns"))
    return total


def test_no_matmul_is_missing_from_the_counts(train_step):
    _, lines, forward = train_step
    for count in arms_of(lines)["student forward"]["gflop"]:
        assert 1 < count / (matmul_flops(forward) / 1e9) < 1.1  # element-wise work is the rest


def test_arms_of_the_cpu_benchmark_compute_the_same(monkeypatch):
    cpu, seen = load("cpu"), []
    dense, linear = (cpu.projection(arm(640))() for arm in (cpu.nn.Dense, cpu.Linear))
    # Sums of 1,024 products.
    chex.assert_trees_all_close(
        jax.tree.leaves(dense), jax.tree.leaves(linear), rtol=1e-4, atol=1e-3
    )

    def run(words, env, **_):
        seen.append((words[1:], env["GLIBC_TUNABLES"]))
        return subprocess.CompletedProcess(words, 0, stdout="2.5\n")

    monkeypatch.setattr(cpu.subprocess, "run", run)
    assert [cpu.in_environment(tunables) for tunables in cpu.ENVIRONMENTS.values()] == [2.5] * 3
    assert seen == [([cpu.__file__, "--child"], each) for each in cpu.ENVIRONMENTS.values()]


def test_arms_of_the_depthwise_benchmark_are_compared_by_what_the_convolution_adds(monkeypatch):
    depthwise = load("depthwise")

    def one_round(arms, rounds):
        results = {name: jax.tree.leaves(call()) for name, call in arms.items() if name != "none"}
        chex.assert_trees_all_close(*results.values(), rtol=1e-4, atol=1e-4)
        return [Round({"none": 1.0, "naive": 4.0, "grouped": 9.0, "sprint_jax": 2.0}, None)]

    monkeypatch.setattr(depthwise, "paired_rounds", one_round)
    with jax.numpy_rank_promotion("allow"):  # as outside of tests
        line = depthwise.measure("feed-forward jvp", (1, 4, 4, 10), 1)
    assert line["depthwise_speedup"] == (4 - 1) / (2 - 1)


def test_savings_compare_equal_things(monkeypatch):
    savings, printed = printing(monkeypatch, "savings")
    monkeypatch.setattr(savings, "STAGES", [(2, 8, 4)])
    monkeypatch.setattr(savings, "INSTRUCTION", 5)
    monkeypatch.setattr(savings, "PROMPT", 4)
    tiny = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=32, vocab_size=1000)
    tiny |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8)
    monkeypatch.setattr(savings, "Gemma2", lambda **_: Gemma2(**tiny))
    savings.main(["--rounds=1"])
    _, *lines = printed
    assert [line["what"] for line in lines] == ["upsampling", "instruction"]
    # Sums of float32 products in another order.
    assert all(line["error"] < 1e-5 for line in lines)
    assert all(line["rounds"] + line["dropped"] == 1 for line in lines)


@pytest.mark.slow
def test_the_loop_benchmark_on_the_shrunk_world(tmp_path_factory, monkeypatch):
    """Its arms make the same numbers, and its lines have the shares of the loop."""
    loop, printed = printing(monkeypatch, "loop")
    monkeypatch.setattr(loop, "STAGES", ("teacher",))
    data = write_digits(tmp_path_factory.getbasetemp() / "digits")
    words = ["--config.model.num_layers=1", "--config.data.batch_size=8", "--steps=30"]
    handler = signal.getsignal(signal.SIGTERM)
    with quick_compilation():
        loop.main([*words, "--rounds=1", "--world=small", f"--data={data}"])
        assert signal.getsignal(signal.SIGTERM) is handler
        arms = loop.step_arms(tiny("configs/digits.py:teacher,small", data))
        losses = {name: float(arm()[1]["loss/flow"]) for name, arm in arms.items()}
    _, shares, sharding = printed
    assert shares["lines"] == 4
    parts = [shares[name] for name in ("data_wait", "step", "log", "checkpoint")]
    assert all(0 <= low <= middle <= high <= 1 for low, middle, high in parts)
    assert sharding["rounds"] + sharding["dropped"] == 1
    assert losses["sharded"] == pytest.approx(losses["plain"], rel=1e-5)
    with pytest.raises(UserError, match="--steps"):
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
