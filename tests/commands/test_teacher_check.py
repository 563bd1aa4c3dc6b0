"""The command teacher_check."""

import json

import jax
import numpy as np
import pytest
from helpers.runs import run_here
from helpers.workdirs import make_workdir, random_params, tiny_config
from PIL import Image

from sprint_jax import teacher_check
from sprint_jax.interop import diffusers
from sprint_jax.interop.sana import config_from_fields
from sprint_jax.parallel.sharding import make_mesh
from sprint_jax.training import setup

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """The command's mesh; programs for all eight would take a minute to compile."""
    mesh = make_mesh(devices=jax.devices()[:2])
    monkeypatch.setattr(setup, "mesh_from", lambda c: mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    make_workdir(folder / "teacher", "flow")
    make_workdir(folder / "student", "distill")
    fields = tiny_config("flow")["model"]
    diffusers.save_transformer(folder / "before", fields, random_params(fields, 1))
    (folder / "wide").mkdir()  # without weights: widths are looked at before them
    config = config_from_fields(fields | {"caption_channels": 32})
    config["_class_name"] = "SanaTransformer2DModel"
    (folder / "wide" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(folder, data, monkeypatch, capfd):
    """``run(*words)`` runs the command in the folder."""
    monkeypatch.chdir(folder)
    line = [f"--config.data.dir={data}", "--count", "8", "--batch", "8", "--out", "report"]
    return lambda *words: run_here([*line, *words], monkeypatch, capfd, main=teacher_check.main)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--model", "before"], 2, "--config"),
        (["--model", "student"], 1, "student"),
        (["--model", "nothing"], 2, "nothing"),
        (["--model", "teacher", "--before", "nothing"], 2, "nothing"),
        (["--model", "teacher", "--before", "wide"], 2, "wide"),
        (["--model", "teacher", "--count", "0"], 2, "--count"),
        (["--model", "teacher", "--config.data.source=tape"], 2, "tape"),
    ],
)
def test_command_refuses_what_it_cannot_measure(folder, run, words, code, message):
    ended = run(*words)
    assert ended.code == code and message in ended.error
    assert not (folder / "report").exists()


@pytest.mark.slow
def test_command_reports_curves_pictures_and_exit_code(folder, run):
    ended = run("--model", "teacher", "--before", "before")
    report = json.loads((folder / "report" / "report.json").read_text())
    assert ended.code == teacher_check.NOT_READY == 4 and report["ready"] is False  # never trained
    passed = {each["name"]: each["passed"] for each in report["checks"]}
    assert not passed["learnt"] and all(f"{name} " in ended.out for name in passed)
    # The workdir's average has the weights of the folder.
    same = [report["measured"][name]["flow"]["loss"] for name in ("after", "before")]
    np.testing.assert_allclose(*same, rtol=1e-5)
    for name in ("curves.png", "samples.png"):
        with Image.open(folder / "report" / name) as picture:
            assert min(picture.size) > 100
