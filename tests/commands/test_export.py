"""Exports hold the trained network, and an export that fails leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_same_bits, relative_error
from helpers.runs import quick_compilation, run_here
from helpers.workdirs import STEP, make_workdir
from jax import export as jax_export
from safetensors.numpy import load_file, save_file

from sprint_jax import SprintPipeline, export
from sprint_jax.artifacts import pipeline_folder, stablehlo
from sprint_jax.checkpoints.checkpoint import load_params
from sprint_jax.checkpoints.weights import find_weights
from sprint_jax.core.files import try_lock
from sprint_jax.interop.diffusers import load_transformer
from sprint_jax.sampling import student_schedule

pytestmark = pytest.mark.usefixtures("quick")

STORED = Path(__file__).parents[1] / "parity" / "stored"
# Programs of symbolic and of fixed batch may add in another order: observed 3e-7.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Workdirs of the world whose latents are not square."""
    root = tmp_path_factory.mktemp("models")
    return {stage: make_workdir(root / stage, stage, "full") for stage in ("flow", "distill")}


def words(workdir, out, *extra, to="diffusers") -> list[str]:
    return ["--workdir", str(workdir), "--out", str(out), "--format", to, *map(str, extra)]


def make_base(folder: Path, channels: int = 12, width: int = 64) -> Path:
    """A pipeline folder of which export reads configs and copies the rest."""
    configs = {
        "vae": {"_class_name": "AutoencoderDC", "latent_channels": channels},
        "text_encoder": {"hidden_size": width},
        "tokenizer": {},
    }
    index = {"_class_name": "SanaSprintPipeline", "transformer": ["diffusers", "Other"]}
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        if part != "tokenizer":
            save_file({"x": np.arange(3.0)}, folder / part / "model.safetensors")
        index[part] = ["library", f"Class of {part}"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("stage", "which", "dtype"),
    [
        ("distill", "ema", "float32"),
        pytest.param("distill", "raw", "bfloat16", marks=pytest.mark.slow),
        ("flow", "ema", "bfloat16"),
    ],
)
def test_transformer_is_the_trained_one(models, tmp_path, capsys, stage, which, dtype):
    out = tmp_path / "new" / "out"
    export.main(words(models[stage], out, "--dtype", dtype, "--params", which))
    assert "--base" in capsys.readouterr().out
    fields, params = load_transformer(out / "transformer", dtype)
    trained, _ = load_params(str(models[stage]), which)
    assert_same_bits(params, jax.tree.map(lambda leaf: leaf.astype(dtype), trained))
    assert fields["guidance_embeds"] == fields.get("logvar", False) == (stage == "distill")
    # Training goes on from it with every parameter, the logvar head included.
    again = find_weights(str(out)).load(None)[0]
    if stage == "distill":  # the head is in float32 always
        params["logvar_linear"] = trained["logvar_linear"]
    assert_same_bits(again, jax.tree.map(lambda leaf: leaf.astype("float32"), params))
    assert ("logvar_linear" in params) == (stage == "distill")
    card = (out / "README.md").read_text()
    assert f"{which} parameters of step {STEP}" in card and "4 x 8" in card
    index = json.loads((out / "model_index.json").read_text())
    assert index["vae"] == index["text_encoder"] == index["tokenizer"] == [None, None]
    assert everything(tmp_path)[0].endswith("/new") and len(list(out.parent.iterdir())) == 1


def test_parts_of_a_base_are_copied(models, tmp_path, capsys):
    base, out = make_base(tmp_path / "base"), tmp_path / "out"
    # The hub's cache holds links.
    weights = base / "vae" / "model.safetensors"
    weights.symlink_to(weights.rename(tmp_path / "blob"))
    out.mkdir()
    export.main(words(models["distill"], out, "--base", base))
    assert "--base" not in capsys.readouterr().out
    index = json.loads((out / "model_index.json").read_text())
    assert index["vae"] == ["library", "Class of vae"]
    assert index["transformer"] == ["diffusers", "SanaTransformer2DModel"]
    for part in pipeline_folder.PARTS:
        for path in (base / part).iterdir():
            assert (out / part / path.name).read_bytes() == path.read_bytes()
    assert not (out / "vae" / "model.safetensors").is_symlink()


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """``refused(words, code, *parts)``: one line with these names, and nothing is left behind."""

    def run(arguments, code, *parts):
        before = everything(tmp_path)
        ended = run_here(arguments, monkeypatch, capfd, main=export.main)
        assert ended.code == code, ended
        for part in parts:
            assert part in ended.error, (part, ended.error)
        assert everything(tmp_path) == before

    return run


