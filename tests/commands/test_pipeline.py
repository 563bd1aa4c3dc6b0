"""The pipeline and the command `sample`, on workdirs of tiny networks with random weights."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.workdirs import STEP, make_workdir
from PIL import Image

from sprint_jax import SprintPipeline, sample, sampling, trigflow
from sprint_jax.core.errors import UserError
from sprint_jax.core.sheet import Cell, draw_sheet

pytestmark = pytest.mark.usefixtures("quick")

PROMPTS = ["a red 3 on blue", "a 7", "a green 5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("workdirs")
    return {stage: make_workdir(root / stage, stage) for stage in ("distill", "flow")}


@pytest.fixture(scope="module")
def student(folders):
    return SprintPipeline.from_pretrained(folders["distill"])


@pytest.fixture(scope="module")
def teacher(folders):
    return SprintPipeline.from_pretrained(str(folders["flow"]))


def inputs(pipe, prompts=PROMPTS, seed=0, steps=2):
    text, mask = pipe.encode_text(prompts)
    indices = np.arange(len(prompts))
    noise, step_noise = pipe.draw_noise(seed, indices, pipe.latent_shape(), steps)
    return text, mask, noise, step_noise


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def arrays(images):
    return np.stack([np.asarray(image, np.int32) for image in images])


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_student_equals_the_published_loop(student, steps):
    """reference.md section 4 written out in flow time, with float64 between the network calls."""
    text, mask, noise, step_noise = inputs(student, steps=steps)
    result = student.denoise(text, mask, noise, steps=steps, guidance=4.5, step_noise=step_noise)
    angles = [1.5708, 1.3, 0] if steps == 2 else np.linspace(1.5708, 0, steps + 1)
    apply = jax.jit(student.model.apply)
    x = 0.5 * np.asarray(noise, np.float64)
    for step, u in enumerate(angles[:-1]):
        t = np.sin(u) / (np.sin(u) + np.cos(u))
        r = np.sqrt(t**2 + (1 - t) ** 2)
        seen = (x / 0.5 * r).astype(np.float32)
        time, told = np.full(3, t, np.float32), np.full(3, 0.45, np.float32)
        f = np.asarray(apply({"params": student.params}, seen, time, text, mask, told), np.float64)
        F = 0.5 * ((1 - 2 * t) * seen + (1 - 2 * t + 2 * t**2) * f) / r
        x0 = np.cos(u) * x - np.sin(u) * F
        if step + 1 < steps:
            fresh = np.asarray(step_noise[step], np.float64)
            x = np.cos(angles[step + 1]) * x0 + np.sin(angles[step + 1]) * 0.5 * fresh
    assert result.shape == noise.shape and result.dtype == jnp.float32
    scale = np.abs(x0 / 0.5).max()
    np.testing.assert_allclose(result, x0 / 0.5, atol=2e-5 * scale)


def test_pictures_have_the_size_of_training_or_the_one_asked_for(student):
    images = student(PROMPTS, steps=1)
    assert [(image.size, image.mode) for image in images] == [((8, 8), "RGB")] * 3
    assert student(PROMPTS[:1], steps=1, height=8, width=16)[0].size == (16, 8)
    # Images of one prompt follow each other.
    several = arrays(student(PROMPTS[:2], steps=1, images_per_prompt=2))
    same = arrays(student([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], steps=1))
    np.testing.assert_array_equal(several, same)
    assert np.abs(several[0] - several[1]).max() > 10


def test_a_picture_depends_on_seed_place_and_prompt_alone(student):
    together = arrays(student(PROMPTS, steps=2, seed=3))
    # Other batches are other programs: their sums may round to a neighbouring byte.
    assert np.abs(arrays(student(PROMPTS, steps=2, seed=3, batch_size=2)) - together).max() <= 1
    others = ["a 1", PROMPTS[1], "a blue 9"]
    assert np.abs(arrays(student(others, steps=2, seed=3))[1] - together[1]).max() <= 1
    assert np.abs(arrays(student(PROMPTS, steps=2, seed=4)) - together).max() > 10


def test_default_noise_and_guidance_are_those_of_seed_0_and_the_config(student):
    text, mask, noise, step_noise = inputs(student, seed=0, steps=3)
    default = student.denoise(text, mask, noise, steps=3)
    given = student.denoise(text, mask, noise, steps=3, guidance=3.0, step_noise=step_noise)
    np.testing.assert_array_equal(default, given)
    each = student.denoise(text, mask, noise, steps=3, guidance=np.asarray([3.0, 9.0, 3.0]))
    np.testing.assert_allclose(each[::2], default[::2], atol=1e-5)
    assert np.abs(np.asarray(each[1] - default[1])).max() > 1e-3
    other = student.denoise(text, mask, noise, steps=3, step_noise=-step_noise)
    assert np.abs(np.asarray(other - default)).max() > 0.01


def test_a_program_is_compiled_once_for_steps_and_shape(folders):
    pipe = SprintPipeline.from_pretrained(folders["distill"])
    for seed, guidance in ((0, 3.0), (1, 4.5)):
        pipe(PROMPTS, steps=2, seed=seed, guidance=guidance)
    # Three and four prompts share a program, and batches of a longer request.
    assert len(pipe([*PROMPTS, PROMPTS[0]], steps=2)) == 4
    assert len(pipe(PROMPTS * 3, steps=2, batch_size=4)) == 9
    assert pipe._latents._cache_size() == 1
    pipe(PROMPTS, steps=3)
    assert pipe._latents._cache_size() == 2


def test_what_fills_a_batch_changes_no_picture(student):
    pictures = arrays(student([*PROMPTS, "a 1"], steps=2, seed=3))
    np.testing.assert_array_equal(arrays(student(PROMPTS, steps=2, seed=3)), pictures[:3])


def test_accelerators_default_to_bfloat16(folders, monkeypatch):
    assert SprintPipeline.from_pretrained(folders["distill"]).model.dtype == jnp.float32
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    pipe = SprintPipeline.from_pretrained(folders["distill"])
    assert pipe.model.dtype == jnp.bfloat16


def test_an_image_is_changed_by_its_strength(student):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)

    def drawn(image, strength, steps=2):
        return arrays(student(PROMPTS, seed=2, image=image, strength=strength, steps=steps))

    assert np.abs(drawn(image, 1e-7, 1) - image[None].astype(np.int32)).max() <= 2
    # Diffusers ignores the image here.
    assert np.abs(drawn(image, 0.6) - drawn(255 - image, 0.6)).max() > 10
    whole = student(PROMPTS, seed=2, steps=2, image=Image.fromarray(image), strength=1.0)
    ignored = student(PROMPTS, seed=2, steps=2)
    # cos(1.5708) of the image is left.
    assert np.abs(arrays(whole) - arrays(ignored)).max() <= 1
    each = [image, 255 - image, image]
    own, one = drawn(each, 1e-7, 1), drawn(image, 1e-7, 1)
    assert np.abs(own[::2] - one[::2]).max() <= 1 and np.abs(own[1] - one[1]).max() > 100


def test_ema_and_raw_parameters_are_not_confused(folders, student):
    raw = SprintPipeline.from_pretrained(folders["distill"], params="raw")
    assert student.meta["step"] == raw.meta["step"] == STEP
    assert np.abs(arrays(raw(PROMPTS, steps=1)) - arrays(student(PROMPTS, steps=1))).max() > 10


def test_bfloat16_stays_near_float32(folders, student):
    half = SprintPipeline.from_pretrained(folders["distill"], dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    assert half.model.dtype == jnp.bfloat16
    text, mask, noise, _ = inputs(student, steps=1)
    exact = np.asarray(student.denoise(text, mask, noise, steps=1))
    rounded = half.denoise(text, mask, noise, steps=1)
    assert rounded.dtype == jnp.float32
    gap = np.linalg.norm(np.asarray(rounded) - exact) / np.linalg.norm(exact)
    assert 0 < gap < 0.05


def test_decode_is_clipped_and_text_has_its_shape(student):
    pixels = student.decode(3 * jnp.ones((2, 4, 4, 12)))
    assert pixels.shape == (2, 8, 8, 3) and float(pixels.max()) == 1
    text, mask = student.encode_text(["", "a 3"])
    assert text.shape == (2, 12, 64) and mask.sum(1).tolist() == [1, 3]


SOLVERS = {
    "dpm": lambda v, noise, shift: sampling.dpm_solver_sample(v, noise, steps=5, shift=shift),
    "flow_euler": lambda v, noise, shift: sampling.flow_euler_sample(
        v, noise, steps=5, shift=shift
    ),
    "trigflow_euler": lambda v, noise, shift: sampling.trigflow_euler_sample(
        trigflow.to_trigflow(v), noise, steps=5, sigma_d=0.5
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_teacher_draws_with_its_solver(teacher, solver):
    text, mask, noise, _ = inputs(teacher)

    @jax.jit
    def plain(params):
        velocity = lambda x, t: teacher.model.apply({"params": params}, x, t, text, mask)  # noqa: E731
        return SOLVERS[solver](velocity, noise, teacher.shift)

    expected = np.asarray(plain(teacher.params))
    found = teacher.denoise(text, mask, noise, steps=5, guidance=1.0, solver=solver)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_teacher_is_guided_away_from_the_empty_or_the_negative_prompt(teacher):
    text, mask, noise, _ = inputs(teacher)
    run = dict(steps=3, guidance=0.0)
    for negative in ("", "a 4"):
        away = teacher.denoise(text, mask, noise, negative=negative, **run)
        other_text, other_mask = teacher.encode_text([negative] * 3)
        expected = teacher.denoise(other_text, other_mask, noise, steps=3, guidance=1.0)
        np.testing.assert_allclose(away, expected, atol=1e-4 * float(np.abs(expected).max()))
    assert np.abs(np.asarray(away - teacher.denoise(text, mask, noise, **run))).max() > 0.01


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(steps=5), "steps"),
        (dict(steps=0), "steps"),
        (dict(steps=2, solver="dpm"), "solver dpm"),
        (dict(height=9), "9x8"),
        (dict(width=0), "width=0"),
        (dict(guidance=np.float32("nan")), "guidance=nan"),
        (dict(seed=2**32), "seed=4294967296"),
        (dict(prompts=[]), "prompt"),
        (dict(prompts="a 3"), "'a 3'"),
        (dict(prompts=["a rad 3"]), "'red'"),
        (dict(images_per_prompt=0), "prompt"),
        (dict(image=np.zeros((8, 8), np.uint8)), r"uint8 \(8, 8\)"),
        (dict(image=[np.zeros((8, 8, 3), np.uint8)] * 2), "2 images for 3"),
        (dict(image=Image.new("L", (9, 5)), strength=0.0), "strength=0.0"),
        (dict(negative="a 4"), "negative"),
    ],
)
def test_a_student_refuses(student, arguments, named):
    with pytest.raises(UserError, match=named):
        student(**(dict(prompts=PROMPTS) | arguments))


def test_denoise_refuses(student, teacher):
    text, mask, noise, step_noise = inputs(student, steps=3)
    with pytest.raises(UserError, match=r"step_noise .*\(2, 3, 4, 4, 12\)"):
        student.denoise(text, mask, noise, steps=2, step_noise=step_noise)
    for named, given in {
        "step_noise": dict(steps=2, step_noise=step_noise),
        "'euler'": dict(solver="euler"),
        "steps .* 0": dict(steps=0),
        "image": dict(start=noise),
    }.items():
        with pytest.raises(UserError, match=named):
            teacher.denoise(text, mask, noise, **given)


def test_paths_that_are_no_pipeline(tmp_path, folders):
    foreign = tmp_path / "foreign"
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "config.json").write_text('{"stage": "flow"}')
    for path, params, named in (
        (tmp_path / "nothing", "ema", "nothing"),
        (tmp_path, "ema", f"{tmp_path} .*config.json.*model_index.json"),
        (folders["distill"], "best", "'ema' or 'raw'"),
        (foreign, "ema", r"foreign.config\.json .*'sigma_d'"),
    ):
        with pytest.raises(UserError, match=named):
            SprintPipeline.from_pretrained(path, params=params)


def test_workdirs_whose_config_is_of_another_network(tmp_path, folders):
    workdir = shutil.copytree(folders["distill"], tmp_path / "workdir")
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    for changes, named in (
        ({"model": config["model"] | {"-1": 2}}, "model.-1"),
        ({"trunk": "runs/teacher"}, r"config\.json: trunk=runs/teacher"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=named):
            SprintPipeline.from_pretrained(workdir)


def test_command_writes_pictures_and_a_grid(folders, tmp_path, capsys, student):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a 7\n\n  a green 5 \n")
    out = tmp_path / "new" / "out"
    common = ["--model", str(folders["distill"]), "--out", str(out), "--steps", "1"]
    sample.main([*common, "--prompt", PROMPTS[0], "--prompts", str(prompts), "--scale", "3"])
    names = [f"{i:05d}.png" for i in range(3)]
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid.png"]
    written = np.stack([read(out / name) for name in names])
    assert written.shape == (3, 24, 24, 3)
    np.testing.assert_array_equal(written[:, ::3, ::3], arrays(student(PROMPTS, steps=1)))
    assert read(out / "grid.png").shape[1] > 2 * 96
    assert str(out / "grid.png") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [
        (["--steps", "5"], "steps", 2),
        (["--steps", "two"], "--steps.*'two'", 2),
        (["--prompt", ""], "--prompt", 2),
        (["--prompt", "a rad 3"], "'rad'.*'red'", 1),
        (["--params", "emma"], "emma", 2),
        (["--size", "8"], "--size 8", 2),
        (["--size", "9x8"], "9x8", 2),
        (["--size", "65536x65536"], "height=65536", 2),
        (["--guidance", "nan"], "guidance=nan", 2),
        (["--guidance", "-1"], "guidance=-1", 2),
        (["--seed", "-1"], "seed=-1", 2),
        (["--seed", str(2**64)], "seed=18446744073709551616", 2),
        (["--images-per-prompt", "0"], "images_per_prompt=0", 2),
        (["--batch", "0"], "batch_size=0", 2),
        (["--out", "/proc"], "--out /proc", 1),
        (["--out", "/proc/x"], "--out /proc/x", 1),
        (["--out", "x" * 300], "--out x", 1),
        (["--scale", "0"], "--scale", 2),
        (["--prompts", "EMPTY"], "empty.txt", 1),
        (["--prompts", "missing.txt"], "missing.txt", 1),
        (["--out", "EMPTY"], "--out .*empty.txt", 1),
        (["--model", "nowhere"], "nowhere", 2),
        (["--image", "missing.png"], "--image missing.png", 1),
        (["--image", "EMPTY"], "--image .*empty.txt", 1),
        (["--negative", "a 4"], "negative", 2),
        (["--step", "2"], "--step,.* --steps", 2),
    ],
)
def test_the_command_refuses(folders, tmp_path, words, named, code, monkeypatch):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    base = {"--model": str(folders["distill"]), "--out": str(tmp_path / "out"), "--prompt": "a 3"}
    given = dict(zip(words[::2], words[1::2], strict=True))
    flags = base | {flag: str(empty) if word == "EMPTY" else word for flag, word in given.items()}
    if not named.startswith(
        ("steps", "9x8", "negative", "'rad'", "nowhere")
    ):  # these ask the network
        monkeypatch.setattr(sample.SprintPipeline, "from_pretrained", None)
    with pytest.raises(UserError, match=named) as raised:
        sample.main([word for pair in flags.items() for word in pair if pair[1]])
    assert raised.value.exit_code == code and not list(tmp_path.glob("out/*"))


def test_sheet_shows_pictures_undistorted_with_ticks():
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    cells = [Cell(picture), Cell(picture, "a red 3 on blue"), Cell(picture, "", False)]
    sheet = np.asarray(draw_sheet([cells, [Cell(picture, "a 7", True)]], titles=["real", "1", "2"]))
    whole = picture.repeat(12, 0).repeat(12, 1)
    corners = np.argwhere((sheet == whole[0, 0]).all(-1))
    found = [np.array_equal(sheet[y : y + 96, x : x + 96], whole) for y, x in corners]
    assert sum(found) == 4
    assert all((sheet == color).all(-1).sum() > 10 for color in ((0, 150, 0), (205, 0, 0)))
