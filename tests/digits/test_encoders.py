"""The stand-ins for text encoder and autoencoder."""

import jax.numpy as jnp
import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.digits import scenes as digits
from sprint_jax.digits.captions import COLORS, DIGITS, vocabulary
from sprint_jax.digits.encoders import SpaceToDepth, WordEncoder


def test_word_order_is_visible_and_words_are_told_apart():
    encoder = WordEncoder()
    text, mask = encoder.encode(["a 3 left of a 7", "a 7 left of a 3", "a 3 left of a 7"])
    assert text.shape == (3, 12, 64) and text.dtype == np.float32
    assert mask.shape == (3, 12) and mask.dtype == np.int32
    np.testing.assert_array_equal(mask[0], [1] * 7 + [0] * 5)
    np.testing.assert_array_equal(text[0], text[2])
    assert (text[:, 7:] == 0).all()
    # As sets of tokens, which is all that cross-attention sees, the two sentences differ: a token
    # knows the words before it, and not those after.
    gaps = np.abs(text[0, :7, None] - text[1, None, :7]).max(-1).min(1)
    assert (gaps[:2] == 0).all() and (gaps[2:] > 0.3).all()


def test_a_token_tells_the_color_said_before_it_from_one_said_elsewhere():
    encoder = WordEncoder()
    text, _ = encoder.encode(
        ["a red 3 and a blue 7", "a blue 3 and a red 7", "a red 3 and a red 7"]
    )
    three, seven = text[:, 3], text[:, 7]
    near, far = np.abs(three[0] - three[1]).mean(), np.abs(seven[0] - seven[2]).mean()
    assert near > 0.2 and far > 0.2
    np.testing.assert_array_equal(three[0], three[2])
    # The first colour has faded by the second digit.
    assert np.abs(seven[1] - seven[2]).mean() < far / 5


def test_a_plural_is_its_noun_and_a_token_more():
    text, mask = WordEncoder().encode(["two 3s on blue", "two 3", "two 3 s on blue"])
    assert mask.sum(1).tolist() == [6, 3, 6]
    np.testing.assert_array_equal(text[0, :3], text[1, :3])
    np.testing.assert_array_equal(text[0], text[2])


def test_words_of_a_kind_are_alike_and_yet_apart():
    def likeness(words):  # mean correlation of different words in the same place
        tokens = WordEncoder().encode([f"a {word}" for word in words])[0][:, 2]
        return np.corrcoef(tokens)[np.triu_indices(len(words), 1)]

    # Position and the word before make up 0.16 + 0.84 * 0.25 of the variance; a kind 0.84 * 0.75 * 0.3.
    # The spread of a correlation of 64 features is 0.12 and less; 0.37 expected without a kind.
    plain, digits_alone = likeness(["and", "on", "two", "left"]), likeness(DIGITS)
    assert 0.2 < plain.mean() < 0.5 < digits_alone.mean() < 0.7
    assert digits_alone.max() < 0.85 and abs(likeness(COLORS).mean() - 0.56) < 0.1


def test_features_have_unit_variance():
    words = vocabulary()
    text, mask = WordEncoder().encode([" ".join(words[k : k + 11]) for k in range(20)])
    # One frozen draw: 0.985 and -0.051 measured; the mean of such draws has a spread of 0.03.
    assert abs(text[mask > 0].std() - 1) < 0.05
    assert abs(text[mask > 0].mean()) < 0.1


def test_the_null_prompt_is_one_begin_token():
    text, mask = WordEncoder().encode(["", "a 3"])
    assert mask[0].tolist() == [1] + [0] * 11
    np.testing.assert_array_equal(text[0, 0], text[1, 0])


def test_encoders_agree_for_a_seed_and_differ_between_seeds():
    def encode(seed):
        return WordEncoder(seed=seed).encode(["a 3"])[0]

    np.testing.assert_array_equal(encode(0), encode(0))
    assert np.abs(encode(0) - encode(1)).max() > 0.5
    # Checkpoints rely on the vectors of seed 0.
    np.testing.assert_allclose(encode(0)[0, :3, 0], FIRST_FEATURES, rtol=1e-5)


FIRST_FEATURES = [2.4007993, 0.39086136, -0.734763]


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (
            ["a 3", "a rad 3"],
            "word 'rad' of caption 'a rad 3' is unknown: the nearest known is 're",
        ),
        (["a " * 12], "has 12 tokens: use at most 11"),
        ("a 3", "must be a list of sentences"),
    ],
)
def test_errors_of_the_word_encoder(captions, message):
    with pytest.raises(UserError, match=message):
        WordEncoder().encode(captions)


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


@pytest.mark.parametrize("world", list(digits.WORLDS))
def test_latents_of_the_world_have_about_unit_variance(world):
    prompts = digits.held_out_prompts(world, 600, seed=0)
    latents = SpaceToDepth().encode(digits.draw_images(world, prompts, "train", seed=0))
    assert latents.dtype == np.float32
    assert 0.9 < latents.std() < 1.1
    assert abs(latents.mean()) < 0.05


@pytest.mark.parametrize("shape", [(2, 7, 8, 3), (2, 8, 8, 4), (8, 8, 3)])
def test_errors_of_space_to_depth(shape):
    with pytest.raises(UserError, match="pixels have shape"):
        SpaceToDepth().encode(np.zeros(shape, np.float32))
    with pytest.raises(UserError, match=r"latents have shape .*: give \[B,h,w,12\]"):
        SpaceToDepth().decode(np.zeros(shape, np.float32))
