"""Numbers of metrics on small features: degenerate cases, closed forms, and errors against resampling."""

import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.metrics import clip_score, diversity, frechet, kernel, measures, preprocess
from sprint_jax.metrics.prdc import prdc
from sprint_jax.metrics.protocols import PROTOCOLS


def draw(count, width=6, shift=0.0, seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width))
    return shift + scale * random.normal(size=(count, width)) @ mix


def test_frechet_of_gaussians_along_axes_is_the_closed_form():
    one = frechet.Moments(np.zeros(3), np.diag([1.0, 4.0, 0.0]))
    two = frechet.Moments(np.array([1.0, 0.0, 2.0]), np.diag([9.0, 4.0, 25.0]))
    assert frechet.distance(one, two) == pytest.approx(1 + 4 + (3 - 1) ** 2 + 25)


@pytest.mark.parametrize(("n", "m"), [(4, 3), (4, 60), (2, 2), (40, 40)])
def test_frechet_with_fewer_pictures_than_features_is_that_of_its_moments(n, m):
    a, b = draw(n, 30), draw(m, 30, 0.2, 1)
    full = frechet.distance(frechet.moments(a), frechet.moments(b))
    assert frechet.low_rank(a, b) == pytest.approx(full, rel=1e-6)
    assert frechet.frechet(a, b) == pytest.approx(full, rel=1e-6)


def test_frechet_of_equal_sets_and_of_constant_pictures_is_finite():
    a, constant = draw(5, 30).astype(np.float32), np.full((7, 30), 3.0)
    for same in (a, constant, draw(50)):
        assert 0 <= frechet.frechet(same, same) < 1e-6 * max(1, np.square(same).sum())
    spread = np.trace(np.cov(a, rowvar=False)) + np.square(a.mean(0, dtype=float) - 3).sum()
    assert frechet.frechet(a, constant) == pytest.approx(spread)
    assert frechet.frechet(a[:1], a[:1]) == 0


def test_frechet_error_is_that_of_fresh_pictures():
    reference = frechet.moments(draw(4000, shift=0.3, seed=1))
    values = [
        frechet.distance(frechet.moments(draw(400, seed=s)), reference) for s in range(10, 110)
    ]
    value, error = frechet.distance_with_error(draw(400), reference)
    assert error == pytest.approx(np.std(values), rel=0.25)
    assert abs(value - np.mean(values)) < 4 * error
    assert value == pytest.approx(frechet.distance(frechet.moments(draw(400)), reference))
    both = frechet.distance_with_error(draw(400), reference, draw(400, shift=0.3, seed=1))[1]
    assert both > 1.2 * error


def test_frechet_infinity_takes_the_bias_away():
    reference = frechet.moments(draw(20000, 12, seed=1))
    sets = [draw(600, 12, seed=s) for s in range(2, 12)]
    biased = np.mean([frechet.distance(frechet.moments(x), reference) for x in sets])
    found = [frechet.infinity(x, reference, least=60) for x in sets]
    values, errors = np.transpose([each[:2] for each in found])
    assert found[0][2]["sizes"][::14] == [60, 600] and len(found[0][2]["distances"]) == 15
    assert abs(values.mean()) < biased / 3 and 0 < errors.mean() < biased


def test_kid_is_unbiased_and_knows_its_error():
    found = [kernel.kid(draw(40, seed=s), draw(60, seed=1000 + s), subsets=1) for s in range(80)]
    values = np.array([each.value for each in found])
    assert abs(values.mean()) < 4 * values.std() / 80**0.5
    apart = [
        kernel.kid(draw(80, shift=1.0, seed=s), draw(60, seed=1000 + s), subsets=1)
        for s in range(60)
    ]
    spread = np.std([each.value for each in apart])
    assert np.mean([each.standard_error for each in apart]) == pytest.approx(spread, rel=0.3)
    # All pictures in one subset: the libraries' number is the value.
    assert kernel.kid(draw(50), draw(50, seed=1), subsets=2).mean == pytest.approx(
        kernel.kid(draw(50), draw(50, seed=1), subsets=2).value
    )


def test_cmmd_on_unit_vectors_is_nearly_the_distance_of_means():
    a, b = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (draw(50), draw(50, shift=0.5, seed=1))
    )
    value, error = kernel.cmmd(a, b)
    assert value == pytest.approx(10 * np.square(a.mean(0) - b.mean(0)).sum(), rel=0.02)
    assert abs(kernel.cmmd(a, a)[0]) < 1e-9
    fresh = [kernel.cmmd(draw(50, seed=s), draw(50, shift=0.5, seed=500 + s))[0] for s in range(60)]
    assert error == pytest.approx(np.std(fresh), rel=0.4)


