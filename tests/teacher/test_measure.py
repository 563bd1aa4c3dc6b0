"""Measurements of a teacher, and the verdict on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.workdirs import random_params, tiny_config

from sprint_jax import losses, trigflow
from sprint_jax.models import functions
from sprint_jax.models.sana import from_fields
from sprint_jax.teacher import measure
from sprint_jax.teacher.verdict import judge

pytestmark = pytest.mark.usefixtures("quick")

FIELDS = tiny_config("flow")["model"] | {"num_layers": 1}
SIGMA_D = 0.5


@pytest.fixture(scope="module")
def setting(batches):
    null = jnp.zeros((5, 64)), jnp.asarray([1, 0, 0, 0, 0])
    return measure.Setting(batches, *null, guidance=2.0, sigma_d=SIGMA_D, shift=1.0)


@pytest.fixture(scope="module")
def small():
    """A calm network: weights so small that its velocity hardly depends on time."""
    return jax.tree.map(lambda leaf: 0.3 * leaf, random_params(FIELDS, 1))


@pytest.fixture(scope="module")
def found(small, setting):
    ticks = []
    model = from_fields(FIELDS)
    numbers, latents = measure.measure(model, small, setting, lambda: ticks.append(None))
    assert len(ticks) == setting.calls and latents.shape == (4, 4, 4, 12)
    return numbers


def failed(found, before=None) -> set[str]:
    return {check.name for check in judge(found, before) if not check.passed}


def test_a_healthy_teacher_passes_all_but_what_it_did_not_learn(found):
    assert failed(found) <= {"learnt", "samples"}
    assert max(found["transform"].values()) < 2e-5


def test_flow_losses_are_those_of_a_few_lines(small, setting, found):
    """The loss at the middles of the batches' parts of each bin, and that of the best multiple of x_t."""

    @jax.jit
    def loss(batch, t, key):
        noise = jax.random.normal(key, batch["latents"].shape)
        x = (1 - t) * batch["latents"] + t * noise
        arguments = x, jnp.full(4, t), batch["text"], batch["mask"]
        v = from_fields(FIELDS).apply({"params": small}, *arguments)
        return jnp.square(v - (noise - batch["latents"])).mean()

    keys = [jax.random.fold_in(jax.random.key(2), i) for i in range(16)]
    each = [loss(setting.batches[i % 2], (i + 0.5) / 16, keys[i]) for i in range(16)]
    expected = np.reshape(each, (8, 2)).mean(1)
    np.testing.assert_allclose(found["flow"]["loss"], expected, rtol=1e-5)
    assert found["flow"]["mean"] == pytest.approx(expected.mean(), rel=1e-5)

    power = np.mean([np.square(batch["latents"]).mean() for batch in setting.batches])
    t = (np.arange(8000) + 0.5) / 8000
    # E[v | x] = a x of Gaussian latents, and E[v^2] - a E[v x].
    a = (t - (1 - t) * power) / (t**2 + (1 - t) ** 2 * power)
    linear = 1 + power - a * (t - (1 - t) * power)
    np.testing.assert_allclose(found["flow"]["linear"], linear.reshape(8, -1).mean(1), rtol=1e-4)
    assert found["flow"]["linear_mean"] == pytest.approx(linear.mean(), rel=1e-4)


def test_tangent_and_gradient_are_those_of_the_loss(small, setting):
    model, batch = from_fields(FIELDS), setting.batches[0]
    one = setting._replace(batches=[batch])
    result = measure.tangents(model, small, one, lambda: None)
    t = jnp.full(4, 2.5 / 8 * np.pi / 2)
    x0 = SIGMA_D * batch["latents"]
    z = SIGMA_D * jax.random.normal(jax.random.fold_in(jax.random.key(2), 2), x0.shape)

    text, null = (batch["text"], batch["mask"]), (setting.null_text, setting.null_mask)
    teacher = functions.guided(functions.trigflow, model, small, *text, 2.0, null)

    def student(params, x, t):
        return functions.trigflow(model, params, *text)(x, t), jnp.zeros(4)

    @jax.jit
    def both(params):
        loss = functools.partial(losses.scm_loss, student, teacher, sigma_d=SIGMA_D, warmup=1.0)
        grads, aux = jax.grad(loss, has_aux=True)(params, x0, z, t)
        x_t = trigflow.add_noise(x0, z, t)
        size = losses.per_sample_norm(student(params, x_t / SIGMA_D, t)[0])
        return optax.tree.norm(grads), (aux["tangent_norm"] / (SIGMA_D * size)).mean()

    gradient, size = both(small)
    weight = 1 / (SIGMA_D * np.tan(2.5 / 8 * np.pi / 2))
    assert result["size"][2] == pytest.approx(float(size), rel=1e-4)
    assert result["gradient"][2] == pytest.approx(float(gradient) / weight, rel=1e-4)


@pytest.mark.slow
def test_scale_1000_with_loud_attention_fails_for_its_derivative(setting):
    fields = FIELDS | {"timestep_scale": 1.0, "qk_norm": False}
    params = jax.tree.map(lambda leaf: 0.5 * leaf, random_params(fields, 1))
    attention = params["transformer_blocks"]["attn2"]
    for layer in ("to_q", "to_k"):
        attention[layer] = jax.tree.map(lambda leaf: 30 * leaf, attention[layer])
    numbers, _ = measure.measure(from_fields(fields), params, setting, lambda: None)
    assert {"tangent", "bend"} <= failed(numbers)


@pytest.mark.slow
def test_weights_that_are_not_finite_fail_most_checks(small, setting):
    params = small | {"scale_shift_table": small["scale_shift_table"].at[0, 0].set(jnp.nan)}
    numbers, _ = measure.measure(from_fields(FIELDS), params, setting, lambda: None)
    assert {"finite", "lossless", "tangent", "gradient", "samples"} <= failed(numbers)


def good() -> dict:
    tangent = {"size": 0.3, "gradient": 1.0, "bend": 0.01, "bfloat16": 0.03, "nonfinite": 0.0}
    return {
        "transform": {"velocity": 1e-6, "x0": 1e-6},
        "flow": {"loss": [0.3] * 8, "linear": [1.0] * 8, "mean": 0.3, "linear_mean": 1.0},
        "tangent": {name: [value] * 8 for name, value in tangent.items()},
        "samples": {"finite": 1.0, "deviation": 1.0},
    }


@pytest.mark.parametrize(
    ("group", "key", "value", "names"),
    [
        ("transform", "velocity", 1e-3, {"lossless"}),
        ("flow", "mean", 0.95, {"learnt", "kept"}),
        ("flow", "loss", [0.3] * 7 + [0.4], {"kept"}),
        ("tangent", "size", [0.3] * 7 + [1.5], {"tangent"}),
        ("tangent", "bend", [0.2] + [0.01] * 7, {"bend"}),
        ("tangent", "bfloat16", [0.5] + [0.01] * 7, {"bfloat16"}),
        ("tangent", "gradient", [20.0] + [1.0] * 7, {"gradient"}),
        ("tangent", "nonfinite", [0.1] + [0.0] * 7, {"finite"}),
        ("samples", "deviation", 0.3, {"samples"}),
        ("samples", "finite", 0.9, {"finite"}),
    ],
)
def test_each_number_beyond_its_limit_fails_its_own_check(group, key, value, names):
    assert failed(good(), good()) == set()
    bad = good()
    bad[group][key] = value
    assert failed(bad, good()) == names
