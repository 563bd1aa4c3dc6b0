"""Pipelines of diffusers with random weights, small enough to run whole; their folders."""

from pathlib import Path

import diffusers
import torch
from helpers.reference import TINY_SANA, randomize, tiny_dc_ae, tiny_gemma2, tiny_tokenizer

from sprint_jax.encoders.text import INSTRUCTION

PROMPTS = ["A red cat on a wall", "", "two dogs, in oil"]
# One pixel in 32 x 32 is a latent, as in the published autoencoder.
STAGES = dict(block_types="ResBlock", block_out_channels=(8,) * 6)
STAGES |= dict(layers_per_block=(1,) * 6, qkv_multiscales=((),) * 6)
SIX_STAGES = {
    f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in STAGES.items()
}


def centered(model: torch.nn.Module) -> torch.nn.Module:
    """Kernels of mean 0 that keep the scale of their input: latents and pixels of all values then depend
    on noise and prompt, where those of `randomize` hardly do."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                weight = module.weight
                weight.sub_(weight.mean()).div_(weight.std() * weight[0].numel() ** 0.5)
    return model


def tiny_pipeline(student: bool, full_size: bool = False):
    """A SanaSprintPipeline or SanaPipeline; pictures of 32 by 32 pixels, or of 1024 by 1024 if full-size."""
    tokenizer = tiny_tokenizer([INSTRUCTION, *PROMPTS])
    text_encoder = tiny_gemma2(vocab_size=len(tokenizer))
    width = text_encoder.config.hidden_size
    fields = TINY_SANA | dict(caption_channels=width, num_layers=2)
    fields |= dict(guidance_embeds=True, timestep_scale=1.0) if student else {}
    fields |= dict(sample_size=32) if full_size else {}
    transformer = diffusers.SanaTransformer2DModel(**fields)
    kind = diffusers.SanaSprintPipeline if student else diffusers.SanaPipeline
    if student:
        scheduler = diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    pipe = kind(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=centered(tiny_dc_ae(**(SIX_STAGES if full_size else {}))),
        transformer=centered(randomize(transformer)),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(pipe, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder
