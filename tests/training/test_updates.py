"""The updates of both stages: the same on every mesh, and each moves what it should and no more."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_same_bits
from helpers.runs import build, copy, tiny
from helpers.updates import (
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

from sprint_jax.core.errors import UserError
from sprint_jax.core.fingerprint import leaf_table
from sprint_jax.interop.discriminator import save_heads
from sprint_jax.parallel import sharding
from sprint_jax.training import setup, updates
from sprint_jax.training.exam import make_exam

pytestmark = pytest.mark.usefixtures("quick")
STEPS = 20
SPECS = {
    "flow": "configs/digits.py:teacher,small",
    "distill": "configs/digits.py:student,small,sprint",
}
# Of data, fsdp and tensor.
MESHES = [*itertools.product(SPECS, [(2, 2, 2), (8,), (1, 8), (1, 4, 2)])]


@pytest.fixture(scope="module")
def configs(data, tmp_path_factory):
    teacher = make_workdir(tmp_path_factory.mktemp("updates") / "teacher", "flow")
    return {
        "flow": tiny(SPECS["flow"], data),
        "distill": tiny(SPECS["distill"], data, teacher=str(teacher)),
    }


@pytest.fixture(scope="module")
def singles(configs):
    class Lazy(dict):  # a stage is compiled when a test asks for it
        def __missing__(self, stage):
            return self.setdefault(stage, build(configs[stage], one_device()))

    return Lazy()


@pytest.fixture(scope="module")
def single_runs(singles):
    return {stage: run(singles[stage]) for stage in SPECS}


def run(built) -> tuple[list[dict[str, float]], dict]:
    """The metrics of some steps, from a copy of the state, and the parameters after them."""
    state, number, rows = copy(built.state), 0, []
    for _ in range(STEPS):
        row = {}
        for update in built.updates:
            state, metrics = update(state, built.batch(number), built.frozen)
            row |= metrics
            number += 1
        rows.append(jax.device_get(row))
    return rows, jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "shape"), MESHES)
def test_eight_devices_equal_one(stage, shape, configs, singles, single_runs):
    mesh = sharding.make_mesh(*shape)
    built = build(configs[stage], mesh, singles[stage].state)
    check_placement(built)
    (rows, params), (expected_rows, expected_params) = run(built), single_runs[stage]
    losses, expected = (
        [{name: row[name] for name in row if name.startswith("loss/")} for row in each]
        for each in (rows, expected_rows)
    )
    # The total may come near 0 as a difference of losses of order 1, of which 1e-6 is 8 ulp.
    chex.assert_trees_all_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert relative_change(expected_params, params) < 1e-4


@pytest.mark.parametrize("which", [0, 1], ids=["student", "heads"])
def test_an_update_moves_its_own_network_alone(which, singles):
    built = singles["distill"]
    # As in a step, the generator's update comes first. The learning rate of the first update is zero,
    # and guidance enters through a layer of zeros.
    before, _ = after(built, 0)
    state, _ = after(built, which, placed(built, before), times=3)
    for name in HEADS if which == 0 else ("step", *STUDENT, "skipped", "in_a_row"):
        assert not changed({name: getattr(before, name)}, {name: getattr(state, name)})
    assert state.step == before.step + 3 * (which == 0) and state.skipped == 0
    whole = state.params if which == 0 else state.disc["params"]
    old = before.params if which == 0 else before.disc["params"]
    assert changed(old, whole) == leaf_table(whole).keys()
    gradients = moments(state.opt_state if which == 0 else state.disc_opt_state)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradients))
    if which == 0:
        assert changed(before.ema, state.ema) == leaf_table(state.ema).keys()
    else:
        assert len(changed(before.disc["spectral"], state.disc["spectral"])) >= 4


def test_exam_of_one_step_images_and_of_the_critic(singles):
    """By a judge that reads every other picture, in the order of the angles and held-out records."""
    built, seen = singles["distill"], []

    def every_other(pictures):
        seen.append(pictures)
        return np.arange(len(pictures)) % 2 == 0

    data = dataclasses.replace(built.data, readable=every_other)
    c = built.c.override({"log.exam": 8})
    exam = make_exam(c, built.nets, data, built.mesh)
    found = exam(built.state, built.frozen)
    shares = {name: found[name] for name in found if name.startswith("unreadable/")}
    assert len(shares) == 9 and set(shares.values()) == {0.5}
    assert 0 <= found["critic/readable"] <= 1 and 0 <= found["critic/held_out"] <= 1
    assert seen[0].shape == (9 * 8, 8, 8, 3) and seen[0].dtype == np.uint8
    # Near data an untrained student leaves the records as they are; from pure noise it cannot know them.
    records = data.decode(data.held_out(8)["latents"]).astype(float)
    errors = [np.abs(part - records).mean() for part in seen[0].reshape(9, *records.shape)]
    assert errors[0] < 0.3 * errors[-1]
    unjudged = dataclasses.replace(built.data, readable=None)
    assert make_exam(c, built.nets, unjudged, built.mesh) is None
    assert make_exam(c.override({"log.exam": 0}), built.nets, data, built.mesh) is None


def test_gradients_reach_the_student_through_both_losses(singles):
    """Heads enter the student's gradient by the adversarial loss alone."""
    built = singles["distill"]
    state, metrics = after(built, 0)
    # Of the last layer: clipping scales by a norm that the gradient of logvar dominates.
    gradient = moments(state.opt_state)["proj_out"]
    heads = jax.tree.map(lambda leaf: -leaf, built.state.disc["params"])
    other = built.state.replace(disc=built.state.disc | {"params": heads})
    turned, turned_metrics = after(built, 0, other)
    assert relative_change(gradient, moments(turned.opt_state)["proj_out"]) > 0.01
    np.testing.assert_allclose(turned_metrics["loss/scm"], metrics["loss/scm"], rtol=1e-6)
    teacher = jax.tree.map(lambda leaf: 0.9 * leaf, built.frozen["teacher"])
    taught, _ = after(built, 0, frozen=built.frozen | {"teacher": teacher})
    assert relative_change(gradient, moments(taught.opt_state)["proj_out"]) > 0.01


