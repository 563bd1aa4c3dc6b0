"""Control branches: both wirings against diffusers' blocks, its files and NVlabs', and whole pipelines.

Errors are max|a - b| / max|b|, float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaControlNetModel, SanaControlNetPipeline
from helpers.compare import assert_same, relative_error
from helpers.reference import (
    channels_first,
    channels_last,
    randomize_scaled,
    same_weights,
    sana_inputs,
    tiny_sana,
)
from helpers.tiny_pipeline import PROMPTS, centered, saved, tiny_pipeline
from PIL import Image

from sprint_jax import SprintPipeline
from sprint_jax.checkpoints.weights import find_branch, find_weights
from sprint_jax.core.errors import UserError
from sprint_jax.interop import diffusers, nvlabs
from sprint_jax.interop.sana import control_config, control_table
from sprint_jax.models.control import Control
from sprint_jax.models.sana import SIZES, SanaTransformer

pytestmark = pytest.mark.usefixtures("quick")

TRUNK = {"qk_norm": None, "timestep_scale": 1.0, "num_layers": 4}
SHAPES = ("in_channels", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads")
SHAPES += ("cross_attention_head_dim", "cross_attention_dim", "caption_channels", "mlp_ratio")
SHAPES += ("patch_size", "sample_size", "interpolation_scale", "attention_bias")
PATCHES = {"patch_size": 2, "interpolation_scale": 1.0, "attention_bias": True}


def tiny_control(trunk, blocks=2, seed=1):
    """A control network for a trunk, random everywhere, also where a new one is zero."""
    fields = {key: trunk.config[key] for key in SHAPES}
    return randomize_scaled(SanaControlNetModel(num_layers=blocks, **fields), seed)


@pytest.fixture
def pair(tmp_path, request):
    """A trunk and its control network, and what we load of their folders."""
    trunk = tiny_sana(**(TRUNK | getattr(request, "param", {})))
    control = tiny_control(trunk)
    trunk.save_pretrained(tmp_path / "transformer")
    control.save_pretrained(tmp_path / "controlnet")
    fields, params = diffusers.load_transformer(tmp_path / "transformer")
    fields, branch = diffusers.load_control(tmp_path / "controlnet", fields)
    return trunk, control, fields, params | {"control": branch}


def velocity(fields, params, inputs, latents, scale):
    def run(params, inputs, control):
        return SanaTransformer(**fields).apply({"params": params}, *inputs, control=control)

    return np.asarray(jax.jit(run)(params, inputs, Control(latents, jnp.asarray(scale))))


def drawn(fields, size):
    *inputs, _ = sana_inputs(fields, size)
    return inputs, np.random.default_rng(5).normal(size=inputs[0].shape).astype(np.float32)


def in_torch(inputs, latents):
    x, t, text, mask = inputs
    text, times, mask = torch.tensor(text), torch.tensor(t) * 1000, torch.tensor(mask)
    return channels_first(x), text, times, mask, channels_first(latents)


@pytest.mark.parametrize("pair", [{}, PATCHES], ids=["plain", "patches"], indirect=True)
def test_diffusers_wiring(pair):
    trunk, control, fields, params = pair
    inputs, latents = drawn(fields, (6, 4))
    x, text, times, mask, condition = in_torch(inputs, latents)
    for scale in (1.0, 0.4):
        with torch.no_grad():
            how = dict(encoder_attention_mask=mask, timestep=times, return_dict=False)
            residuals = control(
                x, text, controlnet_cond=condition, conditioning_scale=scale, **how
            )[0]
            expected = channels_last(trunk(x, text, controlnet_block_samples=residuals, **how)[0])
        found = velocity(fields, params, inputs, latents, scale)
        assert relative_error(found, expected) < 2e-5
    other = velocity(fields, params, inputs, -latents, scale)
    assert relative_error(other, expected) > 0.01


def test_published_wiring(pair):
    """From the formulas, with the reference's blocks: the residual comes before the next block, the stream
    begins behind block 0, and all embedders are the trunk's."""
    trunk, control, fields, params = pair
    branch = {key: params["control"][key] for key in ("before_proj", "transformer_blocks")}
    fields, params = fields | {"control_wiring": "nvlabs"}, params | {"control": branch}
    inputs, latents = drawn(fields, (5, 3))
    x, text, times, mask, condition = in_torch(inputs, latents)
    scale, size = 0.7, (5, 3)
    with torch.no_grad():
        h, c = trunk.patch_embed(x), trunk.patch_embed(condition)
        t6, embedded = trunk.time_embed(times, hidden_dtype=torch.float32)
        y = trunk.caption_norm(trunk.caption_projection(text))
        bias = ((1 - mask.float()) * -10000.0)[:, None]
        rest = None, y, bias, t6, *size
        h = trunk.transformer_blocks[0](h, *rest)
        for i in range(1, len(trunk.transformer_blocks)):
            if i <= len(control.transformer_blocks):
                entry = h + control.input_block(c) if i == 1 else c
                c = control.transformer_blocks[i - 1](entry, *rest)
                h = h + scale * control.controlnet_blocks[i - 1](c)
            h = trunk.transformer_blocks[i](h, *rest)
        shift, gain = (trunk.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        out = trunk.proj_out(trunk.norm_out.norm(h) * (1 + gain) + shift)
    expected = out.reshape(len(out), *size, -1).numpy()
    found = velocity(fields, params, inputs, latents, scale)
    assert relative_error(found, expected) < 2e-5
    # Each of the two places where the wirings part is seen.
    other = dict(fields) | {"control_wiring": "diffusers"}
    shared = branch | {
        k: params[k] for k in ("patch_embed", "time_embed", "caption_projection", "caption_norm")
    }
    assert (
        relative_error(velocity(other, params | {"control": shared}, inputs, latents, scale), found)
        > 0.01
    )


# --- Files


@pytest.mark.parametrize("size", ["sana-600m", "sana-1600m"])
def test_true_names_and_shapes(size):
    fields = SIZES[size] | {"control_blocks": 7, "control_wiring": "diffusers"}
    with torch.device("meta"):
        state = SanaControlNetModel(**control_config(fields)).state_dict()
    shapes = {name: entry.shape for name, entry in control_table(fields).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("pair", [PATCHES], indirect=True)
def test_folders_of_diffusers_both_ways(pair, tmp_path):
    trunk, control, fields, params = pair
    diffusers.save_control(tmp_path / "ours", fields, params)
    again = SanaControlNetModel.from_pretrained(tmp_path / "ours")
    same_weights(control, again)
    ours = {key: value for key, value in again.config.items() if key[0] != "_"}
    assert ours | {"out_channels": 4} == {
        k: v for k, v in control.config.items() if k[0] != "_"
    } | {"out_channels": 4}
    # A branch of the published wiring shares the trunk's embedders, which the class holds a copy of.
    shared = {key: params["control"][key] for key in ("before_proj", "transformer_blocks")}
    diffusers.save_control(
        tmp_path / "shared", fields | {"control_wiring": "nvlabs"}, params | {"control": shared}
    )
    copied = SanaControlNetModel.from_pretrained(tmp_path / "shared").state_dict()
    assert torch.equal(
        copied["time_embed.linear.weight"], trunk.state_dict()["time_embed.linear.weight"]
    )
    assert torch.equal(copied["input_block.weight"], control.state_dict()["input_block.weight"])
    assert find_branch(str(tmp_path / "ours"), fields).fields == fields


def test_a_file_of_nvlabs_holds_trunk_and_branch(pair, tmp_path):
    _, _, fields, params = pair
    fields = fields | {"control_wiring": "nvlabs", "qk_norm": False}
    shared = {key: params["control"][key] for key in ("before_proj", "transformer_blocks")}
    params, path = params | {"control": shared}, tmp_path / "model.pth"
    nvlabs.save_transformer(path, fields, params)
    state = torch.load(path, weights_only=True)["state_dict"]
    names = [name.removeprefix("controlnet.") for name in state if name.startswith("controlnet.")]
    assert len(names) == 2 + 2 * (15 + 2) and "0.before_proj.bias" in names
    kv = state["controlnet.1.copied_block.cross_attn.kv_linear.weight"]
    np.testing.assert_array_equal(
        kv[24:], shared["transformer_blocks"]["attn2"]["to_v"]["kernel"][1].T
    )
    found, loaded = nvlabs.load_transformer(path, SIZES["digits"] | fields | {"control_blocks": 0})
    assert (found["control_blocks"], found["control_wiring"]) == (2, "nvlabs")
    assert_same(loaded, params)
    like = fields | {"control_blocks": 0}
    assert_same(find_branch(str(path), like).load(), shared)
    assert find_weights(str(path), like).fields["control_blocks"] == 2
    del state["controlnet.1.after_proj.bias"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match=r"controlnet\.1\.after_proj\.bias"):
        nvlabs.load_transformer(path, fields)


def test_what_a_class_cannot_hold_is_refused(pair, tmp_path):
    _, control, fields, params = pair
    for change, word in (({"qk_norm": True}, "QK norm"), ({"control_blocks": 0}, "control_blocks")):
        with pytest.raises(UserError, match=word):
            diffusers.save_control(tmp_path / "new", fields | change, params)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="own"):
        nvlabs.to_nvlabs(params, fields)
    control.save_pretrained(tmp_path / "theirs")
    for change, word in (
        ({"qk_norm": True}, "QK norm"),
        (
            {"num_attention_heads": 1, "attention_head_dim": 24},
            "num_attention_heads|attention_head_dim",
        ),
        ({"num_layers": 2}, "control_blocks"),
    ):
        with pytest.raises(UserError, match=word):
            diffusers.load_control(tmp_path / "theirs", fields | {"control_blocks": 0} | change)


# --- Whole pipelines


def test_latents_of_a_whole_pipeline(tmp_path):
    """Twenty guided steps of DPM-Solver++ under a control image, which both halves of guidance see."""
    plain = tiny_pipeline(student=False)
    changes = {"num_layers": 3, "timestep_scale": 1.0, "qk_norm": None}
    shapes = {key: plain.transformer.config[key] for key in SHAPES}
    trunk = centered(tiny_sana(**shapes, **changes))
    control = centered(tiny_control(trunk))
    parts = plain.components | {"transformer": trunk, "controlnet": control}
    pipe = SanaControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    mine = SprintPipeline.from_pretrained(saved(pipe, tmp_path / "pipe"))
    assert (mine.model.control_blocks, mine.model.control_wiring) == (2, "diffusers")
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (32, 64, 3), dtype=np.uint8))
    noise = torch.randn((len(PROMPTS), 4, 8, 16), generator=torch.Generator().manual_seed(1))
    how = dict(height=32, width=64, use_resolution_binning=False, output_type="latent")
    reference = pipe(
        PROMPTS,
        control_image=image,
        controlnet_conditioning_scale=0.8,
        num_inference_steps=20,
        guidance_scale=4.5,
        latents=noise,
        **how,
    ).images
    latents = mine.encode_control(image, 32, 64)
    text = mine.encode_text(PROMPTS)
    given = dict(steps=20, guidance=4.5, control_scale=0.8)
    control = jnp.broadcast_to(latents, (len(PROMPTS), *latents.shape[1:]))
    found = mine.denoise(*text, channels_last(noise), control=control, **given)
    assert relative_error(found, channels_last(reference)) < 2e-5
    free = mine.denoise(*text, channels_last(noise), **given)
    assert relative_error(free, found) > 0.01
