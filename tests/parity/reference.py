"""Reference models of diffusers with random weights, at sizes that tests can afford."""

import numpy as np
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel

TINY_DC_AE = dict(
    in_channels=3,
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(8, 8, 16),
    decoder_block_out_channels=(8, 8, 16),
    encoder_layers_per_block=(1, 2, 1),
    decoder_layers_per_block=(2, 1, 1),
    encoder_qkv_multiscales=((), (), (5,)),
    decoder_qkv_multiscales=((), (), (5,)),
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    scaling_factor=0.41407,
)

TINY_SANA = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=3,
    attention_head_dim=8,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=10,
    sample_size=8,
    qk_norm="rms_norm_across_heads",
    timestep_scale=0.001,
)


def randomize(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Draws every parameter anew, so that norms and biases are far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + 0.2)
    return model.eval()


def tiny_dc_ae(**changes) -> AutoencoderDC:
    return randomize(AutoencoderDC(**(TINY_DC_AE | changes)))


def randomize_scaled(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter anew: kernels keep the scale of activations, so that no branch of a deep
    model drowns the others, and the rest is 0.4 to 1.6 of either sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            new = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and name.endswith("weight"):
                parameter.copy_(new / parameter[0].numel() ** 0.5)
            else:
                size = torch.rand(parameter.shape, generator=generator) * 1.2 + 0.4
                parameter.copy_(size * new.sign())
    return model.eval()


def tiny_sana(seed: int = 0, **changes) -> SanaTransformer2DModel:
    return randomize_scaled(SanaTransformer2DModel(**(TINY_SANA | changes)), seed)


def channels_first(array) -> torch.Tensor:
    return torch.tensor(array).permute(0, 3, 1, 2)


def channels_last(tensor: torch.Tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


def sana_inputs(fields: dict, size: tuple[int, int], seed: int = 0, tokens: int = 10) -> tuple:
    """Inputs of SanaTransformer: three samples, whose texts are 1, 7 and all tokens long."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(3, *size, fields["in_channels"])).astype(np.float32)
    t = np.array([0.2, 0.7, 1.0000036], np.float32)
    text = random.normal(size=(3, tokens, fields["caption_channels"])).astype(np.float32)
    mask = (np.arange(tokens)[None] < np.array([1, 7, tokens])[:, None]).astype(np.int32)
    guidance = np.array([0.4, 0.45, 0.5], np.float32) if fields.get("guidance_embeds") else None
    return x, t, text, mask, guidance


def sana_velocity(model: SanaTransformer2DModel, x, t, text, mask, guidance) -> np.ndarray:
    """Diffusers' output; its pipelines show a network with guidance the flow time itself."""
    scale = 1.0 if guidance is not None else 1000 * model.config.timestep_scale
    with torch.no_grad():
        out = model(
            channels_first(x).to(model.dtype),
            torch.tensor(text).to(model.dtype),
            timestep=torch.tensor(t) * scale,
            guidance=None if guidance is None else torch.tensor(guidance),
            encoder_attention_mask=torch.tensor(mask),
        ).sample
    return channels_last(out.float())
