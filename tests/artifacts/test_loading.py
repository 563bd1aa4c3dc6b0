"""Pipeline folders and hub ids, loaded and drawn from, and folders that are wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pipeline_folder import INDEX, write_pipeline
from PIL import Image

from sprint_jax import SprintPipeline, sample
from sprint_jax.core.errors import UserError
from sprint_jax.encoders.load import AUTOENCODER_FILES, load_encoders
from sprint_jax.interop import hub
from sprint_jax.interop.diffusers import (
    WEIGHTS,
    load_autoencoder,
    read_autoencoder,
    save_autoencoder,
)

pytestmark = pytest.mark.usefixtures("quick")

PROMPTS = ["a red cat", "a wall"]
TOKENIZER = "tokenizer/tokenizer_config.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("written") / "student")


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "student"))


def test_a_student_draws_in_one_to_four_steps(written):
    pipe = SprintPipeline.from_pretrained(written)
    assert pipe.is_student and pipe.size == (16, 16) and pipe.sigma_d == 0.5
    drawn = [np.stack(pipe(PROMPTS, steps=n)) for n in (1, 2, 3, 4)]
    assert all(pictures.shape == (2, 16, 16, 3) for pictures in drawn)
    assert np.stack(pipe(PROMPTS[:1], height=24, width=8)).shape == (1, 24, 8, 3)
    with pytest.raises(UserError, match=r"18x16.* 4"):
        pipe(PROMPTS, height=18)


def test_a_teacher_draws_at_its_shift(tmp_path):
    pipe = SprintPipeline.from_pretrained(write_pipeline(tmp_path / "teacher", student=False))
    assert not pipe.is_student and pipe.shift == 2.5 and pipe.integer_times
    text, mask = pipe.encode_text(PROMPTS)
    noise, _ = pipe.draw_noise(0, np.arange(2), pipe.latent_shape(), 3)
    guided = pipe.denoise(text, mask, noise, steps=3, guidance=4.5)
    away = pipe.denoise(text, mask, noise, steps=3, guidance=4.5, negative="a wall")
    assert guided.shape == (2, 4, 4, 4) and np.abs(guided - away).max() > 1e-3


def test_bfloat16_reaches_every_part(written):
    pipe = SprintPipeline.from_pretrained(written, dtype=jnp.bfloat16)
    parts = (pipe.params, pipe.autoencoder.params, pipe.text_encoder.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(parts)} == {jnp.dtype("bfloat16")}
    dtypes = pipe.model.dtype, pipe.autoencoder.config.dtype, pipe.text_encoder.gemma.dtype
    assert all(dtype == jnp.bfloat16 for dtype in dtypes)


def smaller(folder, written, **changes):
    """Writes an autoencoder with another decoder for the latents of a pipeline's."""
    changes = dict(decoder_layers_per_block=(0, 1, 1)) | changes
    config = dataclasses.replace(read_autoencoder(written / "vae"), **changes)
    folder.mkdir(parents=True)
    save_autoencoder(folder, config, jax.jit(config.init)(jax.random.key(0)))
    return folder


def test_another_autoencoder_draws_the_same_latents(written, tmp_path):
    pipe = SprintPipeline.from_pretrained(written)
    smaller(tmp_path / "pipeline" / "vae", written)
    latents = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        other = SprintPipeline.from_pretrained(written, autoencoder=place)
        config, params = load_autoencoder(tmp_path / "pipeline" / "vae")
        expected = config.decode(params, latents)
        assert np.abs(other.autoencoder.decode(latents) - expected).max() < 1e-5
        assert (
            np.abs(other.autoencoder.decode(latents) - pipe.autoencoder.decode(latents)).max() > 0.1
        )
    words = ["--model", str(written), "--prompt", PROMPTS[0], "--steps", "1"]
    for name, more in {"own": [], "other": ["--autoencoder", str(place)]}.items():
        sample.main([*words, *more, "--out", str(tmp_path / name)])
    own, other = (np.asarray(Image.open(tmp_path / n / "00000.png")) for n in ("own", "other"))
    assert own.shape == other.shape and (own != other).any()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(scaling_factor=0.2), "scaling_factor"),
        (dict(latent_channels=8), "latent_channels"),
    ],
)
def test_an_autoencoder_of_other_latents_is_refused(written, tmp_path, changes, name):
    folder = smaller(tmp_path / "vae", written, **changes)
    with pytest.raises(UserError, match=rf"vae/config\.json: {name} "):
        SprintPipeline.from_pretrained(written, autoencoder=folder)
    with pytest.raises(UserError, match="nowhere"):
        SprintPipeline.from_pretrained(written, autoencoder=tmp_path / "nowhere")
    with pytest.raises(UserError, match="digits") as error:
        load_encoders("digits", jnp.float32, autoencoder=folder)
    assert error.value.exit_code == 2


