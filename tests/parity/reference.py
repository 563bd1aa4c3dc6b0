"""Reference models of diffusers and transformers with random weights, at sizes that tests can afford."""

import json
from collections.abc import Iterable

import tokenizers
import torch
from diffusers import AutoencoderDC
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

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

TINY_GEMMA2 = dict(
    vocab_size=600,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    attn_logit_softcapping=5.0,
    rope_theta=500.0,
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


def channels_first(array) -> torch.Tensor:
    return torch.tensor(array).permute(0, 3, 1, 2)


def channels_last(tensor: torch.Tensor):
    return tensor.permute(0, 2, 3, 1).numpy()
