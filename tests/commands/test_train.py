"""The command `train` on the shipped configs, shrunk: outputs, exact resume, signals, NaN."""

import dataclasses
import functools
import json
import math
import signal

import jax
import numpy as np
import pytest
from helpers import runs
from helpers.compare import assert_same_bits
from helpers.workdirs import make_workdir
from PIL import Image

from sprint_jax.checkpoints.checkpoint import load_params
from sprint_jax.core.config import Config
from sprint_jax.data import feed

pytestmark = pytest.mark.usefixtures("quick")
SPECS = {
    "flow": "configs/digits.py:teacher,small",
    "distill": "configs/digits.py:student,small,sprint",
}
STEPS, EVERY = 16, 4  # steps of a run, and between checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def options(folder):
    """``options(stage, **changes)``: changes of the shipped config for `tiny` and `words`."""
    students = {"teacher": str(make_workdir(folder / "teacher", "flow"))}
    students |= {"log__diagnostics_every": 4}

    def options(stage, **changes):
        changes = {"steps": STEPS, "log__checkpoint_every": EVERY} | changes
        return changes | (students if stage == "distill" else {})

    return options


@pytest.fixture(scope="module")
def whole(folder, data, options):
    """``whole(stage) -> (config, workdir)``: a run that nothing interrupts, made when first asked for."""

    @functools.cache
    def whole(stage):
        c = runs.tiny(SPECS[stage], data, **options(stage, log__sample_every=8))
        return c, runs.train_here(c, folder / stage)

    return whole


@pytest.fixture
def command(data, options):
    """``command(stage, workdir, **changes)``: the words of a command line."""
    return lambda stage, workdir, **changes: runs.words(
        SPECS[stage], data, workdir, **options(stage, **changes)
    )


@pytest.fixture
def run(command, tmp_path, monkeypatch, capfd):
    """``run(**changes)``: trains a teacher in tmp_path / "run", in this process."""
    return lambda **changes: runs.run_here(
        command("flow", tmp_path / "run", **changes), monkeypatch, capfd
    )


def assert_same_run(workdir, other):
    """Every array of the last state is bit for bit the same, and so is every metric of every step."""
    assert runs.checkpoint_steps(workdir)[-1] == STEPS
    assert_same_bits(runs.read_state(workdir, STEPS), runs.read_state(other, STEPS))
    assert runs.records(workdir) == runs.records(other)
    assert list(runs.records(workdir)) == list(range(1, STEPS + 1))


