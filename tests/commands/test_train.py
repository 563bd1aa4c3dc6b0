"""The command `train` on the shipped configs, shrunk: outputs, exact resume, signals, NaN."""

import json
import math
import signal

import jax
import numpy as np
import pytest
from helpers.runs import (
    assert_same_bits,
    checkpoint_steps,
    quick_compilation,
    read_state,
    records,
    run_here,
    signal_when,
    start,
    tiny,
    words,
    write_digits,
)
from helpers.workdirs import make_workdir
from PIL import Image

from sprint_jax import train
from sprint_jax.checkpoints.checkpoint import load_params
from sprint_jax.core.config import Config
from sprint_jax.data import feed

STAGES = ("flow", "distill")
STEPS = {"flow": 16, "distill": 16}
EVERY = 4  # steps between checkpoints


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def line(folder, tmp_path_factory):
    """``line(stage, **changes) -> (spec, data, changes)`` for `tiny` and `words`."""
    data = write_digits(tmp_path_factory.getbasetemp() / "digits")
    teacher = make_workdir(folder / "teacher", "flow")

    def arguments(stage, **changes):
        options = {"steps": STEPS[stage], "log__checkpoint_every": EVERY}
        if stage == "distill":
            options |= {"teacher": str(teacher), "log__diagnostics_every": 4}
        spec = "teacher" if stage == "flow" else "student"
        return f"configs/digits.py:{spec},small", data, options | changes

    return arguments


