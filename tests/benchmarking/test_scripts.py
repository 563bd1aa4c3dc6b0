"""The scripts of the folder benchmarks: their lines, FLOPs against counts made here, and the page of results.

Milliseconds are not judged: one round of a network of one block, compiled in a hurry.
"""

import importlib.util
import json
import math
import signal

import chex
import jax
import pytest
from helpers.runs import ROOT, quick_compilation, tiny, write_digits

from sprint_jax.benchmarking.timing import Round
from sprint_jax.core.errors import UserError
from sprint_jax.models.gemma2 import Gemma2

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
    patterns = [pattern for pattern, *_ in script.SECTIONS] + ["results/gpu.jsonl"]
    for path in [*(ROOT / "benchmarks/results").iterdir(), *(ROOT / "benchmarks/plans").iterdir()]:
        assert path.suffix == ".png" or any(path.match(pattern) for pattern in patterns), path
    for section in page.split("\n## ")[1:]:
        assert "python " in section.split("```")[1] and "\n| ---" in section, section
    line = json.loads((ROOT / "benchmarks/results/pruning.jsonl").read_text().splitlines()[1])
    assert f"| {line['accuracy']:.1%} |" in page


def test_a_claim_is_judged_by_differences_of_the_same_seed():
    """The spread that two arms share does not count; a single seed decides nothing."""
    script = load("claims")

    def runs(accuracy, frechet):
        numbers = {"accuracy": {"overall": {"accuracy": accuracy, "standard_error": 0.1}}}
        for name, key in (("frechet", "distance"), ("kid", "distance"), ("diversity", "combined")):
            numbers[name] = {key: frechet, "standard_error": 0.1}
        return [{"steps": steps} | numbers for steps in (1, 2, 3, 4)]

    shared = [0.5, 0.7, 0.6, 0.9, 0.8]
    one = {seed: runs(0.05 + base + 0.001 * (seed % 2), base) for seed, base in enumerate(shared)}
    other = {seed: runs(base, base - 0.1) for seed, base in enumerate(shared)}
    found = script.compare(one, other, 2)
    assert found["seeds"] == 5 and found["accuracy"]["mean"] == pytest.approx(0.0504)
    assert found["accuracy"]["standard_error"] == pytest.approx(0.0012**0.5 / 100 * 0.5**0.5)
    verdicts = [found[name]["verdict"] for name in script.MEASURES]
    assert verdicts == ["confirmed", "contradicted", "contradicted", "confirmed"]
    assert script.compare({0: one[0], 7: one[1]}, other, 1)["accuracy"]["verdict"] == "unknown"
    # A seed of which a measure was not taken counts for the others alone.
    for collapsed in (None, float("nan")):
        one[3][0]["diversity"]["combined"] = collapsed
        found = script.compare(one, other, 1)
        assert (found["diversity"]["seeds"], found["accuracy"]["seeds"]) == (4, 5)
        assert found["diversity"]["verdict"] == "confirmed"
    # Student's t of four degrees of freedom: 2.776 standard errors.
    assert [script.judge(x, 1.0, 5) for x in (2.7, 2.8, -2.8)] == [
        "not seen",
        "confirmed",
        "contradicted",
    ]


@pytest.fixture(scope="module")
def train_step():
    """The script, and its lines."""
    with pytest.MonkeyPatch.context() as patch, quick_compilation():
        script, lines = printing(patch, "train_step")
        script.main(TINY)
    return script, lines


def arms_of(lines):
    return {line["arm"]: line for line in lines if "ms" in line}


@pytest.mark.slow
def test_train_step_times_and_counts_an_update_and_its_parts(train_step):
    script, (header, *lines) = train_step
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


@pytest.mark.slow
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
