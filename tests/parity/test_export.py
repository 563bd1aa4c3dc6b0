"""Exported folders in diffusers' own pipelines, and a whole pipeline as StableHLO.

Errors are max|a - b| / max|b|, float32; observed at most 1.3e-6.
"""

import json

import diffusers
import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from helpers.reference import (
    channels_last,
    tiny_dc_ae,
    tiny_gemma2,
    tiny_tokenizer,
)
from helpers.runs import quick_compilation
from helpers.tiny_pipeline import centered
from helpers.workdirs import make_workdir

from sprint_jax import SprintPipeline, export, sampling
from sprint_jax.encoders.text import INSTRUCTION

PROMPTS = ["a red 3 on blue", "a green 7 on yellow"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {stage: make_workdir(root / stage, stage, "full") for stage in ("flow", "distill")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline whose autoencoder and text encoder are as wide as the digits world's."""
    tokenizer = tiny_tokenizer([INSTRUCTION, *PROMPTS])
    widths = {f"{half}_block_out_channels": (12, 12, 24) for half in ("encoder", "decoder")}
    pipe = diffusers.SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_gemma2(vocab_size=len(tokenizer), hidden_size=64),
        vae=centered(tiny_dc_ae(latent_channels=12, **widths)),
        transformer=diffusers.SanaTransformer2DModel(num_layers=1, num_attention_heads=1),
        scheduler=diffusers.SCMScheduler(),
    )
    folder = tmp_path_factory.mktemp("base")
    pipe.save_pretrained(folder)
    return folder


def run(workdir, out, *extra, to="diffusers"):
    arguments = ["--workdir", workdir, "--out", out, "--format", to, *extra]
    export.main([str(word) for word in arguments])
    return out


@pytest.mark.parametrize("steps", [1, 2])
def test_latents_of_a_pipeline_without_a_base(models, tmp_path, steps):
    out = run(models["distill"], tmp_path / "out")
    parts = dict(vae=None, text_encoder=None, tokenizer=None)
    theirs = diffusers.SanaSprintPipeline.from_pretrained(out, **parts)
    ours = SprintPipeline.from_pretrained(models["distill"])
    text, mask = ours.encode_text(PROMPTS)
    noise, later = (
        torch.randn((2, 12, 4, 8), generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    found = theirs(
        prompt_embeds=torch.tensor(text),
        prompt_attention_mask=torch.tensor(mask),
        latents=noise,
        generator=torch.Generator().manual_seed(2),
        num_inference_steps=steps,
        intermediate_timesteps=ours.midpoint if steps == 2 else None,
        guidance_scale=3.0,
        height=4 * theirs.vae_scale_factor,
        width=8 * theirs.vae_scale_factor,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    how = dict(guidance=3.0, step_noise=channels_last(later)[None] if steps == 2 else None)
    expected = ours.denoise(text, mask, channels_last(noise), steps=steps, **how)
    assert relative_error(expected, channels_last(found)) < 2e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["distill", "flow"])
def test_whole_pipeline_with_a_base(models, base, tmp_path, stage, dtype):
    out = run(models[stage], tmp_path / "out", "--base", base, "--dtype", dtype)
    kind = diffusers.SanaSprintPipeline if stage == "distill" else diffusers.SanaPipeline
    pipe = kind.from_pretrained(out, torch_dtype=getattr(torch, dtype))
    how = dict(num_inference_steps=2, height=32, width=64, use_resolution_binning=False)
    images = pipe(PROMPTS, output_type="np", **how).images
    assert images.shape == (2, 32, 64, 3) and np.isfinite(images).all() and images.std() > 0.01
    assert type(pipe.vae) is diffusers.AutoencoderDC and pipe.vae.config.latent_channels == 12
    # Here the folder samples as the training did: the same midpoint, guidance and size.
    here, trained = map(SprintPipeline.from_pretrained, (out, models[stage]))
    assert (here.midpoint, here.guidance) == (trained.midpoint, trained.guidance)
    assert here.latent_shape() == trained.latent_shape()


def test_teachers_scheduler_takes_our_times(models, tmp_path):
    out = run(models["flow"], tmp_path / "out")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(out / "scheduler")
    scheduler.set_timesteps(20)
    times = sampling.dpm_solver_times(20, scheduler.config.flow_shift)
    np.testing.assert_allclose(scheduler.sigmas, times, atol=1e-6)


def test_folder_with_an_autoencoder_as_stablehlo(models, base, tmp_path):
    folder = run(models["flow"], tmp_path / "folder", "--base", base)
    # The command compares with the pipeline to 1e-5 itself.
    out = run(folder, tmp_path / "out", "--steps", 1, "--size", "16x8", to="stablehlo")
    manifest = json.loads((out / "manifest.json").read_text())["functions"]
    assert manifest["decode"]["params"] == "decoder.safetensors"
    assert manifest["decode"]["output"]["shape"] == ["b", 16, 8, 3]
    text = manifest["denoise_1"]["inputs"][0]
    assert (text["shape"], text["dtype"]) == (["b", 300, 64], "float32")