def test_heads_learn_from_what_the_student_draws(singles):
    built = singles["distill"]
    # Params count for the fakes, the average does not.
    first, _ = after(built, 0)
    gradients = []
    for change in (
        {},
        {"params": jax.tree.map(lambda leaf: 0.9 * leaf, first.params)},
        {"ema": jax.tree.map(jnp.zeros_like, first.ema)},
    ):
        state = placed(built, first.replace(**change))
        gradients.append(moments(after(built, 1, state)[0].disc_opt_state))
    assert relative_change(gradients[0], gradients[1]) > 1e-3
    assert not changed(gradients[0], gradients[2])


@pytest.mark.parametrize("stage, which", [("flow", 0), ("distill", 0), ("distill", 1)])
def test_a_batch_with_nan_changes_counters_alone(stage, which, singles):
    built, generator = singles[stage], which == 0
    state, _ = after(built, 0, times=2)
    start, batch = state, built.batch(0)
    # One value of one sample is enough.
    bad = batch | {"latents": batch["latents"].at[3, 0, 0, 0].set(jnp.nan)}
    for times in (1, 2):
        state, metrics = after(built, which, placed(built, state), bad)
        for name in (*STUDENT, *HEADS):
            assert not changed({name: getattr(start, name)}, {name: getattr(state, name)})
        assert state.step == start.step + times * generator and state.skipped == times
        assert state.in_a_row[which] == state.in_a_row.sum() == times
        assert metrics["health/skipped"] == metrics["health/in_a_row"] == times
        if generator:
            assert metrics["health/nonfinite_samples"] == 1 / batch["latents"].shape[0]
    well, _ = after(built, which, placed(built, state), batch)
    assert well.skipped == 2 and well.in_a_row.max() == 0
    assert changed(start.params, well.params) if generator else changed(start.disc, well.disc)