def train_here(config, workdir):
    """`train.train` without what it does to the process."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        train.train(config, workdir)
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def whole(folder, line):
    """Runs that nothing interrupts: stage -> (config, workdir)."""
    results = {}
    for stage in STAGES:
        spec, data, changes = line(stage, log__sample_every=8)
        results[stage] = tiny(spec, data, **changes), folder / stage
        train_here(*results[stage])
    return results


def command(line, stage, workdir, **changes):
    spec, data, options = line(stage, **changes)
    return words(spec, data, workdir, **options)


def assert_same_run(workdir, other, steps):
    """Every array of the last state is bit for bit the same, and so is every metric of every step."""
    assert checkpoint_steps(workdir)[-1] == steps
    assert_same_bits(read_state(workdir, steps), read_state(other, steps))
    mine, expected = records(workdir), records(other)
    assert list(mine) == list(expected) == list(range(1, steps + 1))
    for step in expected:
        assert mine[step] == expected[step], step


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_goes_on_bit_for_bit(stage, whole, line, tmp_path, monkeypatch, capfd):
    workdir, steps = tmp_path / "run", STEPS[stage]
    arguments = command(line, stage, workdir)
    ended = signal_when(
        start(arguments),
        signal.SIGKILL,
        # One step more than the checkpoint, which must come again.
        lambda: checkpoint_steps(workdir) and max(records(workdir), default=0) > EVERY,
    )
    assert ended.code == -signal.SIGKILL
    (newest,) = checkpoint_steps(workdir)[-1:]
    assert EVERY <= newest < steps and max(records(workdir)) < steps
    assert run_here(arguments, monkeypatch, capfd).code == 0
    assert_same_run(workdir, whole[stage][1], steps)


def test_sigterm_leaves_a_checkpoint_of_the_step_in_progress(
    whole, line, tmp_path, monkeypatch, capfd
):
    workdir, steps = tmp_path / "run", STEPS["flow"]
    arguments = command(line, "flow", workdir, log__checkpoint_every=1000)
    ended = signal_when(start(arguments), signal.SIGTERM, lambda: len(records(workdir)) >= 3)
    assert ended.code == 128 + signal.SIGTERM and "Traceback" not in ended.err
    reached = max(records(workdir))
    assert 3 <= reached < steps and checkpoint_steps(workdir) == [reached]
    assert f"stopped by signal at step {reached}" in ended.out
    assert run_here(arguments, monkeypatch, capfd).code == 0
    assert_same_run(workdir, whole["flow"][1], steps)


def test_finished_run_says_so_and_changes_nothing(whole, line, monkeypatch, capfd):
    workdir = whole["flow"][1]
    before = (workdir / "metrics.jsonl").read_bytes()
    again = command(line, "flow", workdir, log__sample_every=8)
    ended = run_here(again, monkeypatch, capfd)
    assert ended.code == 0 and "nothing to do" in ended.out
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert checkpoint_steps(workdir)[-1] == STEPS["flow"]


@pytest.mark.parametrize("stage", STAGES)
def test_workdir_holds_what_the_readme_names(stage, whole):
    config, workdir = whole[stage]
    assert Config(json.loads((workdir / "config.json").read_text())) == config
    rows = 1 if stage == "flow" else 3
    pictures = sorted(path.name for path in (workdir / "samples").glob("*.png"))
    steps = range(8, STEPS[stage] + 1, 8)
    assert pictures == sorted(f"{n:08d}_{which}.png" for n in steps for which in ("ema", "raw"))
    for name in pictures:
        with Image.open(workdir / "samples" / name) as image:
            assert image.size == (16 * 64, rows * 64) and np.asarray(image).std() > 5
    with Image.open(workdir / "curves.png") as image:
        assert min(image.size) > 200
    assert list((workdir / "tensorboard").glob("events*"))
    assert checkpoint_steps(workdir) == [STEPS[stage] - EVERY * i for i in (2, 1, 0)]


def bins(name):
    return {f"{name}/t{i}" for i in range(8)}


COMMON = {"grad/student", "ema/distance"}
COMMON |= {f"health/{name}" for name in ("skipped", "in_a_row", "nonfinite_samples")}
FLOW = COMMON | {"loss/flow"} | bins("flow_loss")
DISTILL = COMMON | {"grad/heads", "logits/real", "logits/fake", "logits/misaligned"}
DISTILL |= {f"loss/{n}" for n in ("total", "scm", "ladd_generator", "ladd_discriminator")}
DISTILL = DISTILL.union(*map(bins, ("tangent_norm", "teacher_gap", "error", "logvar")))
CHECKS = {"check/jvp", "check/bfloat16_tangent"}


@pytest.mark.parametrize("stage, expected", [("flow", FLOW), ("distill", DISTILL)])
def test_metrics_hold_the_diagnostics(stage, expected, whole):
    found = records(whole[stage][1])
    binned = {name for name in expected if name[-3:-1] == "/t"}
    for step, record in found.items():
        checked = CHECKS if stage == "distill" and step % 4 == 0 else set()
        assert expected | checked | {"step"} == record.keys(), step
        # Only a bin of times may be empty, and each of the others holds a number.
        assert {name for name, value in record.items() if value is None} <= binned
        for kind in {name[:-3] for name in binned}:
            assert any(record[f"{kind}/t{i}"] is not None for i in range(8)), (kind, step)
        assert record["health/skipped"] == record["health/nonfinite_samples"] == 0
    for name in binned:
        assert any(record[name] is not None for record in found.values()) or stage == "flow", name
    if stage == "distill":
        checks = [record for record in found.values() if "check/jvp" in record]
        # Random weights bend far more than trained ones; a wrong tangent is off by 1.
        assert all(record["check/jvp"] < 0.05 for record in checks)
        assert all(0 < record["check/bfloat16_tangent"] < 0.5 for record in checks)


def test_logged_total_is_the_weighted_sum_of_its_parts(whole):
    config, workdir = whole["distill"]
    for record in records(workdir).values():
        total = config.scm.weight * record["loss/scm"]
        total += config.ladd.weight * record["loss/ladd_generator"]
        assert record["loss/total"] == pytest.approx(total, rel=1e-5)


def poison(monkeypatch, bad):
    """Puts one NaN into the batches with these numbers."""
    opened = feed.open_data

    def open_data(c, mesh, workdir):
        data = opened(c, mesh, workdir)

        def batches(i):
            batch = data.batches(i)
            if i in bad:
                batch["latents"] = batch["latents"].copy()
                batch["latents"][2, 0, 0, 0] = math.nan
            return batch

        return data._replace(batches=batches)

    monkeypatch.setattr(feed, "open_data", open_data)


def test_one_bad_batch_is_skipped_and_counted(line, tmp_path, monkeypatch, capfd):
    poison(monkeypatch, {3})
    changes = {"steps": 6, "log__checkpoint_every": 1, "log__keep": 10}
    ended = run_here(command(line, "flow", tmp_path / "run", **changes), monkeypatch, capfd)
    assert ended.code == 0
    found = records(tmp_path / "run")
    assert [record["health/skipped"] for record in found.values()] == [0, 0, 0, 1, 1, 1]
    assert [record["health/in_a_row"] for record in found.values()] == [0, 0, 0, 1, 0, 0]
    assert found[4]["loss/flow"] is None and found[5]["loss/flow"] is not None
    third, fourth, fifth = (read_state(tmp_path / "run", step) for step in (3, 4, 5))
    for name in ("params", "ema", "opt_state"):
        assert_same_bits(third[name], fourth[name])
        with pytest.raises(AssertionError):
            assert_same_bits(fourth[name], fifth[name])


def test_too_many_bad_batches_end_the_run(line, tmp_path, monkeypatch, capfd):
    poison(monkeypatch, range(5, 1000))
    workdir = tmp_path / "run"
    changes = {"log__checkpoint_every": 1, "log__keep": 50, "max_nonfinite": 3}
    ended = run_here(command(line, "flow", workdir, **changes), monkeypatch, capfd)
    assert ended.code == 3 and "3 updates in a row were not finite" in ended.error
    # The count is looked at one step late, so that the device never waits for it.
    assert max(records(workdir)) == 8
    steps = checkpoint_steps(workdir)
    assert steps[-1] >= 5
    before = read_state(workdir, 5)
    for step in steps:
        state = read_state(workdir, step)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        assert step < 5 or state["skipped"] == step - 5
        for name in ("params", "ema", "opt_state") if step > 5 else ():
            assert_same_bits(before[name], state[name])


def test_bad_batches_up_to_the_last_step_fail_the_run(line, tmp_path, monkeypatch, capfd):
    poison(monkeypatch, range(4, 1000))  # updates 5 and 6
    ended = run_here(
        command(line, "flow", tmp_path / "run", steps=6, max_nonfinite=2), monkeypatch, capfd
    )
    assert ended.code == 3 and "2 updates in a row were not finite" in ended.error


def test_warm_start_takes_the_average_of_another_run(whole, line, tmp_path, monkeypatch, capfd):
    source = whole["flow"][1]
    changes = {"init": str(source), "steps": 2, "log__checkpoint_every": 1}
    ended = run_here(command(line, "flow", tmp_path / "run", **changes), monkeypatch, capfd)
    assert ended.code == 0 and list(records(tmp_path / "run")) == [1, 2]
    average, _ = load_params(source, "ema")
    # The learning rate of the first update is zero.
    state = read_state(tmp_path / "run", 1)
    assert state["step"] == 1
    assert_same_bits(state["params"], jax.device_get(average))
    assert_same_bits(state["ema"], jax.device_get(average))
    fresh = read_state(source, STEPS["flow"])
    with pytest.raises(AssertionError):
        assert_same_bits(fresh["params"], jax.device_get(average))


@pytest.mark.slow
def test_the_full_world_trains_as_shipped_with_unrolled_blocks(tmp_path):
    data = write_digits(tmp_path / "data", "full")
    changes = {"steps": 2, "model__scan": False}
    train_here(tiny("configs/digits.py:teacher,full", data, **changes), tmp_path / "teacher")
    changes["teacher"] = str(tmp_path / "teacher")
    train_here(tiny("configs/digits.py:student,full", data, **changes), tmp_path / "student")
    for name, losses, rows in (("teacher", 1, 1), ("student", 4, 3)):
        found = records(tmp_path / name)
        assert list(found) == [1, 2]
        values = [v for record in found.values() for k, v in record.items() if k[:5] == "loss/"]
        assert len(values) == 2 * losses and None not in values
        with Image.open(tmp_path / name / "samples" / "00000002_ema.png") as image:
            assert image.size == (2048, 64 * rows)
