"""sprint_jax.training.optim against numpy, and stacked blocks against separate ones."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import ROOT

from sprint_jax.core.config import load_config
from sprint_jax.core.errors import UserError
from sprint_jax.training.optim import (
    decay_mask,
    is_factored,
    learning_rate_schedule,
    make_optimizer,
    path_names,
    scale_by_came,
)
from sprint_jax.training.setup import build_nets, mesh_from


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_came(gradients, b1=0.9, b2=0.999, b3=0.9999, factored=True):
    """CAME in float64 for one layer's leaf: reference.md 6.3 written out, a list of updates."""

    def rank_one(row, column):
        return np.sqrt(row.mean()) / np.sqrt(row[:, None] * column[None, :])

    shape = gradients[0].shape
    rows, columns = shape[-2:] if factored else (1, 1)
    m, v = np.zeros(shape), np.zeros(shape)
    row, column = np.zeros(rows), np.zeros(columns)
    residual_row, residual_column = np.zeros(rows), np.zeros(columns)
    updates = []
    for g in np.asarray(gradients, np.float64):
        square = g**2 + 1e-30
        if factored:
            row = b2 * row + (1 - b2) * square.reshape(rows, columns).mean(1)
            column = b2 * column + (1 - b2) * square.reshape(rows, columns).mean(0)
            u = g * rank_one(row, column).reshape(shape)
        else:
            v = b2 * v + (1 - b2) * square
            u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()))
        m = b1 * m + (1 - b1) * u
        if not factored:
            updates.append(m)
            continue
        residual = ((u - m) ** 2 + 1e-16).reshape(rows, columns)
        residual_row = b3 * residual_row + (1 - b3) * residual.mean(1)
        residual_column = b3 * residual_column + (1 - b3) * residual.mean(0)
        updates.append(m * rank_one(residual_row, residual_column).reshape(shape))
    return updates


def run(transform, gradients):
    """Updates of every step for a list of gradient trees."""
    state = transform.init(gradients[0])
    step = jax.jit(transform.update)
    updates = []
    for gradient in gradients:
        update, state = step(gradient, state)
        updates.append(jax.device_get(update))
    return updates


@pytest.mark.parametrize(
    ("shape", "factored"),
    [
        ((5, 7), True),  # linear
        ((1, 1, 5, 7), True),  # 1x1 convolution
        ((6, 1), True),
        ((3, 3, 1, 4), False),  # depthwise
        ((9, 4, 5), False),  # 1-D convolution
        ((1, 4, 5), False),
        ((7,), False),
        ((), False),
    ],
)
def test_came_matches_numpy(shape, factored):
    assert is_factored(shape) == factored
    # Sizes that differ by step and element, so that clipping acts in some steps and not in others.
    gradients = [normal(i, *shape) * 10.0 ** -(i % 3 * 2) for i in range(6)]
    ours = run(scale_by_came(), [{"x": g} for g in gradients])
    for got, want in zip(ours, numpy_came(gradients, factored=factored), strict=True):
        np.testing.assert_allclose(got["x"], want, rtol=2e-5, atol=1e-7 * np.abs(want).max())


def test_came_stacked_layers_equal_separate_leaves():
    layers = 3
    shapes = {
        "kernel": (6, 8),
        "bias": (8,),
        "depth": (3, 3, 1, 4),
        "point": (1, 1, 4, 6),
        "table": (6, 4),
        "scalar": (),
    }

    def layer(step, index):
        # Layers of very different size: statistics shared between them would show.
        return {
            name: normal(100 * step + 10 * index + number, *shape) * 10.0 ** (2 * index)
            for number, (name, shape) in enumerate(shapes.items())
        }

    steps = [[layer(step, index) for index in range(layers)] for step in range(4)]
    separate = run(scale_by_came(), [dict(enumerate(s)) for s in steps])
    blocks = [{"transformer_blocks": jax.tree.map(lambda *x: np.stack(x), *s)} for s in steps]
    stacked = run(scale_by_came(), blocks)
    for one, other in zip(separate, stacked, strict=True):
        want = jax.tree.map(lambda *x: np.stack(x), *(one[i] for i in range(layers)))
        chex.assert_trees_all_close(other["transformer_blocks"], want, rtol=1e-5, atol=1e-8)
    # The check can fail: the same tree taken as unstacked gives something else.
    plain = run(scale_by_came(stacked=lambda path: False), blocks)
    got, want = plain[-1]["transformer_blocks"], stacked[-1]["transformer_blocks"]
    for name in ("kernel", "bias", "table"):
        assert np.abs(got[name] - want[name]).max() > 1e-3


