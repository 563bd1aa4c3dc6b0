"""Surgery on teachers: QK norm, the dense time embedding, and networks that cannot be changed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.workdirs import random_params, slow_time_params, tiny_config

from sprint_jax.core.errors import UserError
from sprint_jax.models.sana import from_fields
from sprint_jax.teacher import surgery

DENSE = tiny_config("flow")["model"]
OLD = DENSE | {"qk_norm": False, "timestep_scale": 1.0}


@pytest.fixture(scope="module")
def old():
    return slow_time_params(OLD, 5)


def run(fields, params, inputs):
    return np.asarray(jax.jit(from_fields(fields).apply)({"params": params}, *inputs))


def test_qk_norm_is_inserted_with_ones_into_both_attentions_and_nothing_else_is_changed(old):
    assert surgery.operate(OLD, old, OLD) == (old, [])
    target = OLD | {"qk_norm": True}
    params, changes = surgery.operate(OLD, old, target)
    assert len(changes) == 1 and "QK norm" in changes[0]
    chex.assert_trees_all_equal_shapes(params, random_params(target, 0))
    for name in ("attn1", "attn2"):
        attention = dict(params["transformer_blocks"][name])
        norms = [attention.pop(norm)["weight"] for norm in ("norm_q", "norm_k")]
        np.testing.assert_array_equal(norms, np.ones((2, 2, 32), np.float32))
        chex.assert_trees_all_equal(attention, old["transformer_blocks"][name])


def test_fitted_time_embedding_keeps_the_function_and_the_old_weights_do_not(old, inputs):
    target = OLD | {"timestep_scale": 0.001}
    fitted, error = surgery.fit_time_embedding(old, 1.0, 0.001)
    kept, _ = surgery.operate(OLD, old, target, fit_time=False)
    expected = run(OLD, old, inputs)

    def distance(params):
        difference = run(target, params, inputs) - expected
        return np.sqrt(np.square(difference).mean() / np.square(expected).mean())

    assert error < 0.1
    assert distance(fitted) < 0.1
    assert distance(kept) > 3 * distance(fitted)


def test_fit_has_a_derivative_by_time_far_below_that_of_times_to_1000(inputs):
    """Of a network whose embedding wiggles fast, as an untrained one does."""
    params = random_params(OLD, 5)
    fitted, _ = surgery.fit_time_embedding(params, 1.0, 0.001)

    @jax.jit(static_argnums=0)
    def derivative(scale, params):
        x, t, text, mask = inputs
        model = from_fields(OLD | {"timestep_scale": scale})

        def velocity(t):
            return model.apply({"params": params}, x, t, text, mask)

        return jnp.abs(jax.jvp(velocity, (t,), (jnp.ones_like(t),))[1]).mean()

    assert float(derivative(0.001, fitted)) < 0.1 * float(derivative(1.0, params))


@pytest.mark.parametrize(
    ("source", "target", "prune", "message"),
    [
        ({"caption_channels": 32}, {}, 0, r"caption_channels 32.*config\.model\.caption_channels"),
        ({}, {"qk_norm": False}, 0, r"config\.model\.qk_norm=true"),
        ({"num_layers": 4}, {}, 0, r"4 blocks.*config\.model\.num_layers.*--prune 2"),
        ({"num_layers": 1}, {}, 0, r"1 blocks.*config\.model\.num_layers"),
        ({}, {}, 3, "2 blocks.*--prune 3"),
        ({"interpolation_scale": 2.0}, {}, 0, "interpolation_scale"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(source, target, prune, message):
    with pytest.raises(UserError, match=message) as caught:
        surgery.check_fits("old", DENSE | source, DENSE | target, prune)
    assert caught.value.exit_code == 2
