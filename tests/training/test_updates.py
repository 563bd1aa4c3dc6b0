"""The updates of both stages: the same on every mesh, and each moves what it should and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import assert_same_bits, build, copy, quick_compilation, tiny, write_digits
from helpers.workdirs import make_workdir

from sprint_jax.parallel import sharding
from sprint_jax.training import setup, updates
from sprint_jax.training.accumulate import gradients

STEPS = 20
MESHES = {"data": (8,), "fsdp": (1, 8), "fsdp and tensor": (1, 4, 2), "all": (2, 2, 2)}
SPECS = {"flow": "configs/digits.py:teacher,small", "distill": "configs/digits.py:student,small"}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    data = write_digits(tmp_path_factory.getbasetemp() / "digits")
    teacher = make_workdir(tmp_path_factory.mktemp("updates") / "teacher", "flow")
    return {
        "flow": tiny(SPECS["flow"], data),
        "distill": tiny(SPECS["distill"], data, teacher=str(teacher)),
    }


def one_device():
    return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def singles(configs):
    return {stage: build(configs[stage], one_device()) for stage in SPECS}


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


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=name, marks=[pytest.mark.slow] if name.startswith("fsdp") else [])
        for name, shape in MESHES.items()
    ],
)
@pytest.mark.parametrize("stage", SPECS)
def test_eight_devices_equal_one(stage, shape, configs, singles, single_runs):
    mesh = sharding.make_mesh(*shape)
    built = build(configs[stage], mesh, singles[stage].state)
    check_placement(built)
    (rows, params), (expected_rows, expected_params) = run(built), single_runs[stage]
    for step, (row, expected) in enumerate(zip(rows, expected_rows, strict=True)):
        for name in (name for name in expected if name.startswith("loss/")):
            message = f"{name} at step {step + 1}"
            # The total may come near 0 as a difference of losses of order 1, of which 1e-6 is 8 ulp.
            close = dict(rtol=1e-5, atol=1e-6 if name == "loss/total" else 0)
            np.testing.assert_allclose(row[name], expected[name], **close, err_msg=message)
    assert relative_change(expected_params, params) < 1e-4


def check_placement(built):
    """State lies as its shardings say, before and after an update, and falls by the fsdp factor."""
    fsdp = built.mesh.shape["fsdp"]
    state, _ = built.updates[0](copy(built.state), built.batch(0), built.frozen)
    for tree in (built.state, state):
        for part in (tree.params, tree.ema, tree.opt_state, tree.disc, tree.disc_opt_state):
            leaves = jax.tree.leaves(part)
            for leaf in leaves:
                parts = {tuple(map(str, shard.index)) for shard in leaf.addressable_shards}
                assert len(parts) == leaf.size // leaf.addressable_shards[0].data.size
            held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
            assert held <= 1.05 * sum(leaf.nbytes for leaf in leaves) / fsdp
    batch = built.batch(0)["latents"]
    rows = batch.shape[0] // sharding.batch_ways(built.mesh)
    assert {shard.data.shape[0] for shard in batch.addressable_shards} == {rows}


def names(tree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def changed(before, after) -> list[str]:
    """Names of the leaves that are not bit for bit the same."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return [
        jax.tree_util.keystr(path)
        for (path, old), new in pairs
        if np.asarray(old).tobytes() != np.asarray(new).tobytes()
    ]


def after(built, which, state=None, batch=None, frozen=None, times=1):
    """The state (on the host) after an update; ``which`` counts `compile_updates`' list."""
    state = copy(built.state if state is None else state)
    for number in range(times):
        given = built.batch(number) if batch is None else batch
        state, metrics = built.updates[which](state, given, frozen or built.frozen)
    return jax.device_get(state), jax.device_get(metrics)


def moments(opt_state):
    """AdamW's first moments: after one update a tenth of the clipped gradients."""
    (found,) = [
        part.mu
        for part in jax.tree.leaves(opt_state, is_leaf=lambda part: hasattr(part, "mu"))
        if hasattr(part, "mu")
    ]
    return found


