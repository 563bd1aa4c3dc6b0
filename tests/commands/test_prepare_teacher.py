"""The command prepare_teacher, and students of a teacher that it made."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers.pods import finish_pod, start_pod
from helpers.runs import read_state, run_here, tiny, words
from helpers.workdirs import make_workdir, slow_time_params, tiny_config

from sprint_jax import prepare_teacher
from sprint_jax.checkpoints.checkpoint import load_params
from sprint_jax.core.errors import UserError
from sprint_jax.core.fingerprint import fingerprint
from sprint_jax.data import feed
from sprint_jax.interop import diffusers
from sprint_jax.models.sana import from_fields
from sprint_jax.teacher import prepare as preparation
from sprint_jax.teacher import surgery
from sprint_jax.training import setup

pytestmark = pytest.mark.usefixtures("quick")

DENSE = tiny_config("flow")["model"]
OLD = DENSE | {"qk_norm": False, "timestep_scale": 1.0}
SPEC = "configs/digits.py:teacher,small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformer folder of diffusers, and workdirs."""
    folder = tmp_path_factory.mktemp("sources")
    diffusers.save_transformer(folder / "transformer", OLD, slow_time_params(OLD, 5))
    make_workdir(folder / "teacher", "flow")
    make_workdir(folder / "student", "distill")
    make_workdir(folder / "old", "flow", qk_norm=False)
    return folder


@pytest.fixture
def prepare(folder, data, tmp_path, monkeypatch, capfd):
    """``prepare(*words, model=..., **changes)`` runs the command; its workdir is tmp_path/run."""

    def run(*more, model="transformer", **changes):
        line = words(SPEC, data, tmp_path / "run", **dict(steps=2) | changes)
        line += ["--model", str(folder / model), *more]
        return run_here(line, monkeypatch, capfd, main=prepare_teacher.main)

    return run


@pytest.mark.slow
def test_command_prepares_trains_and_resumes(prepare, folder, data, tmp_path):
    """From a diffusers folder to a workdir whose first step starts from the operated weights."""
    workdir = tmp_path / "run"
    assert prepare().code == 0
    record = json.loads((workdir / "prepared" / "prepared.json").read_text())
    _, old = diffusers.load_transformer(folder / "transformer")
    assert record["hash"] == fingerprint(old) and len(record["changes"]) == 2
    fields, params = diffusers.load_transformer(workdir / "prepared")
    expected, _ = surgery.operate(OLD, old, DENSE)
    assert from_fields(fields) == from_fields(DENSE)
    assert fingerprint(params) == fingerprint(expected)
    config = json.loads((workdir / "config.json").read_text())
    assert config["init"] == str(workdir / "prepared")
    trained = read_state(workdir, 2)["params"]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), trained, params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01  # two steps of the warm-up

    written = (workdir / "prepared" / "prepared.json").stat().st_mtime_ns
    assert prepare().code == 0
    assert (workdir / "prepared" / "prepared.json").stat().st_mtime_ns == written
    other = prepare("--protect", "0")
    assert other.code == 1 and "--protect" in other.error
    c = tiny("configs/digits.py:student,small,sprint", data, teacher=str(workdir))
    assert setup.find_teacher(c).is_teacher


def test_command_prunes_a_workdir_and_may_stop_before_training(prepare, folder, tmp_path):
    words = "--prune", "1", "--surgery_only"
    assert prepare(*words, model="teacher", model__num_layers=2).code == 0
    prepared = tmp_path / "run" / "prepared"
    assert [path.name for path in prepared.parent.iterdir()] == ["prepared"]
    record = json.loads((prepared / "prepared.json").read_text())
    assert len(record["importance"]) == 2
    assert record["kept"] == [int(np.argmax(record["importance"]))]
    assert (prepared / "importance.png").is_file()
    fields, params = diffusers.load_transformer(prepared)
    whole, _ = load_params(str(folder / "teacher"), "ema")
    assert fields["num_layers"] == 1
    kept = jax.tree.map(lambda leaf: leaf[record["kept"][0]][None], whole["transformer_blocks"])
    assert fingerprint(params["transformer_blocks"]) == fingerprint(kept)


@pytest.mark.slow
def test_of_two_processes_one_operates(folder, data, tmp_path):
    line = ["-m", "sprint_jax.prepare_teacher", "--model", str(folder / "old"), "--surgery_only"]
    line += words(SPEC, data, tmp_path / "run")
    for ended in finish_pod(start_pod(line, devices=2)):
        assert ended.code == 0, ended.err
    prepared = tmp_path / "run" / "prepared"
    assert [path.name for path in prepared.parent.iterdir()] == ["prepared"]
    record = json.loads((prepared / "prepared.json").read_text())
    whole, _ = load_params(str(folder / "old"), "ema")
    assert record["changes"] and record["hash"] == fingerprint(whole)
    expected, _ = surgery.operate(DENSE | {"qk_norm": False}, whole, DENSE)
    assert fingerprint(diffusers.load_transformer(prepared)[1]) == fingerprint(expected)


def test_blocks_are_pruned_by_one_process(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(preparation, "same_everywhere", lambda array: array)
    ended = prepare("--prune", "1", "--surgery_only")
    assert ended.code == 2 and "--prune" in ended.error
    assert not (tmp_path / "run").exists()


def test_interrupted_surgery_is_begun_anew(prepare, folder, tmp_path):
    partial = tmp_path / "run" / "prepared.partial"
    shutil.copytree(folder / "transformer", partial)
    (partial / "stray").write_text("")
    assert prepare("--surgery_only").code == 0
    assert [path.name for path in partial.parent.iterdir()] == ["prepared"]
    assert not (tmp_path / "run" / "prepared" / "stray").exists()


@pytest.mark.parametrize(
    ("more", "model", "code", "message"),
    [
        ([], "student", 1, "student"),
        ([], "nothing", 2, "nothing"),
        (["--config.init=x"], "transformer", 2, "--config.init"),
        (["--config.stage=distill"], "transformer", 2, "config.stage"),
        (["--config.model.caption_channels=32"], "transformer", 2, "caption_channels"),
        (["--config.steps=0"], "transformer", 2, "config.steps=0"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing(prepare, tmp_path, more, model, code, message):
    ended = prepare(*more, model=model)
    assert ended.code == code and message in ended.error
    assert not (tmp_path / "run").exists()


def test_a_student_may_have_a_teacher_from_a_diffusers_folder(folder, data):
    c = tiny("configs/digits.py:student,small,sprint", data, teacher=str(folder))
    mesh = setup.mesh_from(c)
    with pytest.raises(UserError, match=r"qk_norm=True.*prepare_teacher"):
        setup.build_nets(c, mesh)
    c = c.override({"model.qk_norm": False, "model.timestep_scale": 1.0})
    teacher = setup.build_nets(c, mesh).teacher
    frozen, origin = setup.load_frozen(c, feed.open_data(c, mesh), mesh)
    assert teacher.timestep_scale == 1.0 and not teacher.qk_norm
    found = {"path": str(folder.resolve()), "step": None, "hash": fingerprint(frozen["teacher"])}
    assert origin == found
