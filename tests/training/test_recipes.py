"""Students of other losses than SANA-Sprint's: each update moves its own network, on every mesh alike."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from helpers.runs import RECIPES, build, copy, tiny
from helpers.updates import (
    FAKE,
    HEADS,
    STUDENT,
    after,
    changed,
    check_placement,
    moments,
    one_device,
    placed,
    relative_change,
)
from helpers.workdirs import make_workdir

from sprint_jax.parallel import sharding
from sprint_jax.training import draws, updates

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


@pytest.fixture(scope="module")
def recipes(data, tmp_path_factory):
    """``recipes(name) -> (config, run on one device)``."""
    teacher = make_workdir(tmp_path_factory.mktemp("recipes") / "teacher", "flow")
    student = tiny("configs/digits.py:student,small,sprint", data, teacher=str(teacher))

    @functools.cache
    def recipes(name):
        c = student.override(RECIPES[name])
        return c, build(c, one_device())

    return recipes


def owners(c) -> list[tuple[str, ...]]:
    """The fields that each update of a step may change, in order."""
    fake = [FAKE] * (c.dmd.fake_updates if c.dmd.weight else 0)
    return [("step", *STUDENT), *fake, *([HEADS] if c.ladd.weight else [])]


def everything(state) -> dict:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


@pytest.mark.parametrize("name", RECIPES)
def test_each_update_of_a_recipe_moves_its_own_network_alone(name, recipes):
    c, built = recipes(name)
    state, metrics = after(built, 0)
    expected = owners(c)
    assert len(built.updates) == len(expected)
    for which, own in enumerate(expected):
        before = everything(state)
        state, more = after(built, which, placed(built, state))
        metrics |= more
        fields = {name.split("/")[0] for name in changed(before, everything(state))}
        assert fields <= {*own} and fields >= {own[0], own[-1]}
    assert state.skipped == 0 and all(np.isfinite(metrics[k]) for k in metrics if k[:5] == "loss/")
    # The recipe reaches the student: by sCM alone the gradient is another.
    others = {
        f"{loss}.weight": 0.0 for loss in ("dmd", "twinflow", "ladd", "meanflow", "trajectory")
    }
    others |= {"scm.weight": 1.0}
    alone, _ = after(build(c.override(others), one_device(), trimmed(built.state)), 0)
    moved, _ = after(built, 0)
    assert relative_change(*(moments(each.opt_state)["proj_out"] for each in (alone, moved))) > 1e-3
    shares = [v for k, v in metrics.items() if k.startswith("share/")]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) > 0


def test_the_fake_score_is_told_the_scale_of_its_images(recipes):
    """At step 0 it is the teacher at every scale; then images of different scales have different scores."""
    c, built = recipes("rcm with a critic on the fake score")
    batch = jax.tree.map(np.asarray, built.batch(0))
    images, rows = np.asarray(batch["latents"]) * c.sigma_d, len(batch["latents"])

    def moved(path, leaf):
        return leaf + 0.1 * ("guidance" in jax.tree_util.keystr(path))

    def losses(change):
        params = jax.tree_util.tree_map_with_path(change, built.state.fake["params"])
        state = built.state.replace(fake=built.state.fake | {"params": params})
        for scale in (2.5, 3.5):
            # The angle, which comes first, has no use here.
            made = dict(zip(draws.MADE, (images, *np.full((2, rows), scale, "f")), strict=True))
            _, metrics = updates.fake_update(built.nets, c, state, batch | made, built.frozen)
            yield float(metrics["loss/fake"])

    first, other = losses(lambda path, leaf: leaf)
    assert first == other
    first, other = losses(moved)
    assert first != pytest.approx(other, rel=1e-4)


def test_a_score_that_is_not_finite_shows(recipes):
    """Its sample is left out of the update, which is not skipped, and counts."""
    _, built = recipes("flow map and trajectories")
    broken = jax.tree.map(lambda leaf: leaf * np.nan, built.state.fake["params"])
    state = copy(built.state.replace(fake=built.state.fake | {"params": broken}))
    state, metrics = built.updates[0](placed(built, state), built.batch(0), built.frozen)
    assert metrics["health/nonfinite_samples"] == 1 and state.skipped == 0


def trimmed(state):
    """The state of a run without critic and fake score."""
    return state.replace(disc=None, disc_opt_state=None, fake=None, fake_opt_state=None)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_on_eight_devices_equal_one(name, recipes):
    c, built = recipes(name)
    other = build(c, sharding.make_mesh(2, 2, 2), built.state)
    check_placement(other)
    results = []
    for each in (built, other):
        state, row = copy(each.state), {}
        for number, update in enumerate(each.updates * 2):
            state, metrics = update(state, each.batch(number), each.frozen)
            row |= metrics
        results.append(
            (jax.device_get(row), jax.device_get((state.params, state.fake, state.disc)))
        )
    (row, trees), (others, other_trees) = results
    losses = [{k: each[k] for k in row if k.startswith("loss/")} for each in (row, others)]
    # Adam's second update divides by the size of two gradients, hence more than rounding.
    chex.assert_trees_all_close(*losses, rtol=1e-4, atol=1e-5)
    floats = [
        [leaf for leaf in jax.tree.leaves(each) if leaf.dtype == np.float32]
        for each in (trees, other_trees)
    ]
    assert relative_change(*floats) < 1e-4