def unmoved(tree) -> set[str]:
    pairs = zip(names(tree), jax.tree.leaves(tree), strict=True)
    return {name for name, leaf in pairs if not np.any(leaf)}


def test_generator_update_moves_the_student_alone(singles):
    built = singles["distill"]
    before = jax.device_get(built.state)
    teacher = jax.device_get(built.frozen)
    # The learning rate of the first update is zero, and guidance enters through a layer of zeros.
    state, _ = after(built, 0, times=4)
    assert not changed(before.disc, state.disc)
    assert not changed(before.disc_opt_state, state.disc_opt_state)
    assert not changed(teacher, jax.device_get(built.frozen))
    assert state.step == 4 and state.skipped == 0
    assert not unmoved(moments(state.opt_state))
    assert changed(before.params, state.params) == names(before.params)
    assert changed(before.ema, state.ema) == names(before.ema)


def test_discriminator_update_moves_the_heads_alone(singles):
    built = singles["distill"]
    # As in a step, the generator's update comes first.
    first, _ = after(built, 0)
    before = jax.device_put(first, jax.tree.map(lambda leaf: leaf.sharding, built.state))
    teacher = jax.device_get(built.frozen)
    state, _ = after(built, 1, before, times=3)
    for name in ("step", "params", "ema", "opt_state", "skipped", "in_a_row"):
        assert not changed(getattr(first, name), getattr(state, name)), name
    assert not changed(teacher, jax.device_get(built.frozen))
    assert not unmoved(moments(state.disc_opt_state))
    assert set(changed(first.disc["params"], state.disc["params"])) == set(
        names(first.disc["params"])
    )
    assert len(changed(first.disc["spectral"], state.disc["spectral"])) >= 4


def relative_change(mine, other) -> float:
    """How far the trees lie apart, relative to the first."""
    pairs = list(zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True))
    apart = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return (apart / sum(float(np.square(a).sum()) for a, _ in pairs)) ** 0.5


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
    place = jax.tree.map(lambda leaf: leaf.sharding, built.state)
    gradients = []
    for change in (
        {},
        {"params": jax.tree.map(lambda leaf: 0.9 * leaf, first.params)},
        {"ema": jax.tree.map(jnp.zeros_like, first.ema)},
    ):
        state = jax.device_put(first.replace(**change), place)
        gradients.append(moments(after(built, 1, state)[0].disc_opt_state))
    assert relative_change(gradients[0], gradients[1]) > 1e-3
    assert not changed(gradients[0], gradients[2])


@pytest.mark.parametrize("stage, which", [("flow", 0), ("distill", 0), ("distill", 1)])
def test_a_batch_with_nan_changes_counters_alone(stage, which, singles):
    built = singles[stage]
    start, _ = after(built, 0, times=2)
    place = jax.tree.map(lambda leaf: leaf.sharding, built.state)
    batch = built.batch(0)
    # One value of one sample is enough.
    bad = batch | {"latents": batch["latents"].at[3, 0, 0, 0].set(jnp.nan)}
    once, metrics = after(built, which, jax.device_put(start, place), bad)
    for name in ("params", "ema", "opt_state", "disc", "disc_opt_state"):
        assert not changed(getattr(start, name), getattr(once, name)), name
    generator = which == 0
    assert once.step == start.step + generator
    assert once.skipped == 1 and list(once.in_a_row) == [generator, not generator]
    assert metrics["health/skipped"] == 1 and metrics["health/in_a_row"] == 1
    if generator:
        assert metrics["health/nonfinite_samples"] == pytest.approx(1 / batch["latents"].shape[0])
    twice, _ = after(built, which, jax.device_put(once, place), bad)
    assert twice.skipped == 2 and twice.in_a_row.max() == 2
    well, _ = after(built, which, jax.device_put(twice, place), batch)
    assert well.skipped == 2 and well.in_a_row.max() == 0
    moved = changed(start.params, well.params) if generator else changed(start.disc, well.disc)
    assert moved