@pytest.mark.slow
def test_flow_update_with_two_microbatches(configs, singles):
    """Each half of the batch has its own key; the loss, worked out anew, is the mean of both."""
    c = configs["flow"].override({"accumulate": 2})
    built = build(c, one_device(), singles["flow"].state)
    state, metrics = after(built, 0)
    assert state.skipped == 0 and changed(built.state.opt_state, state.opt_state)

    @jax.jit
    def half_loss(batch, key):
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        t = jax.nn.sigmoid(jax.random.normal(time_key, (8,)))
        noise = jax.random.normal(noise_key, batch["latents"].shape)
        kept = ~jax.random.bernoulli(drop_key, 0.1, (8,))
        text = jnp.where(kept[:, None, None], batch["text"], built.frozen["null_text"][None])
        mask = jnp.where(kept[:, None], batch["mask"], built.frozen["null_mask"][None])
        s = t[:, None, None, None]
        x = (1 - s) * batch["latents"] + s * noise
        velocity = built.nets.model.apply({"params": built.state.params}, x, t, text, mask)
        return jnp.mean((velocity - noise + batch["latents"]) ** 2)

    key = jax.random.fold_in(jax.random.key(c.seed), 0)
    batch = built.data.batches(0)
    halves = [
        half_loss({k: v[i::2] for k, v in batch.items()}, jax.random.fold_in(key, i))
        for i in range(2)
    ]
    np.testing.assert_allclose(metrics["loss/flow"], np.mean(halves), rtol=1e-5)
    # Every sample is in the time bins: the batch was not cut short.
    assert metrics["health/nonfinite_samples"] == 0
    assert abs(float(halves[0] - halves[1])) > 1e-3


def test_states_on_other_meshes_start_from_the_same_bits(configs, singles):
    """Initial weights are a function of the seed, not of the mesh."""
    built, mesh = singles["flow"], sharding.make_mesh(2, 4)
    batch = sharding.to_devices(mesh, built.data.batches(0))
    state = setup.init_state(configs["flow"], built.nets, batch, {}, mesh)
    assert_same_bits(state, built.state)


@pytest.mark.slow
def test_heads_of_a_file_start_a_critic_and_another_number_of_taps_is_refused(
    configs, singles, tmp_path
):
    built, path = singles["distill"], tmp_path / "heads.safetensors"
    heads = {name: built.state.disc[name] for name in ("params", "spectral")}
    heads = jax.tree.map(lambda leaf: leaf + 1, jax.device_get(heads))
    save_heads(path, heads)

    def start(**changes):
        c = configs["distill"].override({"ladd.init": str(path)} | changes)
        nets = setup.build_nets(c, built.mesh)
        return setup.init_state(c, nets, built.batch(0), built.frozen, built.mesh)

    state = start()
    assert_same_bits({name: state.disc[name] for name in heads}, heads)
    assert state.disc["updates"] == 0
    assert_same_bits(state.params, built.state.params)
    with pytest.raises(UserError, match=r"ladd\.init=.* has 1 heads.*ladd\.taps=\(0, 1\) wants 2"):
        start(**{"ladd.taps": (0, 1)})


@pytest.mark.slow
def test_joint_update_shows_the_heads_what_the_student_was_judged_by(configs, singles):
    """One program and one batch in place of two; the parts are those of the separate updates."""
    single = singles["distill"]
    built = build(configs["distill"].override({"images.reuse": True}), one_device(), single.state)
    assert len(built.updates) == 1
    state, metrics = after(built, 0)
    generated, separate = after(single, 0)
    assert state.step == 1 and metrics.keys() > separate.keys() | {"loss/critic"}
    assert relative_change(moments(generated.opt_state), moments(state.opt_state)) < 1e-5

    @jax.jit
    def by_hand(state, batch, frozen):
        c, nets = configs["distill"], single.nets
        state, _, made = updates._generator_update(nets, c, state, batch, frozen)
        return updates.discriminator_update(nets, c, state, batch | made, frozen)

    expected, _ = by_hand(copy(single.state), single.batch(0), single.frozen)
    mine = moments(state.disc_opt_state)
    assert relative_change(moments(expected.disc_opt_state), mine) < 1e-5
    # Fresh fakes of another batch teach the heads something else.
    apart, _ = after(single, 1, placed(single, generated))
    assert relative_change(moments(apart.disc_opt_state), mine) > 1e-2


@pytest.mark.slow
def test_the_tangent_may_have_a_precision_of_its_own(configs):
    def loss(**changes):
        c = configs["distill"].override({"ladd.weight": 0.0, "model.dtype": "bfloat16"} | changes)
        return after(build(c, one_device()), 0)[1]["loss/scm"]

    plain = loss()
    assert loss(**{"scm.jvp_dtype": "bfloat16"}) == plain
    assert loss(**{"scm.jvp_dtype": "float32"}) != plain
