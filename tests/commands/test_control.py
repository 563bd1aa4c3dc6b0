"""A control branch in the pipeline, the command `sample` and exports, on workdirs of tiny networks."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_same, relative_error
from helpers.workdirs import make_workdir
from jax import export as jax_export
from PIL import Image
from safetensors.numpy import load_file

from sprint_jax import SprintPipeline, export, sample
from sprint_jax.checkpoints.checkpoint import load_params
from sprint_jax.checkpoints.weights import find_branch
from sprint_jax.core.errors import UserError
from sprint_jax.encoders.autoencoder import Remembered
from sprint_jax.encoders.conditions import Conditions
from sprint_jax.interop.diffusers import load_control
from sprint_jax.models.sana import from_fields

pytestmark = pytest.mark.usefixtures("quick")

PROMPTS = ["a red 3 on blue", "a 7"]
BRANCH = {"control_blocks": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("workdirs")
    made = {stage: make_workdir(root / stage, stage, **BRANCH) for stage in ("distill", "flow")}
    return made | {"trunk": make_workdir(root / "trunk", "distill")}


@pytest.fixture(scope="module")
def student(folders):
    return SprintPipeline.from_pretrained(folders["distill"])


@pytest.fixture
def lines():
    return np.random.default_rng(3).choice([0, 255], (8, 8, 1)).repeat(3, -1).astype(np.uint8)


def arrays(images):
    return np.stack([np.asarray(image, np.int32) for image in images])


def test_a_control_image_steers_by_its_scale(student, lines):
    def drawn(**how):
        return arrays(student(PROMPTS, steps=1, seed=1, **how))

    plain, steered = drawn(), drawn(control=lines)
    assert np.abs(steered - plain).max() > 10
    assert np.abs(drawn(control=255 - lines) - steered).max() > 10
    np.testing.assert_array_equal(drawn(control=lines, control_scale=0.0), plain)
    assert np.abs(drawn(control=Image.fromarray(lines), control_scale=0.5) - plain).max() > 0
    # One for each picture, of any size; other networks' pictures are not moved by it.
    own = drawn(control=[lines, 255 - lines])
    np.testing.assert_array_equal(own[0], steered[0])
    assert np.abs(own[1] - steered[1]).max() > 10


def test_condition_latents_are_made_once(student, lines, monkeypatch):
    calls, encode = [], student.autoencoder.encode
    counted = SimpleNamespace(encode=lambda pixels: calls.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(student, "_conditions", Remembered(counted))
    other = 255 - lines[:, ::-1]
    latents = student.encode_control([other, lines, other])
    for seed, prompt in enumerate(PROMPTS):
        student([prompt], steps=1, seed=seed, control=other)
    assert calls == [2]
    expected = encode(np.stack([other, lines, other]).astype(np.float32) / 127.5 - 1)
    np.testing.assert_array_equal(latents, expected)
    small = Remembered(counted, most=1)
    for pictures in ((lines, other), (other,), (lines,)):
        small.encode(np.stack(pictures))
    assert calls == [2, 2, 1]


def test_a_teacher_solves_under_control(folders, lines):
    teacher = SprintPipeline.from_pretrained(folders["flow"])
    drawn = {
        s: arrays(teacher(PROMPTS, steps=3, control=lines, control_scale=s)) for s in (0.0, 1.0)
    }
    np.testing.assert_array_equal(drawn[0.0], arrays(teacher(PROMPTS, steps=3)))
    assert np.abs(drawn[1.0] - drawn[0.0]).max() > 10


def test_a_branch_from_another_place(folders, student, lines):
    """On its own trunk it is the network that it was part of; on another, another one."""
    pipe = SprintPipeline.from_pretrained(folders["trunk"], control=str(folders["distill"]))
    assert (pipe.model, pipe.params.keys()) == (student.model, student.params.keys())
    assert_same(pipe.params["control"], student.params["control"])
    params, _ = load_params(str(folders["distill"]), "raw")
    found = find_branch(str(folders["distill"]), read(folders["trunk"]), "raw")
    assert_same(found.load(), params["control"])
    for change in ({"qk_norm": False}, {"num_attention_heads": 2, "num_cross_attention_heads": 2}):
        with pytest.raises(UserError, match=next(iter(change))):
            find_branch(str(folders["distill"]), read(folders["trunk"]) | change)
    for path, control, word in (
        ("trunk", "trunk", "no control branch"),
        ("distill", "flow", "of its own"),
    ):
        with pytest.raises(UserError, match=word):
            SprintPipeline.from_pretrained(folders[path], control=folders[control])


def read(folder):
    return json.loads((folder / "config.json").read_text())["model"]


def test_what_cannot_be_is_refused(folders, student, lines):
    trunk = SprintPipeline.from_pretrained(folders["trunk"])
    with pytest.raises(UserError, match="no control branch"):
        trunk(PROMPTS, control=lines)
    with pytest.raises(UserError, match="3 images for 2"):
        student(PROMPTS, control=[lines] * 3)
    with pytest.raises(UserError, match="control_scale=nan"):
        student(PROMPTS, control=lines, control_scale=float("nan"))


def test_the_command(folders, student, lines, tmp_path):
    Image.fromarray(lines).save(tmp_path / "lines.png")
    common = ["--out", str(tmp_path / "out"), "--steps", "1", "--prompt", PROMPTS[0]]
    control = ["--control", str(tmp_path / "lines.png"), "--control_scale", "0.7"]
    branch = ["--model", str(folders["trunk"]), "--control_branch", str(folders["distill"])]
    sample.main([*common, *control, *branch])
    with Image.open(tmp_path / "out" / "00000.png") as image:
        written = np.asarray(image)
    pipe = SprintPipeline.from_pretrained(folders["trunk"], control=folders["distill"])
    expected = pipe(PROMPTS[:1], steps=1, control=lines, control_scale=0.7)
    np.testing.assert_array_equal(written, np.asarray(expected[0]))
    for extra, word, code in (
        (["--control", "none.png"], r"--control none\.png", 1),
        ([*control, "--control_kind", "photo"], "--control_weights ControlNetHED", 2),
        ([*control, "--control_weights", "x.pth"], "of no use", 2),
        (["--control_kind", "hed"], "--control:", 2),
    ):
        with pytest.raises(UserError, match=word) as error:
            sample.main([*common, *branch, *extra])
        assert error.value.exit_code == code


@pytest.mark.parametrize(("kind", "made"), [("hed", "hed"), ("photo", "scribble")])
def test_a_photo_becomes_lines(folders, student, tmp_path, monkeypatch, kind, made):
    """They are found in the photo at the size of the picture, and steer it as a sketch does."""
    photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    asked = []

    def load(*kinds, thickness):
        asked.append((*kinds, thickness))
        return Conditions(lambda images: 255 - images[..., 0], (), 1, {"kind": kinds[0]})

    monkeypatch.setattr(sample, "load_conditions", load)
    words = ["--model", str(folders["distill"]), "--steps", "1", "--prompt", PROMPTS[0]]
    words += ["--control", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]
    sample.main([*words, "--control_kind", kind, "--control_weights", "hed.pth"])
    assert asked == [(made, "hed.pth", 1 if made == "scribble" else -1)]
    with Image.open(tmp_path / "out" / "00000.png") as image:
        written = np.asarray(image)
    lines = np.repeat(255 - photo[..., :1], 3, -1)
    np.testing.assert_array_equal(written, student(PROMPTS[:1], steps=1, control=lines)[0])


# --- Exports


@pytest.mark.slow
def test_stablehlo(folders, lines, tmp_path):
    words = ["--workdir", str(folders["flow"]), "--out", str(tmp_path / "out"), "--steps", "1"]
    export.main([*words, "--format", "stablehlo"])
    folder, example = tmp_path / "out", load_file(tmp_path / "out" / "example.safetensors")
    functions = json.loads((folder / "manifest.json").read_text())["functions"]
    names = [value["name"] for value in functions["denoise_1"]["inputs"]]
    assert names[-3:] == ["guidance", "control", "control_scale"]
    assert functions["encode"]["output"]["shape"] == ["b", 4, 4, 12]

    def call(name, *inputs):
        entry = functions[name]
        data = (folder / entry["file"]).read_bytes()
        params = [load_file(folder / entry["params"])] if entry["params"] else []
        return np.asarray(jax_export.deserialize(bytearray(data)).call(*params, *inputs))

    control = call("encode", lines[None].astype(np.float32) / 127.5 - 1)
    arrays = [example[name] if "null" in name else example[name][:1] for name in names[:-2]]
    scale = np.full(1, 0.6, np.float32)
    found = call("denoise_1", *arrays, control, scale)
    teacher = SprintPipeline.from_pretrained(folders["flow"])
    how = dict(steps=1, guidance=arrays[-1], control=control, control_scale=scale)
    expected = teacher.denoise(*arrays[:3], **how)
    assert relative_error(found, expected) < 1e-5


def test_diffusers(folders, tmp_path, capsys):
    """A teacher without QK norm becomes a SanaControlNetPipeline; other branches are refused."""
    plain = make_workdir(tmp_path / "plain", "flow", qk_norm=False, timestep_scale=1.0, **BRANCH)
    words = ["--out", str(tmp_path / "out"), "--format", "diffusers", "--workdir"]
    export.main([*words, str(plain)])
    assert "otherwise" in capsys.readouterr().out
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "SanaControlNetPipeline"
    assert index["controlnet"] == ["diffusers", "SanaControlNetModel"]
    params, _ = load_params(str(plain))
    fields, branch = load_control(
        tmp_path / "out" / "controlnet", read(plain) | {"control_blocks": 0}
    )
    assert from_fields(fields).control_wiring == "diffusers"
    found = {name: branch[name] for name in params["control"]}
    assert_same(found, params["control"])
    np.testing.assert_array_equal(
        branch["patch_embed"]["proj"]["kernel"], params["patch_embed"]["proj"]["kernel"]
    )
    normed = make_workdir(tmp_path / "normed", "flow", **BRANCH)
    dense = make_workdir(tmp_path / "dense", "flow", qk_norm=False, **BRANCH)
    for workdir, word in (
        (normed, "QK norm"),
        (dense, "timestep_scale"),
        (folders["distill"], "stablehlo"),
    ):
        with pytest.raises(UserError, match=word):
            export.main([*words[:1], str(tmp_path / "new"), *words[2:], str(workdir)])
    assert not (tmp_path / "new").exists()
    assert branch["before_proj"]["kernel"].dtype == jnp.float32
