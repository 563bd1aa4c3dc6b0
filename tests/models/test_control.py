"""The control branch: sizes, start, derivatives, scan, rematerialisation, meshes, guidance and mistakes.

Its numbers are compared with diffusers' and with the published wiring in tests/parity.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close, relative_error
from helpers.tiny_sana import STUDENT, abstract_params, cast, draw_inputs, draw_params, fast_jit

from sprint_jax.core.errors import UserError
from sprint_jax.models import functions
from sprint_jax.models.blocks import unstack_blocks
from sprint_jax.models.control import WIRINGS, Control, new_branch
from sprint_jax.models.sana import SIZES, SanaTransformer, from_fields
from sprint_jax.parallel.sharding import (
    Partition,
    batch_sharding,
    in_use,
    make_mesh,
    state_shardings,
)

FIELDS = STUDENT | dict(num_layers=3, control_blocks=2, out_channels=3, logvar=False)


@functools.cache
def setup(wiring="nvlabs", batch=2):
    """A model, its parameters (the branch's random as well), inputs and a condition, float64."""
    fields = FIELDS | dict(control_wiring=wiring)
    inputs = draw_inputs(fields, (3, 4), batch) if batch == 2 else many(fields, batch)
    params = draw_params(SanaTransformer(**fields), inputs)
    latents = np.random.default_rng(9).standard_normal(inputs[0].shape)
    return SanaTransformer(**fields), params, inputs, latents


def many(fields, batch):
    each = draw_inputs(fields, (3, 4))
    return tuple(
        np.concatenate([a + 0.01 * i if a.dtype == float else a for i in range(batch // 2)])
        for a in each
    )


@functools.cache
def program(model, taps=()):
    def apply(params, inputs, control):
        return model.apply({"params": params}, *inputs, control=control, taps=taps)

    return fast_jit(apply)


def run(model, params, inputs, control=None, taps=()):
    return program(model, taps)(*cast((params, inputs, control), jnp.float32))


def condition(latents, *scale):
    return Control(latents, np.array(scale if len(scale) > 1 else scale * 2, np.float64))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("size", "wiring", "number"),
    [
        ("sana-600m", "nvlabs", 155_149_056),
        ("sana-1600m", "nvlabs", 585_603_200),
        ("sana-600m", "diffusers", 168_765_696),
        ("sana-1600m", "diffusers", 631_576_960),
        ("600m", "nvlabs", 155_181_312),
        ("1600m", "nvlabs", 585_665_920),
    ],
)
def test_published_sizes(size, wiring, number):
    params = abstract_params(SIZES[size] | dict(control_blocks=7, control_wiring=wiring))
    assert count(params.pop("control")) == number
    assert chex.assert_trees_all_equal_shapes(params, abstract_params(SIZES[size])) is None


BOTH = ["nvlabs", pytest.param("diffusers", marks=pytest.mark.slow)]


@pytest.mark.parametrize("wiring", BOTH)
def test_a_new_branch_and_scale_0_leave_the_trunk_bit_for_bit(wiring):
    model, params, inputs, latents = setup(wiring)
    trunk = {name: params[name] for name in params if name != "control"}
    fresh = trunk | {"control": new_branch(cast(trunk, jnp.float32), 2, wiring)}
    chex.assert_trees_all_equal_shapes(fresh, params)
    expected = run(model, trunk, inputs)
    np.testing.assert_array_equal(run(model, fresh, inputs, condition(latents, 1)), expected)
    np.testing.assert_array_equal(run(model, params, inputs, condition(latents, 0)), expected)
    # Each sample has a scale of its own.
    both = run(model, params, inputs, condition(latents, 0, 1))
    np.testing.assert_array_equal(both[0], expected[0])
    assert relative_error(both[1], expected[1]) > 0.01
    other = run(model, params, inputs, condition(-latents, 0, 1))
    assert relative_error(both[1], other[1]) > 0.01
    # Features that a critic reads see the condition as well, from the first block that has a residual.
    taps = 0, 1
    plain = run(model, params, inputs, None, taps)
    steered = run(model, params, inputs, condition(latents, 1), taps)
    np.testing.assert_array_equal(steered[0], plain[0])
    assert relative_error(steered[1], plain[1]) > 0.01
    chex.assert_trees_all_equal(run(model, params, inputs, condition(latents, 0), taps), plain)


def test_the_first_update_moves_only_after_proj():
    model, params, inputs, latents = setup()
    trunk = cast({name: params[name] for name in params if name != "control"}, jnp.float32)
    inputs, latents = cast((inputs, latents), jnp.float32)

    @fast_jit
    @jax.grad
    def slope(branch):
        out = model.apply(
            {"params": trunk | {"control": branch}}, *inputs, control=Control(latents)
        )
        return jnp.sin(out).sum()

    branch = new_branch(trunk, 2, "nvlabs")
    for update in (1, 2):
        gradient = slope(branch)
        moved = {name: bool(jnp.any(leaf)) for name, leaf in flat(gradient).items()}
        after = {name for name in moved if "after_proj" in name}
        assert len(after) == 2
        found = {name for name in moved if moved[name]}
        assert found == (after if update == 1 else set(moved))
        branch = jax.tree.map(lambda p, g: p - 0.1 * g, branch, gradient)


def flat(tree):
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
@pytest.mark.parametrize("wiring", WIRINGS)
def test_derivatives_against_finite_differences(wiring):
    """The tangent along (x, t), with none of the condition, and the gradient by the branch's parameters."""
    model, params, inputs, latents = setup(wiring)
    h = 1e-6
    with jax.enable_x64(True):
        model = model.clone(dtype=jnp.float64)
        params, (x, t, *rest), latents = cast((params, inputs, latents), jnp.float64)
        branch, (dx, dt) = params["control"], (jnp.cos(3 * x), jnp.cos(5 * t))
        direction = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), branch)

        def function(model, branch, x, t):
            tree, control = params | {"control": branch}, Control(latents, 0.7)
            return model.apply({"params": tree}, x, t, *rest, control=control)

        def loss(model, branch):
            return jnp.sin(function(model, branch, x, t)).sum()

        @fast_jit
        def derivatives(branch):
            run = functools.partial(function, model, branch)
            tangent = jax.jvp(run, (x, t), (dx, dt))[1]
            return tangent, jax.grad(functools.partial(loss, model))(branch)

        value = fast_jit(functools.partial(function, model))
        tangent, slope = derivatives(branch)
        ahead, behind = (value(branch, x + s * dx, t + s * dt) for s in (h, -h))
        assert relative_error(tangent, (ahead - behind) / (2 * h)) < 1e-7
        moved = [jax.tree.map(lambda a, b, s=s: a + s * b, branch, direction) for s in (h, -h)]
        ahead, behind = (float(jnp.sin(value(each, x, t)).sum()) for each in moved)
        products = jax.tree.map(lambda a, b: float((a * b).sum()), slope, direction)
        assert abs(sum(jax.tree.leaves(products)) / ((ahead - behind) / (2 * h)) - 1) < 1e-6
        if wiring == "nvlabs":  # another order of the same work
            loops = model.clone(remat="full", scan=False)
            assert_close(fast_jit(jax.grad(functools.partial(loss, loops)))(branch), slope, 1e-9)


def test_bfloat16_is_close_and_blocks_may_lie_apart():
    model, params, inputs, latents = setup()
    control = condition(latents, 1)
    expected = run(model, params, inputs, control)
    apart = unstack_blocks(cast(params, jnp.float32))
    assert relative_error(run(model, apart, inputs, control), expected) < 1e-5
    half = run(model.clone(dtype=jnp.bfloat16), params, inputs, control)
    assert half.dtype == jnp.float32 and 1e-4 < relative_error(half, expected) < 0.05


@pytest.mark.slow
def test_a_mesh_computes_the_same():
    model, params, inputs, latents = setup(batch=8)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.enable_x64(True):
        model = model.clone(dtype=jnp.float64)
        params, inputs, latents = cast((params, inputs, latents), jnp.float64)
        placed = jax.device_put(params, state_shardings(mesh, params))
        stacked = placed["control"]["transformer_blocks"]["after_proj"]["kernel"]
        assert stacked.sharding.shard_shape(stacked.shape)[0] == 2  # the copies' axis is whole
        control = Control(latents, jnp.ones(8))
        batch = jax.device_put((inputs, control), batch_sharding(mesh))
        split, expected = (
            model.clone(partition=Partition(mesh)),
            program(model)(params, inputs, control),
        )

        def apply(params, inputs, control):
            return split.apply({"params": in_use(split, params)}, *inputs, control=control)

        found = fast_jit(apply)(placed, *batch)
        assert relative_error(found, expected) < 1e-10


def test_guidance_shows_the_condition_to_both_halves():
    model, params, (x, t, text, mask, _), latents = setup()
    time_embed = {k: v for k, v in params["time_embed"].items() if k != "guidance_embedder"}
    params = cast(params | {"time_embed": time_embed}, jnp.float32)
    model = model.clone(guidance_embeds=False)
    x, t, text, mask, latents = cast((x, t, text, mask, latents), jnp.float32)
    null, control = (text[1] * 0.5, mask[1]), Control(latents, jnp.array([0.5, 1.0]))

    @fast_jit
    def both(params):
        def velocity(*text):
            return functions.velocity(model, params, *text, control=control)(x, t)

        empty = (jnp.broadcast_to(a, b.shape) for a, b in zip(null, (text, mask), strict=True))
        without, conditional = velocity(*empty), velocity(text, mask)
        found = functions.guided(functions.velocity, model, params, text, mask, 3.0, null, control)
        return without + 3.0 * (conditional - without), found(x, t), conditional

    expected, found, conditional = both(params)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(found, conditional) > 0.01


def test_mistakes():
    model, params, inputs, latents = setup()
    trunk = model.clone(control_blocks=0)
    with pytest.raises(ValueError, match="no control branch"):
        run(trunk, params, inputs, condition(latents, 1))
    with pytest.raises(AssertionError, match=r"\(2, 3, 3, 3\)"):
        run(model, params, inputs, condition(latents[:, :, 1:], 1))
    for change in ({"control_blocks": 3}, {"control_wiring": "theirs"}):
        with pytest.raises(UserError, match=r"model\.control_") as error:
            from_fields(FIELDS, **change)
        assert error.value.exit_code == 2
