"""LADD heads against a derivation in torch, whose own spectral norm keeps the weights, and their files.

Errors are max|a - b| / max|b|. Observed: at most 5e-7.
"""

import numpy as np
import pytest
import torch
from helpers.compare import assert_close, assert_same
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import spectral_norm

from sprint_jax.interop.discriminator import load_heads, save_heads
from sprint_jax.models.discriminator import DiscriminatorHeads, update_spectral

WIDTH, LIMIT = 12, 2e-5


class GroupNorm(nn.BatchNorm1d):
    """Tokens [B, d, N] normalized over the tokens of up to eight samples, channel by channel."""

    def forward(self, x):
        return torch.cat([super(GroupNorm, self).forward(part) for part in x.split(8)])


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return (self.fn(x) + x) / 2**0.5


class Head(nn.Module):
    def __init__(self, width):
        super().__init__()

        def stage(kernel_size):
            how = dict(padding=kernel_size // 2, padding_mode="circular")
            conv = nn.Conv1d(width, width, kernel_size, **how)
            norm = GroupNorm(width, track_running_stats=False)
            return nn.Sequential(spectral_norm(conv), norm, nn.LeakyReLU(0.2))

        self.main = nn.Sequential(stage(1), Residual(stage(9)))
        self.cls = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x):
        return self.cls(self.main(x))[:, 0]


@pytest.fixture
def heads():
    torch.manual_seed(0)
    heads = nn.ModuleList(Head(WIDTH) for _ in range(3))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5 + 0.2)
    return heads.train()


def draw(batch):
    random = np.random.default_rng(0)
    return tuple(random.normal(size=(batch, 3, 5, WIDTH)).astype(np.float32) for _ in range(3))


def theirs(heads, features):
    """Logits [B, heads * tokens]."""
    tokens = [torch.tensor(f).flatten(1, 2).transpose(1, 2) for f in features]
    with torch.no_grad():
        return torch.cat([head(x) for head, x in zip(heads, tokens, strict=True)], 1).numpy()


def ours(loaded, features):
    return DiscriminatorHeads().apply({"params": loaded["params"]}, features, loaded["spectral"])


@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("form", ["NVlabs", "script"])
def test_logits(tmp_path, heads, batch, form):
    features = draw(batch)
    theirs(heads.train(), features)  # moves the vectors of the spectral norm, as a D step does
    path = tmp_path / "heads.pth"
    state = heads.state_dict()
    if form == "NVlabs":
        state = {"state_dict": {f"heads.{name}": tensor for name, tensor in state.items()}}
    torch.save(state, path)
    loaded = load_heads(path)
    assert_close(ours(loaded, features), theirs(heads.eval(), features), LIMIT)
    # One step of training in both: the vectors of one power iteration, and logits with them.
    moved = loaded | {"spectral": update_spectral(loaded["params"], loaded["spectral"])}
    assert_close(ours(moved, features), theirs(heads.train(), features), LIMIT)
    if form == "script":
        torch.save(heads.state_dict(), path)
        assert_close(moved, load_heads(path), LIMIT)


def test_our_file_is_theirs(tmp_path, heads):
    torch.save(heads.state_dict(), tmp_path / "disc_heads.pt")
    loaded = load_heads(tmp_path / "disc_heads.pt")
    save_heads(tmp_path / "heads.safetensors", loaded)
    assert_same(loaded, load_heads(tmp_path / "heads.safetensors"))
    state = load_file(tmp_path / "heads.safetensors")
    state = {name.removeprefix("heads."): tensor for name, tensor in state.items()}
    assert state.keys() == heads.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in heads.state_dict().items())
    heads.load_state_dict(state)