def test_of_a_hub_s_repository_an_autoencoder_alone_is_taken():
    files = ["model_index.json", "transformer/diffusion_pytorch_model.safetensors"]
    files += ["text_encoder/model.safetensors", "config.json"]
    ours = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert hub.choose_files([*files, *ours], AUTOENCODER_FILES) == ["config.json", *ours]


def test_the_command_draws_from_a_folder(written, tmp_path):
    words = ["--model", str(written), "--prompt", PROMPTS[0], "--out", str(tmp_path)]
    sample.main([*words, "--steps", "1", "--size", "8x12"])
    assert {path.name for path in tmp_path.iterdir()} == {"00000.png", "grid.png"}


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda f: change(f / INDEX, _class_name="FluxPipeline"), [INDEX, "'FluxPipeline'"]),
        (lambda f: (f / INDEX).write_text("{"), [INDEX]),
        (lambda f: (f / INDEX).write_text("[]"), [INDEX, "list"]),
        (lambda f: change(f / INDEX, _class_name="SanaPipeline"), ["guidance_embeds", INDEX]),
        (lambda f: shutil.rmtree(f / "scheduler"), ["scheduler/scheduler_config.json"]),
        (lambda f: shutil.rmtree(f / "transformer"), ["transformer/config.json"]),
        (lambda f: shutil.rmtree(f / "vae"), ["vae/config.json"]),
        (lambda f: shutil.rmtree(f / "text_encoder"), ["text_encoder/config.json"]),
        (lambda f: shutil.rmtree(f / "tokenizer"), ["tokenizer/tokenizer.json"]),
        (lambda f: (f / "transformer" / WEIGHTS).write_bytes(b"12"), [f"transformer/{WEIGHTS}"]),
        (lambda f: change(f / "vae" / "config.json", latent_channels=8), ["vae: tensor "]),
        (lambda f: change(f / TOKENIZER, bos_token="\ud800"), [TOKENIZER]),
    ],
)
def test_damaged_folders_end_in_one_line(folder, tmp_path, damage, names):
    damage(folder)
    out = tmp_path / "out"
    with pytest.raises(UserError) as raised:
        sample.main(["--model", str(folder), "--prompt", "a cat", "--out", str(out)])
    message = str(raised.value)
    assert all(name in message for name in [str(folder), *names]), message
    assert "\n" not in message and not out.exists()


def test_whole_numbers_of_any_size_are_taken_for_floats(folder):
    for part, name in (("vae", "scaling_factor"), ("text_encoder", "rms_norm_eps")):
        change(folder / part / "config.json", **{name: 2**40})
    change(folder / "scheduler" / "scheduler_config.json", sigma_data=2**40)
    pipe = SprintPipeline.from_pretrained(folder)
    assert pipe.autoencoder.config.scaling_factor == pipe.sigma_d == 2.0**40
    assert np.stack(pipe(PROMPTS, steps=2)).shape == (2, 16, 16, 3)


def test_hub_ids(written, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.is_hub_id("Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers")
    assert hub.is_hub_id("org/model@refs/pr/1")
    assert not any(
        map(hub.is_hub_id, ["student", "org/model@", "./runs/x", "/a/b", "a/b/c", str(written)])
    )
    with pytest.raises(UserError, match="org/model"):
        SprintPipeline.from_pretrained("org/model")
    # As the hub's library keeps what it once downloaded.
    cache = tmp_path / "models--org--model"
    shutil.copytree(written, cache / "snapshots" / "a1")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a1")
    assert SprintPipeline.from_pretrained("org/model").is_student
    (cache / "refs" / "v1").write_text("a1")
    assert hub.download("org/model@v1") == cache / "snapshots" / "a1"
    with pytest.raises(UserError, match="org/model@v2"):
        hub.download("org/model@v2")


def test_weights_are_downloaded_in_one_variant():
    stem = "diffusion_pytorch_model"
    whole = ["model_index.json", f"transformer/{stem}.safetensors"]
    whole += ["vae/config.json", f"vae/{stem}-00001-of-00002.safetensors"]
    whole += [f"vae/{stem}.safetensors.index.json", "text_encoder/model.bf16.safetensors"]
    spare = [f"transformer/{stem}.fp16.safetensors", f"vae/{stem}.bf16-00001-of-00002.safetensors"]
    spare += [f"vae/{stem}.safetensors.index.bf16.json", "text_encoder/model.fp16.safetensors"]
    spare += [f"vae/{stem}.bin", "README.md"]
    assert hub.choose_files([*spare, *whole], hub.FILES) == whole