def test_bad_workdirs_and_outputs(models, tmp_path, refused):
    flow = models["flow"]
    refused(words(tmp_path / "none", tmp_path / "new" / "out"), 1, "none", "config.json")
    refused(words(tmp_path / "none", tmp_path / "out", to="stablehlo"), 2, f"{tmp_path}/none")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    shutil.copy(flow / "config.json", tmp_path / "empty")
    refused(words(tmp_path / "empty", tmp_path / "out"), 1, "empty", "checkpoint")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"stage": "flow"}')
    refused(words(tmp_path / "other", tmp_path / "out"), 1, "other/config.json")
    for out in ("other", "other/config.json", "other/config.json/out"):
        refused(words(flow, tmp_path / out), 1, f"--out {tmp_path / out} ")


def test_full_disk(models, tmp_path, refused, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for to in ("diffusers", "stablehlo"):
        refused(words(models["flow"], tmp_path / "out", to=to), 1, str(tmp_path), "0.0 GB")


def test_bad_bases(models, tmp_path, refused):
    def check(base, *parts, code=1):
        refused(words(models["distill"], tmp_path / "out", "--base", base), code, str(base), *parts)

    check(tmp_path / "none", code=2)
    check(models["flow"], code=2)
    check(make_base(tmp_path / "channels", channels=32), "32", "12")
    check(make_base(tmp_path / "width", width=2304), "2304", "64")
    for part in pipeline_folder.PARTS:
        shutil.rmtree(make_base(tmp_path / f"no_{part}") / part)
        check(tmp_path / f"no_{part}", f" {part}")
    (make_base(tmp_path / "bare") / "text_encoder" / "model.safetensors").unlink()
    check(tmp_path / "bare", "text_encoder")
    (make_base(tmp_path / "odd") / "text_encoder" / "config.json").write_text("[]")
    check(tmp_path / "odd", "text_encoder/config.json")


@pytest.mark.parametrize(
    ("stage", "to", "extra", "names"),
    [
        ("flow", "diffusers", ("--size", "8x8"), ["--size", "stablehlo"]),
        ("flow", "stablehlo", ("--base", "x"), ["--base", "diffusers"]),
        ("distill", "stablehlo", ("--steps", 2), ["--steps"]),
        ("flow", "stablehlo", ("--steps", 0), ["steps", "1"]),
        ("flow", "stablehlo", ("--size", "8x9"), ["8x9", "2"]),
        ("flow", "stablehlo", ("--size", "8"), ["8"]),
    ],
)
def test_bad_flags(models, tmp_path, refused, stage, to, extra, names):
    refused(words(models[stage], tmp_path / "out", *extra, to=to), 2, *names)


def test_student_whose_times_diffusers_cannot_show(tmp_path, models, refused):
    shutil.copytree(models["distill"], tmp_path / "student")
    path = tmp_path / "student" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["timestep_scale"] = 1.0
    path.write_text(json.dumps(config))
    refused(words(tmp_path / "student", tmp_path / "out"), 1, "timestep_scale", "1.0", "stablehlo")


@pytest.mark.parametrize("change", ["params", "fields"])
def test_another_network_in_the_folder_is_an_error(models, tmp_path, refused, monkeypatch, change):
    def changed(folder, dtype):
        fields, params = load_transformer(folder, dtype)
        if change == "fields":
            return fields | {"timestep_scale": 1.0}, params
        return fields, params | {"scale_shift_table": params["scale_shift_table"] + 1e-6}

    monkeypatch.setattr(pipeline_folder, "load_transformer", changed)
    refused(words(models["flow"], tmp_path / "out"), 1, "/transformer ")


def test_artifact_that_differs_is_an_error(models, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(stablehlo, "TOLERANCE", {"float32": -1.0})
    arguments = words(models["flow"], tmp_path / "out", "--steps", 1, to="stablehlo")
    refused(arguments, 1, "denoise_1.stablehlo")


def test_interrupted_export_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        export.new_folder(tmp_path / "a" / "b" / "out") as folder,
    ):
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert everything(tmp_path) == []


def test_what_a_killed_export_left_goes_with_the_next(tmp_path):
    """One that is locked is still at work, and is left alone as is a folder of another name."""
    killed, working, other = (
        tmp_path / f"{name}.partial-elsewhere-{number}"
        for name, number in (("out", 7), ("out", 8), ("outer", 7))
    )
    for folder in (killed, working, other):
        folder.mkdir()
        (folder / "half").touch()
    descriptor = os.open(working, os.O_RDONLY)
    try:
        assert try_lock(descriptor)
        with export.new_folder(tmp_path / "out") as folder:
            (folder / "whole").touch()
    finally:
        os.close(descriptor)
    kept = (tmp_path / "out", working, other)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert [path.name for folder in kept for path in folder.iterdir()] == ["whole", "half", "half"]


@pytest.fixture(scope="module")
def student(models, tmp_path_factory):
    """(folder of artifacts, its manifest, pipeline)."""
    out = tmp_path_factory.mktemp("stablehlo") / "student"
    export.main(words(models["distill"], out, to="stablehlo"))
    manifest = json.loads((out / "manifest.json").read_text())
    return out, manifest, SprintPipeline.from_pretrained(models["distill"])


def artifact(folder: Path, name: str):
    return jax_export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))


