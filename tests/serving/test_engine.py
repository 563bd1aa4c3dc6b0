"""The engine on a tiny student with random weights: batches of strangers, and a picture for each."""

import jax
import numpy as np
import pytest
from helpers.workdirs import make_workdir

from sprint_jax import SprintPipeline
from sprint_jax.core.errors import UserError
from sprint_jax.serving.engine import Engine, Job, Recent

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = make_workdir(tmp_path_factory.mktemp("serving") / "student", "distill")
    engine = Engine(SprintPipeline.from_pretrained(folder), most=2)
    programs = engine.programs([(8, 8)], [2])
    assert list(engine.compile(programs)) == [1, 2]
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
        assert answer.ms.keys() == {"text", "denoise", "decode"}
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
            assert len(engine.draw(jobs)) == count
    assert compiled() == before == [2, 2]


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