def test_came_state_is_factored():
    params = {"transformer_blocks": {"kernel": jnp.zeros((4, 32, 48))}, "bias": jnp.zeros(8)}
    moments = scale_by_came().init(params).moments
    shapes = {name: x.shape for name, x in moments["transformer_blocks"]["kernel"].items()}
    rows, columns = ("row", "residual_row"), ("column", "residual_column")
    assert shapes == dict.fromkeys(rows, (4, 32)) | dict.fromkeys(columns, (4, 48))
    assert moments["bias"]["full"].shape == (8,)


def test_adamw_matches_numpy_with_clipping_decay_and_schedule():
    lr, wd, clip, warmup = 0.1, 0.01, 0.5, 3
    params = {"kernel": normal(0, 4, 3), "bias": normal(1, 3)}
    optimizer = make_optimizer(
        "adamw", lr, warmup_steps=warmup, clip_norm=clip, weight_decay=wd, b1=0.8, b2=0.95
    )
    state = optimizer.init(params)
    ours, want = params, {name: x.astype(np.float64) for name, x in params.items()}
    moments = {name: (np.zeros(x.shape), np.zeros(x.shape)) for name, x in params.items()}
    step = jax.jit(optimizer.update)
    for n in range(6):
        scale = 0.02 if n == 4 else 2.0  # the small one is not clipped
        gradients = {
            name: scale * normal(7 * n + i, *x.shape) for i, (name, x) in enumerate(params.items())
        }
        updates, state = step(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)

        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        assert (norm > clip) == (n != 4)
        rate = lr * min(1.0, n / warmup)
        for name, gradient in gradients.items():
            g = gradient * min(1.0, clip / norm)
            m, v = moments[name]
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            moments[name] = m, v
            direction = m / (1 - 0.8 ** (n + 1)) / (np.sqrt(v / (1 - 0.95 ** (n + 1))) + 1e-8)
            decay = wd * want[name] if name == "kernel" else 0
            want[name] = want[name] - rate * (direction + decay)
            np.testing.assert_allclose(ours[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [0, 0.0, -1.0])
def test_clip_norm_zero_or_less_is_off(clip_norm):
    gradients = {"kernel": 100 * normal(0, 3, 3)}
    updates = []
    for norm in (clip_norm, 1e9, 1.0):
        # eps of the size of the gradient makes Adam see how large it is.
        optimizer = make_optimizer("adamw", 1.0, warmup_steps=0, clip_norm=norm, eps=10.0)
        updates.append(optimizer.update(gradients, optimizer.init(gradients), gradients)[0])
    np.testing.assert_array_equal(updates[0]["kernel"], updates[1]["kernel"])
    assert np.abs(updates[0]["kernel"] - updates[2]["kernel"]).max() > 0.1


def test_came_through_make_optimizer_descends_and_orders_its_parts():
    gradients = {"kernel": normal(0, 4, 5)}
    params = {"kernel": normal(1, 4, 5)}
    optimizer = make_optimizer("came", 0.01, warmup_steps=0, clip_norm=0.1, weight_decay=0.5)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # Decay comes after CAME (it is not normalised) and before the learning rate.
    clipped = gradients["kernel"] * 0.1 / np.linalg.norm(gradients["kernel"])
    want = -0.01 * (numpy_came([clipped])[0] + 0.5 * params["kernel"])
    np.testing.assert_allclose(updates["kernel"], want, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_state_and_updates_are_float32_for_bfloat16_params(name):
    # 1.0078125 is exact in bfloat16, its square is not.
    params = {
        "kernel": jnp.ones((4, 4), jnp.bfloat16),
        "bias": jnp.full(3, 1.0078125, jnp.bfloat16),
    }
    optimizer = make_optimizer(name, 1e-3, warmup_steps=2, clip_norm=0, weight_decay=0.1, b2=0.999)
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "int32"}
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    vectors = [x for x in jax.tree.leaves(after) if x.shape == (3,)]
    assert any(np.allclose(x, 1.0078125**2 * 0.001, rtol=1e-6) for x in vectors)


def test_decay_mask_spares_vectors_norms_biases_and_tables():
    leaf = lambda *shape: jnp.zeros(shape)  # noqa: E731
    params = {
        "transformer_blocks": {
            "to_q": {"kernel": leaf(2, 4, 4), "bias": leaf(2, 4)},
            "norm_q": {"scale": leaf(2, 4)},
            "scale_shift_table": leaf(2, 6, 4),
            "conv": {"kernel": leaf(2, 3, 3, 1, 4)},
        },
        "proj": {"kernel": leaf(4, 4), "bias": leaf(4)},
        "scale_shift_table": leaf(2, 4),
        "words": {"embedding": leaf(9, 4)},
    }
    decayed = {
        "/".join(path_names(path))
        for path, flag in jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
        if flag
    }
    blocks = {f"transformer_blocks/{name}/kernel" for name in ("to_q", "conv")}
    assert decayed == blocks | {"proj/kernel"}


def test_learning_rate_schedule():
    constant = learning_rate_schedule(2.0, 4)
    assert [float(constant(n)) for n in (0, 1, 2, 4, 5, 10**6)] == [0, 0.5, 1, 2, 2, 2]
    assert float(learning_rate_schedule(2.0, 0)(0)) == 2.0
    cosine = learning_rate_schedule(2.0, 4, decay_steps=10)
    got = [float(cosine(n)) for n in (0, 2, 4, 9, 14, 99)]
    np.testing.assert_allclose(got, [0, 1, 2, 1, 0, 0], atol=1e-6)
    assert float(cosine(6)) == pytest.approx(1 + np.cos(np.pi * 0.2), rel=1e-6)


def test_came_without_momentum_has_no_confidence():
    """The residual would be nothing but its eps, and an update a billion times too long."""
    params = {"w": jnp.zeros((64, 64))}
    optimizer = scale_by_came(b1=0.0)
    state = optimizer.init(params)
    for number in range(3):
        gradient = jax.random.normal(jax.random.key(number), (64, 64))
        direction, state = optimizer.update({"w": gradient}, state)
        assert float(jnp.sqrt(jnp.square(direction["w"]).mean())) <= 1.0 + 1e-6  # clip_threshold


def test_decay_over_all_steps_grows_with_them():
    """Sizes of the updates of a run that is resumed for twice as long, by its config alone."""

    def sizes(steps):
        changes = {"steps": steps, "optimizer.warmup_steps": 0, "optimizer.clip_norm": 0.0}
        c = load_config(str(ROOT / "configs" / "digits.py:teacher,small"), changes)
        optimizer = build_nets(c, mesh_from(c)).optimizer
        params = {"w": jnp.ones(())}
        state = optimizer.init(params)
        for _ in range(8):
            update, state = optimizer.update(params, state, params)
            yield -float(update["w"]) / c.optimizer.learning_rate

    half, whole = (1 + np.cos(np.pi * np.arange(8) / n) for n in (4, 8))
    half[4:] = 0
    np.testing.assert_allclose(list(sizes(4)), half / 2, atol=1e-4)
    np.testing.assert_allclose(list(sizes(8)), whole / 2, atol=1e-4)


def test_unknown_name_is_a_user_error():
    with pytest.raises(UserError, match=r"'sgd'.*'adamw'.*'came'"):
        make_optimizer("sgd", 1.0, warmup_steps=0, clip_norm=0)