def test_prdc_of_a_hand_made_scene():
    real = np.array([[0.0, 0], [1, 0], [2, 0], [10, 0]])
    fake = np.array([[0.5, 0], [5.0, 0], [50, 0]])
    found = {name: each["value"] for name, each in prdc(real, fake, 1).items()}
    # Balls of real ones reach 1, 1, 1, 8; those of fakes 4.5, 4.5, 45.
    assert found == pytest.approx(dict(precision=2 / 3, recall=1, density=1, coverage=3 / 4))


@pytest.mark.parametrize("rest", range(6))
def test_middles_are_those_of_each_library(rest):
    """torchvision rounds half of the rest to even; CMMD's code and transformers round it down."""
    picture = np.broadcast_to(np.arange(4 + rest, dtype=np.uint8)[None, :, None], (4, 4 + rest, 3))
    down = [PROTOCOLS["torch-fidelity"].clip, *(protocol.cmmd for protocol in PROTOCOLS.values())]
    for view, left in [(PROTOCOLS["sana"].clip, round(rest / 2)), *((v, rest // 2) for v in down)]:
        small = view.resizes[0]._replace(size=4)
        assert (preprocess.resize(small, picture)[0, :, 0] == np.arange(left, left + 4)).all()


def test_clip_scores_and_their_error_over_prompts():
    image, text = np.array([[2.0, 0], [0, 3], [1, 1]]), np.array([[1.0, 0], [1, 0], [0, -1]])
    assert clip_score.clip_scores(image, text) == pytest.approx([100, 0, -100 / 2**0.5])
    values, groups = np.repeat(draw(50)[:, 0], 4), np.repeat(np.arange(50), 4)
    assert clip_score.mean_with_error(values[::4])[1] == pytest.approx(
        clip_score.mean_with_error(values, groups)[1]
    )


def test_diversity_of_equal_and_of_orthogonal_pictures():
    x, prompts = np.eye(6), ["a", "a", "a", "b", "b", "c"]
    assert diversity.within_prompts(x, prompts)[::2] == (pytest.approx(1), 2)
    assert diversity.within_prompts(np.ones((6, 3)), prompts)[0] == pytest.approx(0)
    assert np.isnan(diversity.within_prompts(x, list("abcdef"))[0])
    assert diversity.vendi(x) == pytest.approx(6) and diversity.vendi(
        np.ones((6, 3))
    ) == pytest.approx(1)
    sure = 50 * np.eye(4)[np.arange(40) % 4]
    assert diversity.inception_score(sure, splits=1)[0] == pytest.approx(4)


def test_measures_take_the_pool_and_the_logits_from_where_they_stand(monkeypatch):
    monkeypatch.setattr(measures, "POOL", 6)
    ours = np.concatenate([draw(60, shift=0.5), draw(60, 3, seed=5)], axis=1)
    theirs = np.concatenate([draw(70, seed=1), np.full((70, 3), np.nan)], axis=1)
    a, b = ours[:, :6], theirs[:, :6]
    known = frechet.moments(b)
    names = ["fid", "fid_infinity", "kid", "prdc", "is"]
    protocol = PROTOCOLS["clean-fid"]
    found = measures.Features({"inception": ours}, {"inception": theirs}, known, None)
    numbers = measures.measure(names, found, protocol)
    assert list(numbers) == names
    assert numbers["fid"]["value"] == pytest.approx(frechet.frechet(a, b))
    assert numbers["fid_infinity"]["curve"]["sizes"][-1] == 60
    assert numbers["kid"]["subset_mean"] == kernel.kid(a, b).mean
    assert numbers["prdc"]["parts"] == prdc(b, a, 5)
    assert numbers["is"]["value"] == diversity.inception_score(ours[:, 6:])[0]
    assert numbers["is"]["standard_error"] == numbers["is"]["split_std"] / 3
    # Against statistics alone the reference has no error of its own.
    alone = found._replace(reference={})
    error = measures.measure(["fid"], alone, protocol)["fid"]["standard_error"]
    assert error < numbers["fid"]["standard_error"]
    few = found._replace(pictures={"inception": ours[:5]})
    with pytest.raises(UserError, match="5 pictures are too few for prdc: at least 6"):
        measures.measure(["prdc"], few, protocol)
