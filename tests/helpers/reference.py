"""Reference models of diffusers and transformers with random weights, at sizes that tests can afford."""

import json
from collections.abc import Iterable

import numpy as np
import tokenizers
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock")
TINY_DC_AE = dict(
    in_channels=3, latent_channels=4, attention_head_dim=4, upsample_block_type="interpolate"
)
for half in ("encoder", "decoder"):
    TINY_DC_AE |= {f"{half}_block_types": BLOCKS, f"{half}_block_out_channels": (8, 8, 16)}
    TINY_DC_AE[f"{half}_qkv_multiscales"] = ((), (), (5,))
TINY_DC_AE |= dict(encoder_layers_per_block=(1, 2, 1), decoder_layers_per_block=(2, 1, 1))
TINY_DC_AE |= dict(downsample_block_type="Conv", scaling_factor=0.41407)

TINY_SANA = dict(in_channels=4, out_channels=4, caption_channels=10, sample_size=8, num_layers=3)
TINY_SANA |= dict(num_attention_heads=3, attention_head_dim=8, cross_attention_dim=24)
TINY_SANA |= dict(num_cross_attention_heads=2, cross_attention_head_dim=12)
TINY_SANA |= dict(qk_norm="rms_norm_across_heads", timestep_scale=0.001)

TINY_GEMMA2 = dict(vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
TINY_GEMMA2 |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=500.0)
TINY_GEMMA2 |= dict(query_pre_attn_scalar=8, attn_logit_softcapping=5.0)


def randomize(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Draws every parameter anew, so that norms and biases are far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + 0.2)
    return model.eval()


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


def tiny_dc_ae(**changes) -> AutoencoderDC:
    return randomize(AutoencoderDC(**(TINY_DC_AE | changes)))


def tiny_sana(seed: int = 0, **changes) -> SanaTransformer2DModel:
    return randomize_scaled(SanaTransformer2DModel(**(TINY_SANA | changes)), seed)


def tiny_gemma2(**changes) -> Gemma2Model:
    model = randomize(Gemma2Model(Gemma2Config(**(TINY_GEMMA2 | changes))))
    with torch.no_grad():
        for module in model.modules():
            # A mean other than 0 would make keys alike, and attention nearly uniform.
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.sub_(0.2)
    return model


def tiny_tokenizer(texts: Iterable[str], vocab_size: int = TINY_GEMMA2["vocab_size"]):
    """A GemmaTokenizer trained on texts: byte-pair encoding with a token for every byte, where spaces
    begin words and nothing else parts them."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(first), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = first + sorted(model["vocab"], key=model["vocab"].get)
    return GemmaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=True,
        add_eos_token=False,
    )


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Both models have the same tensors, bit for bit."""
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(one[name].dtype == two[name].dtype for name in one)


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
