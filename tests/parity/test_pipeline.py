"""Whole pipelines from folders that diffusers wrote, against its own pictures, float32.

Errors of latents are max|a - b| / max|b|; observed at most 3e-6.
"""

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from helpers.reference import channels_first, channels_last
from helpers.tiny_pipeline import PROMPTS, saved, tiny_pipeline
from PIL import Image

from sprint_jax import SprintPipeline
from sprint_jax.core import pixels as pictures
from sprint_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = dict(height=32, width=64)
SHAPE = (8, 16, 4)
PUBLISHED = dict(guidance_scale=4.5, use_resolution_binning=False, **SIZE)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    pipe = tiny_pipeline(student=True)
    return pipe, SprintPipeline.from_pretrained(saved(pipe, tmp_path_factory.mktemp("student")))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    pipe = tiny_pipeline(student=False)
    return pipe, SprintPipeline.from_pretrained(saved(pipe, tmp_path_factory.mktemp("teacher")))


def relative_error(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def draw(count, generator):
    return torch.randn((count, SHAPE[2], *SHAPE[:2]), generator=generator)


def noises(steps):
    """Noise and renoising as a pipeline with this generator's seed sees them, in torch's layout."""
    noise = draw(len(PROMPTS), torch.Generator().manual_seed(1))
    later = torch.Generator().manual_seed(2)
    return noise, [draw(len(PROMPTS), later) for _ in range(steps - 1)]


def theirs(pipe, steps, **how):
    midpoint = 1.3 if steps == 2 else None
    generator = torch.Generator().manual_seed(2)
    return pipe(
        PROMPTS,
        num_inference_steps=steps,
        intermediate_timesteps=midpoint,
        generator=generator,
        **PUBLISHED,
        **how,
    ).images


def ours(pipe, steps):
    text, mask = pipe.encode_text(PROMPTS)
    noise, later = noises(steps)
    step_noise = np.stack([channels_last(z) for z in later]) if later else None
    return pipe.denoise(
        text, mask, channels_last(noise), steps=steps, guidance=4.5, step_noise=step_noise
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_students_latents(student, steps):
    reference = theirs(student[0], steps, latents=noises(steps)[0], output_type="latent")
    assert relative_error(ours(student[1], steps), channels_last(reference)) < 1e-4


@pytest.mark.parametrize("steps", [1, 2])
def test_students_pictures(student, steps):
    reference = theirs(student[0], steps, latents=noises(steps)[0], output_type="pil")
    reference = np.stack([np.asarray(image, np.int32) for image in reference])
    found = pictures.to_bytes(np.asarray(student[1].decode(ours(student[1], steps))))
    difference = np.abs(found.astype(np.int32) - reference)
    assert reference.std() > 20 and ((reference > 0) & (reference < 255)).mean() > 0.1
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


def test_teachers_latents(teacher):
    """Twenty steps of DPM-Solver++ with guidance away from a prompt that is not empty."""
    noise = noises(1)[0]
    reference = teacher[0](
        PROMPTS,
        negative_prompt=["a Blue bird"] * len(PROMPTS),
        num_inference_steps=20,
        latents=noise,
        output_type="latent",
        **PUBLISHED,
    ).images
    text, mask = teacher[1].encode_text(PROMPTS)
    found = teacher[1].denoise(
        text, mask, channels_last(noise), steps=20, guidance=4.5, negative="a Blue bird"
    )
    # Twenty guided steps amplify rounding: observed 2e-5.
    assert relative_error(found, channels_last(reference)) < 1e-4


@pytest.mark.parametrize("steps, strength", [(2, 0.5), (4, 0.5), (3, 0.4), (4, 0.75), (2, 1.0)])
def test_images_to_images(student, steps, strength):
    pipe, mine = student
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (len(PROMPTS), 32, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(row) for row in rows]
    schedule = mine.schedule(steps, strength=strength)
    generator = torch.Generator().manual_seed(3)
    reference = diffusers.SanaSprintImg2ImgPipeline(**pipe.components)(
        PROMPTS,
        image=images,
        strength=strength,
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        generator=generator,
        output_type="latent",
        **PUBLISHED,
    ).images
    generator = torch.Generator().manual_seed(3)
    noise, *later = (channels_last(draw(len(PROMPTS), generator)) for _ in range(len(schedule) - 1))
    text, mask = mine.encode_text(PROMPTS)
    start = mine.autoencoder.encode(pictures.to_pixels(images, len(images), 32, 64))
    found = mine.denoise(
        text,
        mask,
        noise,
        steps=steps,
        guidance=4.5,
        step_noise=np.stack(later) if later else None,
        start=start,
        strength=strength,
    )
    assert relative_error(found, channels_last(reference)) < 1e-4


@pytest.mark.parametrize("size", [(512, 512), (720, 1280), (1000, 600), (300, 2048), (1, 9)])
def test_sizes_of_1024_pixel_models(size):
    classify = diffusers.image_processor.PixArtImageProcessor.classify_height_width_bin
    assert pictures.nearest_size(*size) == classify(*size, ratios=ASPECT_RATIO_1024_BIN)


def test_a_picture_of_any_shape_from_a_1024_pixel_model(tmp_path):
    pipe = tiny_pipeline(student=True, full_size=True)
    mine = SprintPipeline.from_pretrained(saved(pipe, tmp_path))
    assert mine.size == (1024, 1024)
    size = dict(height=320, width=512)
    found = mine(PROMPTS[:1], steps=1, seed=5, binning=True, **size)[0]
    assert found.size == (512, 320)
    shape = mine.latent_shape(*pictures.nearest_size(320, 512))
    assert shape == (24, 40, 4)
    noise, _ = mine.draw_noise(5, np.arange(1), shape, 1)
    reference = pipe(
        PROMPTS[:1],
        num_inference_steps=1,
        intermediate_timesteps=None,
        latents=channels_first(np.asarray(noise)),
        **size,
    ).images[0]
    difference = np.abs(np.asarray(found, np.int32) - np.asarray(reference, np.int32))
    assert np.asarray(reference).std() > 20
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize("size", [(20, 30), (64, 96), (7, 60), (40, 12), (90, 70)])
def test_resizing(size):
    pixels = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    crop = diffusers.image_processor.PixArtImageProcessor.resize_and_crop_tensor
    expected = channels_last(crop(channels_first(pixels), size[1], size[0]))
    assert relative_error(pictures.resize_and_crop(pixels, *size), expected) < 1e-5


def test_parameters_split_over_a_mesh_draw_the_same(student, tmp_path):
    folder = saved(student[0], tmp_path)
    split = SprintPipeline.from_pretrained(folder, mesh=make_mesh(data=2, fsdp=4))
    leaf = split.params["transformer_blocks"]["ff"]["conv_inverted"]["kernel"]
    assert leaf.sharding.shard_shape(leaf.shape)[-1] == leaf.shape[-1] // 4
    assert len(jax.tree.leaves(split.params)[0].devices()) == 8
    assert relative_error(ours(split, 2), np.asarray(ours(student[1], 2))) < 1e-5