@pytest.mark.parametrize(
    ("steps", "count"),
    [(2, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, 3), (3, 3), (4, 1)])],
)
def test_artifacts_sample_as_the_pipeline(student, steps, count):
    folder, _, pipe = student
    prompts = ["a red 3 on blue", "a green 7 on yellow", "a blue 1 on red"]
    text, mask = pipe.encode_text(prompts[:count])
    noise, step_noise = pipe.draw_noise(5, np.arange(count), pipe.latent_shape(), steps)
    guidance = np.arange(2, 2 + count, dtype=np.float32)
    how = dict(steps=steps, guidance=guidance, step_noise=step_noise)
    expected = pipe.denoise(text, mask, noise, **how)
    if step_noise is None:
        step_noise = np.zeros((0, *noise.shape), np.float32)
    inputs = load_file(folder / "params.safetensors"), text, mask, noise, step_noise, guidance
    found = artifact(folder, f"denoise_{steps}").call(*inputs)
    assert relative_error(found, expected) < TOLERANCE
    pixels = artifact(folder, "decode").call(found)
    assert relative_error(pixels, pipe.decode(expected)) < TOLERANCE


def test_manifest_says_what_the_functions_take(student):
    folder, manifest, pipe = student
    assert manifest["kind"] == "student" and manifest["source"]["step"] == STEP
    assert set(manifest["functions"]) == {"decode", *(f"denoise_{n}" for n in (1, 2, 3, 4))}
    for name, entry in manifest["functions"].items():
        exported = artifact(folder, name)
        assert exported.platforms == ("cpu", "cuda", "tpu") == tuple(manifest["platforms"])
        described = [(value["dtype"], *value["shape"]) for value in entry["inputs"]]
        taken = exported.in_avals[-len(described) :]
        sizes = [tuple("b" if str(n) == "b" else n for n in aval.shape) for aval in taken]
        assert described == [(aval.dtype.name, *s) for aval, s in zip(taken, sizes, strict=True)]
    names = [value["name"] for value in manifest["functions"]["denoise_2"]["inputs"]]
    assert names == ["text", "mask", "noise", "step_noise", "guidance"]
    assert manifest["functions"]["denoise_2"]["schedule"] == [*student_schedule(2, pipe.midpoint)]
    assert not any("logvar" in name for name in load_file(folder / "params.safetensors"))


def test_loader_runs_without_this_package(student):
    folder, manifest, _ = student
    code = "import runpy, sys; sys.modules['sprint_jax'] = None; runpy.run_path('load.py', run_name='__main__')"
    command = [sys.executable, "-W", "error", "-c", code]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    errors = {line.split()[0]: float(line.split()[-1]) for line in ended.stdout.splitlines()}
    assert set(errors) == set(manifest["functions"])
    assert max(errors.values()) < TOLERANCE


@pytest.mark.slow
def test_teacher_in_bfloat16_at_another_size(models, tmp_path, capsys):
    out = tmp_path / "out"
    extra = ("--steps", 2, "--dtype", "bfloat16", "--size", "16x8", "--params", "raw")
    export.main(words(models["flow"], out, *extra, to="stablehlo"))
    manifest = json.loads((out / "manifest.json").read_text())
    inputs = manifest["functions"]["denoise_2"]["inputs"]
    assert [value["name"] for value in inputs][-3:] == ["null_text", "null_mask", "guidance"]
    assert manifest["functions"]["decode"]["output"]["shape"] == ["b", 16, 8, 3]
    params = load_file(out / "params.safetensors")
    raw, _ = load_params(str(models["flow"]), "raw")
    expected = raw["scale_shift_table"].astype(jnp.bfloat16)
    assert params["scale_shift_table"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["scale_shift_table"], expected)
