"""The engine on a tiny student with random weights: batches of strangers, and a picture for each."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.workdirs import random_params, tiny_config

from sprint_jax import SprintPipeline
from sprint_jax.core.errors import UserError
from sprint_jax.digits.encoders import digits_parts
from sprint_jax.encoders.conditions import load_conditions
from sprint_jax.models.sana import from_fields
from sprint_jax.serving.engine import Engine, Job, Recent

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def engine():
    fields = tiny_config("distill", control_blocks=1)["model"]
    pipe = SprintPipeline(
        from_fields(fields),
        random_params(fields, 1),
        *digits_parts("small")[:2],
        is_student=True,
        sigma_d=0.5,
        shift=1.0,
        midpoint=1.3,
        guidance=3.0,
        size=(8, 8),
    )
    engine = Engine(pipe, most=2, conditions=load_conditions("edges"))
    assert list(engine.compile(engine.programs([(8, 8)], [2]))) == [1, 2]
    return engine


def job(**changes):
    return Job(**dict(prompt="a 3", seed=1, index=0, steps=2, guidance=3.0, size=(8, 8)) | changes)


def test_a_picture_is_the_pipelines_whoever_else_is_in_the_batch(engine):
    jobs = [
        job(prompt="a red 3 on blue", seed=2**32 - 1),
        job(prompt="a 7", index=1, guidance=1.0),
        job(prompt="a gray 3"),
    ]
    answers = engine.draw(jobs)
    assert isinstance(answers.pop(2), UserError)
    del jobs[2]
    for each, answer in zip(jobs, answers, strict=True):
        how = dict(steps=2, seed=each.seed, guidance=each.guidance)
        alone = engine.pipe([each.prompt] * (each.index + 1), **how)[each.index]
        difference = answer.pixels.astype(int) - np.asarray(alone, int)
        assert np.abs(difference).max() <= 1  # other batches are other programs
        assert answer.ms.keys() == {"text", "condition", "denoise", "decode"}
    spread = np.abs(answers[0].pixels.astype(int) - answers[1].pixels)
    assert spread.max() > 10


def test_no_request_waits_for_a_compiler(engine):
    def compiled():
        functions = engine.pipe._latents, engine._noise
        return [function._cache_size() for function in functions]

    before = compiled()
    with jax.no_tracing():
        for count in (1, 2):
            jobs = [job(prompt=f"a {n}", seed=n + count, guidance=n / 2) for n in range(count)]
            jobs[0] = dataclasses.replace(jobs[0], control=lines(count))
            assert len(engine.draw(jobs)) == count
    assert compiled() == before


def lines(seed):
    return np.random.default_rng(seed).choice([0, 255], (8, 8, 1)).repeat(3, -1).astype(np.uint8)


def test_control_images_steer_their_own_pictures(engine):
    plain, steered = engine.draw([job(), job(control=lines(7), control_scale=0.7)])
    alone = engine.pipe(["a 3"], steps=2, seed=1, guidance=3.0, control=lines(7), control_scale=0.7)
    assert np.abs(steered.pixels.astype(int) - np.asarray(alone[0], int)).max() <= 1
    alone = engine.pipe(["a 3"], steps=2, seed=1, guidance=3.0)
    assert np.abs(plain.pixels.astype(int) - np.asarray(alone[0], int)).max() <= 1
    assert np.abs(plain.pixels.astype(int) - steered.pixels).max() > 10


def test_lines_of_photos_are_found_once(engine, monkeypatch):
    photo = np.zeros((8, 8, 3), np.uint8)
    photo[:, 4:] = 255
    (edges,) = engine._conditions.draw(photo[None], [np.zeros(1, int)])
    assert 0 < np.asarray(edges).mean() < 128
    wanted = engine.draw([job(control=np.asarray(edges)[0])])
    found = engine.draw([job(control=photo, control_kind="photo")])
    np.testing.assert_array_equal(found[0].pixels, wanted[0].pixels)
    monkeypatch.setattr(engine, "_conditions", None)
    engine.draw([job(control=photo.copy(), control_kind="photo", seed=3)])


def test_features_are_encoded_once(engine, monkeypatch):
    engine.draw([job(prompt="a blue 8")])
    monkeypatch.setattr(engine.pipe.text_encoder, "encode", None)
    assert engine.draw([job(prompt="a blue 8", seed=9)])[0].pixels.shape == (8, 8, 3)
    engine._text.clear()
    with pytest.raises(TypeError):
        engine.draw([job(prompt="a blue 8")])


def test_what_cannot_be_compiled_is_refused_first(engine):
    with pytest.raises(UserError, match="9x8"):
        engine.programs([(9, 8)], [2])
    with pytest.raises(UserError, match="steps"):
        engine.programs([(8, 8)], [5])


def test_the_values_used_last_are_kept():
    recent = Recent(2)
    recent["a"], recent["b"] = 1, 2
    assert recent["a"] == 1
    recent["c"] = 3
    assert set(recent) == {"a", "c"}