def test_accumulated_gradients_are_means_over_microbatches_with_folded_keys():
    def loss(params, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)
        each = jnp.square(batch["x"] @ params["w"] - noise.sum(-1))
        return each.mean(), {"each": each}

    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.normal(size=3), jnp.float32)}
    batch = {"x": jnp.asarray(generator.normal(size=(12, 3)), jnp.float32)}
    key = jax.random.key(5)
    value, aux, grads = jax.jit(lambda p, b, k: gradients([loss], p, b, k, 3))(params, batch, key)
    parts = [
        jax.value_and_grad(loss, has_aux=True)(
            params, {"x": batch["x"][i::3]}, jax.random.fold_in(key, i)
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(value, np.mean([part[0][0] for part in parts]), rtol=1e-6)
    expected = np.mean([part[1]["w"] for part in parts], axis=0)
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-5)
    each = np.stack([part[0][1]["each"] for part in parts], axis=1).ravel()
    np.testing.assert_allclose(aux["each"], each, rtol=1e-5)


def test_flow_update_with_two_microbatches(configs, singles):
    """Each half of the batch has its own key; the loss, worked out anew, is the mean of both."""
    c = configs["flow"].override({"accumulate": 2})
    built = build(c, one_device(), singles["flow"].state)
    state, metrics = after(built, 0)
    assert state.skipped == 0 and len(
        changed(moments(built.state.opt_state), moments(state.opt_state))
    )

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


def test_joint_update_shows_the_heads_what_the_student_was_judged_by(configs, singles):
    """One program and one batch in place of two; the parts are those of the separate updates."""
    single = singles["distill"]
    built = build(
        configs["distill"].override({"ladd.reuse_fakes": True}), one_device(), single.state
    )
    assert len(built.updates) == 1
    state, metrics = after(built, 0)
    generated, separate = after(single, 0)
    assert state.step == 1 and metrics.keys() > separate.keys() | {"loss/ladd_discriminator"}
    assert relative_change(moments(generated.opt_state), moments(state.opt_state)) < 1e-5

    @jax.jit
    def by_hand(state, batch, frozen):
        c, nets = configs["distill"], single.nets
        state, _, fake = updates._generator_update(nets, c, state, batch, frozen)
        return updates.discriminator_update(nets, c, state, batch | {"fake": fake}, frozen)

    expected, _ = by_hand(copy(single.state), single.batch(0), single.frozen)
    mine = moments(state.disc_opt_state)
    assert relative_change(moments(expected.disc_opt_state), mine) < 1e-5
    # Fresh fakes of another batch teach the heads something else.
    place = jax.tree.map(lambda leaf: leaf.sharding, single.state)
    apart, _ = after(single, 1, jax.device_put(generated, place))
    assert relative_change(moments(apart.disc_opt_state), mine) > 1e-2


def test_the_tangent_may_have_a_precision_of_its_own(configs):
    def loss(**changes):
        c = configs["distill"].override({"ladd.weight": 0.0, "model.dtype": "bfloat16"} | changes)
        return after(build(c, one_device()), 0)[1]["loss/scm"]

    plain = loss()
    assert loss(**{"scm.jvp_dtype": "bfloat16"}) == plain
    assert loss(**{"scm.jvp_dtype": "float32"}) != plain


def test_terms_of_a_loss_add_up():
    def term(scale):
        return lambda p, batch, key: (scale * jnp.square(p["w"] * batch["x"]).mean(), {})

    params, batch = {"w": jnp.float32(2.0)}, {"x": jnp.arange(8, dtype=jnp.float32)}
    run = jax.jit(lambda p, b: gradients([term(1.0), term(3.0)], p, b, jax.random.key(0), 2))
    value, aux, grads = run(params, batch)
    mean = np.square(np.arange(8)).mean()
    assert value == pytest.approx(16 * mean) and aux == {}
    assert grads["w"] == pytest.approx(16 * mean)