def test_a_run_in_two_parts_is_the_whole_run(whole, run, tmp_path):
    first, rest = {"steps": STEPS // 2}, {}
    for changes in (first, rest):
        assert run(log__checkpoint_every=1000, **changes).code == 0
    assert_same_run(tmp_path / "run", whole("flow")[1])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", runs.RECIPES)
def test_every_recipe_resumes_exactly(recipe, data, options, tmp_path):
    """Fake score, critic, their optimizers and counters are in the checkpoint."""
    changes = {name.replace(".", "__"): value for name, value in runs.RECIPES[recipe].items()}
    # The exam is of each run's last step, which is not the same.
    changes |= {"log__sample_every": 1000, "log__every": 1, "log__exam": 0}

    def config(steps):
        return runs.tiny(SPECS["distill"], data, **options("distill", **changes, steps=steps))

    whole = runs.train_here(config(4), tmp_path / "whole")
    for steps in (2, 4):
        parts = runs.train_here(config(steps), tmp_path / "parts")
    assert_same_bits(runs.read_state(parts, 4), runs.read_state(whole, 4))
    assert runs.records(parts) == runs.records(whole) and list(runs.records(whole)) == [1, 2, 3, 4]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("flow", signal.SIGKILL),
        pytest.param("flow", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("distill", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_stopped_run_goes_on_bit_for_bit(
    stage, number, whole, command, tmp_path, monkeypatch, capfd
):
    """After kill -9 from the last checkpoint, after SIGTERM from the step in progress."""
    workdir, killed = tmp_path / "run", number == signal.SIGKILL
    how = {"log__checkpoint_every": EVERY if killed else 1000, "log__sample_every": 8}
    arguments = command(stage, workdir, **how)

    def ready():
        # One step more than the checkpoint, which must come again.
        reached = max(runs.records(workdir), default=0)
        return reached > EVERY and runs.checkpoint_steps(workdir) if killed else reached >= 3

    ended = runs.signal_when(runs.start(arguments), number, ready)
    reached, saved = max(runs.records(workdir)), runs.checkpoint_steps(workdir)
    assert reached < STEPS and saved
    if killed:
        assert ended.code == -number and saved[-1] >= EVERY
    else:
        assert ended.code == 128 + number and "Traceback" not in ended.err
        assert saved == [reached] and f"step {reached}" in ended.out
    assert runs.run_here(arguments, monkeypatch, capfd).code == 0
    assert_same_run(workdir, whole(stage)[1])


def test_finished_run_changes_nothing(whole, command, monkeypatch, capfd):
    workdir = whole("flow")[1]
    before = (workdir / "metrics.jsonl").read_bytes()
    again = command("flow", workdir, log__sample_every=8)
    assert runs.run_here(again, monkeypatch, capfd).code == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert runs.checkpoint_steps(workdir)[-1] == STEPS


@pytest.mark.parametrize("stage", ["flow", pytest.param("distill", marks=pytest.mark.slow)])
def test_workdir_holds_what_the_readme_names(stage, whole):
    config, workdir = whole(stage)
    assert Config(json.loads((workdir / "config.json").read_text())) == config
    rows = 1 if stage == "flow" else 3
    pictures = sorted(path.name for path in (workdir / "samples").glob("*.png"))
    steps = range(8, STEPS + 1, 8)
    assert pictures == sorted(f"{n:08d}_{which}.png" for n in steps for which in ("ema", "raw"))
    for name in pictures:
        with Image.open(workdir / "samples" / name) as image:
            assert image.size == (16 * 64, rows * 64) and np.asarray(image).std() > 5
    with Image.open(workdir / "curves.png") as image:
        assert min(image.size) > 200
    assert list((workdir / "tensorboard").glob("events*"))
    assert runs.checkpoint_steps(workdir) == [STEPS - EVERY * i for i in (2, 1, 0)]


def bins(name):
    return {f"{name}/t{i}" for i in range(8)}


COMMON = {"grad/student", "ema/distance"}
COMMON |= {f"health/{name}" for name in ("skipped", "in_a_row", "nonfinite_samples")}
FLOW = COMMON | {"loss/flow"} | bins("flow_loss")
DISTILL = COMMON | {"grad/heads", "logits/real", "logits/fake", "logits/misaligned"}
DISTILL |= {f"loss/{n}" for n in ("total", "scm", "ladd", "critic")}
DISTILL |= {"critic/auc", "share/scm", "share/images", "cosine/images", "length/ladd"}
DISTILL |= {"length/scm"}
DISTILL = DISTILL.union(*map(bins, ("tangent_norm", "teacher_gap", "error", "logvar")))
CHECKS = {"check/jvp", "check/bfloat16_tangent"}
EXAM = {"critic/held_out", "critic/readable", "unreadable/one_step"} | bins("unreadable")


@pytest.mark.parametrize(
    "stage, expected", [("flow", FLOW), pytest.param("distill", DISTILL, marks=pytest.mark.slow)]
)
def test_metrics_hold_the_diagnostics(stage, expected, whole):
    found = runs.records(whole(stage)[1])
    binned = {name for name in expected if name[-3:-1] == "/t"}
    for step, record in found.items():
        checked = CHECKS if stage == "distill" and step % 4 == 0 else set()
        checked = checked | EXAM if stage == "distill" and step % 8 == 0 else checked
        assert expected | checked | {"step"} == record.keys(), step
        # Only a bin of times may be empty.
        assert {name for name, value in record.items() if value is None} <= binned | {
            "critic/auc",
            "critic/readable",
        }
        assert record["health/skipped"] == record["health/nonfinite_samples"] == 0
    for name in binned:
        assert any(record[name] is not None for record in found.values()) or stage == "flow", name
    if stage == "distill":
        config, _ = whole(stage)
        for step, record in found.items():
            total = config.scm.weight * record["loss/scm"]
            total += config.ladd.weight * record["loss/ladd"]
            assert record["loss/total"] == pytest.approx(total, rel=1e-5)
            if step % 4 == 0:
                # Random weights bend far more than trained ones; a wrong tangent is off by 1.
                assert record["check/jvp"] < 0.05 and 0 < record["check/bfloat16_tangent"] < 0.5


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

        return dataclasses.replace(data, batches=batches)

    monkeypatch.setattr(feed, "open_data", open_data)


def test_too_many_bad_batches_end_the_run(run, tmp_path, monkeypatch):
    poison(monkeypatch, {1, *range(5, 1000)})
    ended = run(log__checkpoint_every=1, log__keep=50, max_nonfinite=3)
    assert ended.code == 3 and "3 updates" in ended.error
    # The count is looked at one step late, so that the device never waits for it.
    found, workdir = runs.records(tmp_path / "run"), tmp_path / "run"
    assert [each["health/skipped"] for each in found.values()] == [0, 1, 1, 1, 1, 2, 3, 4]
    assert [each["health/in_a_row"] for each in found.values()] == [0, 1, 0, 0, 0, 1, 2, 3]
    assert [step for step, each in found.items() if each["loss/flow"] is None] == [2, 6, 7, 8]
    before, second = runs.read_state(workdir, 5), runs.read_state(workdir, 2)
    for name in ("params", "ema", "opt_state"):
        for step in runs.checkpoint_steps(workdir)[5:]:
            assert_same_bits(before[name], runs.read_state(workdir, step)[name])
        with pytest.raises(AssertionError):
            assert_same_bits(before[name], second[name])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(before))


def test_bad_batches_up_to_the_last_step_fail_the_run(run, monkeypatch):
    poison(monkeypatch, range(4, 1000))  # updates 5 and 6
    ended = run(steps=6, max_nonfinite=2)
    assert ended.code == 3 and "2 updates" in ended.error


def test_warm_start_takes_the_average_of_another_run(whole, run, tmp_path):
    source = whole("flow")[1]
    assert run(init=str(source), steps=2, log__checkpoint_every=1).code == 0
    average = jax.device_get(load_params(source, "ema")[0])
    # The learning rate of the first update is zero.
    state, last = runs.read_state(tmp_path / "run", 1), runs.read_state(source, STEPS)
    assert state["step"] == 1
    for name in ("params", "ema"):
        assert_same_bits(state[name], average)
    with pytest.raises(AssertionError):
        assert_same_bits(last["params"], average)


@pytest.mark.slow
def test_the_full_world_trains_as_shipped_with_unrolled_blocks(tmp_path):
    data = runs.write_digits(tmp_path / "data", "full")
    changes = {"steps": 2, "model__scan": False}
    runs.train_here(
        runs.tiny("configs/digits.py:teacher,full", data, **changes), tmp_path / "teacher"
    )
    changes |= {"teacher": str(tmp_path / "teacher"), "trajectory__steps": 2}
    runs.train_here(
        runs.tiny("configs/digits.py:student,full", data, **changes), tmp_path / "student"
    )
    of_student = {"total", "scm", "trajectory", "twinflow", "twin"}
    for name, losses, rows in (("teacher", {"flow"}, 1), ("student", of_student, 3)):
        found = runs.records(tmp_path / name)
        assert list(found) == [1, 2]
        for record in found.values():
            values = {k[5:]: v for k, v in record.items() if k.startswith("loss/")}
            assert values.keys() == losses and None not in values.values()
        with Image.open(tmp_path / name / "samples" / "00000002_ema.png") as image:
            assert image.size == (2048, 64 * rows)
