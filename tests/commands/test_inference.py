"""From prompts to pictures with the true kinds of networks: how many programs run, and what they draw."""

import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.workdirs import random_params, tiny_config

from sprint_jax import SprintPipeline
from sprint_jax.encoders.autoencoder import Autoencoder
from sprint_jax.encoders.load import open_text_encoder
from sprint_jax.encoders.text import TextEncoder, load_tokenizer
from sprint_jax.interop.diffusers import load_autoencoder
from sprint_jax.interop.gemma2 import load_text_encoder
from sprint_jax.models.sana import from_fields

pytestmark = pytest.mark.usefixtures("quick")

STORED = Path(__file__).parents[1] / "parity" / "stored"


@pytest.fixture(scope="module")
def parts():
    """Networks of the published kinds, tiny: arguments of `pipeline`."""
    gemma, words = load_text_encoder(STORED / "gemma2" / "text_encoder")
    config, weights = load_autoencoder(STORED / "dc_ae")
    fields = dict(tiny_config("distill")["model"]) | {"caption_channels": gemma.hidden_size}
    fields |= dict.fromkeys(("in_channels", "out_channels"), config.latent_channels)
    return (gemma, words), (config, weights), fields, random_params(fields, 1)


def pipeline(parts, arranged: bool) -> SprintPipeline:
    text, image, fields, params = parts
    tokenizer = load_tokenizer(STORED / "gemma2" / "tokenizer")
    encoder = TextEncoder(*text, tokenizer, length=12, arranged=arranged)
    autoencoder = Autoencoder(*image, arranged=arranged)
    size = (4 * autoencoder.factor,) * 2
    how = dict(is_student=True, sigma_d=0.5, shift=1.0, midpoint=1.3, guidance=3.0, size=size)
    model = from_fields(fields)
    return SprintPipeline(model, params, autoencoder, encoder, arranged=arranged, **how)


def test_a_text_encoder_in_the_hosts_memory_gives_the_same_features(parts):
    gemma, _ = parts[0]
    tokenizer = load_tokenizer(STORED / "gemma2" / "tokenizer")
    how = dict(length=12, batch_size=1)
    usual, frugal = (
        open_text_encoder(STORED / "gemma2", tokenizer, "float32", None, on_host=each, **how)
        for each in (False, True)
    )
    # Nothing of it is an array of a device, before and after it is used; nor where its layers are apart.
    apart, placed = (
        TextEncoder(gemma, frugal.params, tokenizer, arranged=True, on_host=each, **how)
        for each in (True, False)
    )
    prompts = ["a cat", "a dog", "a cat"]  # two batches
    expected = usual.encode(prompts)[0]
    for encoder in (frugal, apart, placed):
        for encode in (encoder.encode, encoder.encode_ahead):
            np.testing.assert_allclose(encode(prompts)[0], expected, atol=2e-5)
    np.testing.assert_allclose(placed.encode_ahead(["a dog"])[0], expected[1:2], atol=2e-5)
    for encoder in (frugal, apart):
        leaves = jax.tree.leaves((encoder.params, encoder._weights))
        assert {type(leaf) for leaf in leaves} == {np.ndarray}
    # Where the layers lie on the device, what they were made of does not.
    assert {type(leaf) for leaf in jax.tree.leaves(placed.params)} == {np.ndarray}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed._weights))


def test_three_programs_from_a_prompt_to_bytes(parts, caplog):
    pipe = pipeline(parts, arranged=True)
    pipe(["a cat"], steps=2)  # makes the instruction's part of the text encoder, once
    jax.clear_caches()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        picture = pipe(["a dog"], steps=2, seed=5)[0]
    names = [line for line in caplog.messages if line.startswith("Compiling")]
    assert len(names) == 3, names
    plain = pipeline(parts, arranged=False)(["a dog"], steps=2, seed=5)[0]
    difference = np.abs(np.asarray(picture, int) - np.asarray(plain, int))
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
