"""The stand-ins for text encoder and autoencoder."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from einops import EinopsError

from sprint_jax.core.errors import UserError
from sprint_jax.digits.encoders import SpaceToDepth, WordEncoder
from sprint_jax.digits.scenes import draw_images, held_out_prompts
from sprint_jax.digits.worlds import WORLDS


def test_word_order_is_visible_and_words_are_told_apart():
    text, mask = WordEncoder().encode(["a 3 left of a 7", "a 7 left of a 3"])
    assert text.shape == (2, 12, 64) and text.dtype == np.float32 and mask.dtype == np.int32
    assert mask.tolist() == [[1] * 7 + [0] * 5] * 2
    assert (text[:, 7:] == 0).all()
    # As sets of tokens, which is all that cross-attention sees, the two sentences differ: a token
    # knows the words before it, and not those after.
    gaps = np.abs(text[0, :7, None] - text[1, None, :7]).max(-1).min(1)
    assert (gaps[:2] == 0).all() and (gaps[2:] > 0.3).all()


def test_a_plural_is_its_noun_and_a_token_more_and_the_null_prompt_one_token():
    text, mask = WordEncoder().encode(["two 3s on blue", "two 3", "two 3 s on blue", ""])
    assert mask.sum(1).tolist() == [6, 3, 6, 1]
    np.testing.assert_array_equal(text[0, :3], text[1, :3])
    np.testing.assert_array_equal(text[0], text[2])
    np.testing.assert_array_equal(text[0, 0], text[3, 0])


def test_encoders_agree_for_a_seed_and_differ_between_seeds():
    first, again, other = (WordEncoder(seed=seed).encode(["a 3"])[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.5
    # Checkpoints rely on the vectors of seed 0.
    np.testing.assert_allclose(first[0, :3, 0], [2.4007993, 0.39086136, -0.734763], rtol=1e-5)
    # The token of a digit holds the colour before it.
    red, blue = WordEncoder().encode(["a red 3", "a blue 3"])[0][:, 3]
    assert np.abs(red - blue).mean() > 0.2


@pytest.mark.parametrize(
    ("captions", "names"),
    [
        (["a 3", "a rad 3"], ["'rad'", "'a rad 3'", "'red'"]),
        (["a " * 12], ["12", "11"]),
        ("a 3", ["'a 3'"]),
    ],
)
def test_wrong_captions_are_refused(captions, names):
    with pytest.raises(UserError) as error:
        WordEncoder().encode(captions)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("factor", [2, 4])
def test_space_to_depth_is_exact(array, factor):
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 8, 16, 3)).astype(np.float32)
    autoencoder = SpaceToDepth(factor=factor, scaling_factor=2.0)  # a power of two: exact
    latents = autoencoder.encode(array(pixels))
    assert type(latents) is type(array(pixels)) and latents.dtype == np.float32
    assert latents.shape == (2, 8 // factor, 16 // factor, 3 * factor**2)
    np.testing.assert_array_equal(autoencoder.decode(latents), pixels)
    # One latent pixel holds one block of pixels.
    block = pixels[1, factor : 2 * factor, 0:factor].ravel() * 2
    np.testing.assert_array_equal(np.asarray(latents)[1, 1, 0], block)


@pytest.mark.parametrize("world", WORLDS)
def test_latents_of_the_world_have_about_unit_variance(world):
    prompts = held_out_prompts(world, 600, seed=0)
    latents = SpaceToDepth().encode(draw_images(world, prompts, "train", seed=0))
    assert latents.dtype == np.float32
    assert 0.9 < latents.std() < 1.1 and abs(latents.mean()) < 0.05


@pytest.mark.parametrize("shape", [(2, 8, 8, 4), (8, 8, 3)])
def test_wrong_shapes_are_refused(shape):
    for run in SpaceToDepth().encode, SpaceToDepth().decode:
        with pytest.raises(AssertionError, match=re.escape(str(shape))):
            run(np.zeros(shape, np.float32))
    with pytest.raises(EinopsError):
        SpaceToDepth().encode(np.zeros((2, 7, 8, 3)))
