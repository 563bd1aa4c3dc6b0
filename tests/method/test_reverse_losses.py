"""DMD, adversarial, TwinFlow, MeanFlow and trajectory losses against closed forms, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sprint_jax import losses, trigflow
from sprint_jax.losses import adversarial, dmd, meanflow, twinflow

SIGMA = 0.5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian(mean, deviation):
    """TrigFlow's F of data N(mean, deviation^2), exactly."""

    def F(x, t):
        x_t, cos, sin = x * SIGMA, jnp.cos(trigflow.expand(t, x)), jnp.sin(trigflow.expand(t, x))
        gain = cos * deviation**2 / ((cos * deviation) ** 2 + (sin * SIGMA) ** 2)
        x0 = mean + gain * (x_t - cos * mean)
        return (cos * x_t - x0) / (sin * SIGMA)

    return F


def score(x_t, t, mean, deviation):
    cos, sin = np.cos(t), np.sin(t)
    return -(x_t - cos * mean) / ((cos * deviation) ** 2 + (sin * SIGMA) ** 2)


def draw(count=64, seed=0):
    random = np.random.default_rng(seed)
    x0, z = (jnp.asarray(random.normal(size=(count, 1, 1, 1)) * SIGMA) for _ in range(2))
    return x0, z, jnp.asarray(random.uniform(0.1, 1.5, count))


def test_dmd_gradient_is_the_difference_of_scores():
    x0, z, t = draw()
    teacher, fake = (0.3, 0.4), (-0.2, 0.7)
    how = dict(teacher=gaussian(*teacher), fake=gaussian(*fake), sigma_d=SIGMA)

    def loss(x0):
        return dmd.dmd_loss(x0, z, t, normalize=False, **how)[0]

    found = jax.grad(loss)(x0) * len(t)
    x_t = trigflow.add_noise(x0, z, t)[:, 0, 0, 0]
    expected = score(x_t, t, *fake) - score(x_t, t, *teacher)
    expected *= (np.sin(t) * SIGMA) ** 2 / np.cos(t)
    np.testing.assert_allclose(found[:, 0, 0, 0], expected, rtol=1e-9, atol=1e-12)
    # The mean over the student's images is the gradient of the divergence by its mean.
    assert np.mean(expected) < 0  # the student lies left of the teacher: descent moves it right


def test_dmd_is_zero_where_both_agree_and_normalized_otherwise():
    x0, z, t = draw()
    same = gaussian(0.3, 0.4)
    loss, aux = dmd.dmd_loss(x0, z, t, teacher=same, fake=same, sigma_d=SIGMA)
    assert loss == 0 and not aux["gap"].any()
    other = gaussian(-0.2, 0.7)
    grad = jax.grad(lambda x0: dmd.dmd_loss(x0, z, t, teacher=same, fake=other, sigma_d=SIGMA)[0])(
        x0
    )
    real = dmd.denoise(same, trigflow.add_noise(x0, z, t), t, SIGMA)
    gap = dmd.denoise(other, trigflow.add_noise(x0, z, t), t, SIGMA) - real
    np.testing.assert_allclose(grad * len(t), gap / jnp.abs(x0 - real), rtol=1e-9)


def test_decoupled_dmd_at_one_noise_is_the_guided_form():
    """D is affine in F: with the same noise and times, engine and shield add up to guidance."""
    x0, z, t = draw()
    plain, null, fake = gaussian(0.3, 0.4), gaussian(0.0, 0.6), gaussian(-0.2, 0.7)

    def guided(x, t):
        return null(x, t) + 4.0 * (plain(x, t) - null(x, t))

    whole = dict(teacher=guided, fake=fake, sigma_d=SIGMA, normalize=False)
    parts = whole | dict(teacher=plain, engine=(guided, plain, z, t))
    grads = [
        jax.grad(lambda x0, h=how: dmd.dmd_loss(x0, z, t, **h)[0])(x0) for how in (whole, parts)
    ]
    np.testing.assert_allclose(*grads, rtol=1e-9, atol=1e-12)


def test_a_score_that_is_not_finite_moves_nothing():
    x0, z, t = draw()
    bad = gaussian(0.3, 0.4)
    how = dict(teacher=bad, fake=lambda x, t: bad(x, t).at[3].set(jnp.nan), sigma_d=SIGMA)
    grad = jax.grad(lambda x0: dmd.dmd_loss(x0, z, t, **how)[0])(x0)
    assert np.isfinite(grad).all() and grad[3] == 0


def test_the_fake_score_has_its_optimum_at_the_students_distribution():
    """Gauss-Hermite quadrature over x0 and z: the gradient of the exact mean loss vanishes there."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()
    a, b = (grid.ravel() for grid in np.meshgrid(nodes, nodes))
    weight = np.outer(weights, weights).ravel()
    mean, deviation = -0.2, 0.7
    x0, z = (jnp.asarray(v)[:, None, None, None] for v in (mean + deviation * a, SIGMA * b))
    t = jnp.full(len(a), 0.8)

    def loss(shift):
        exact = gaussian(mean, deviation)
        slope, offset = shift

        def F(x, t):
            return exact(x, t) + slope * x + offset

        return (weight * dmd.fake_score_loss(F, x0, z, t, SIGMA)[1]["fake_loss"]).sum()

    gradient = jax.grad(loss)(jnp.zeros(2))
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    assert loss(jnp.asarray([0.1, 0.0])) > loss(jnp.zeros(2)) < loss(jnp.asarray([0.0, -0.1]))


def test_fake_score_loss_is_the_weighted_denoising_loss():
    x0, z, t = draw()
    F = gaussian(0.1, 0.9)
    loss = dmd.fake_score_loss(F, x0, z, t, SIGMA)[1]["fake_loss"]
    x_t = trigflow.add_noise(x0, z, t)
    error = jnp.square(x0 - dmd.denoise(F, x_t, t, SIGMA))[:, 0, 0, 0]
    np.testing.assert_allclose(loss, error / (jnp.sin(t) * SIGMA) ** 2, rtol=1e-9)


def smooth(x):
    """Logits [B, 2] of an image, with curvature."""
    flat = x.reshape(len(x), -1)
    return jnp.stack([jnp.sin(flat).sum(-1), jnp.square(flat).sum(-1)], -1)


def test_penalties_are_gradients_of_the_critic():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 2, 1)))
    exact = adversarial.gradient_penalty(smooth, x)
    step, found = 1e-6, 0
    for index in np.ndindex(2, 2, 1):
        change = jnp.zeros_like(x).at[:, *index].set(step)
        slope = (smooth(x + change) - smooth(x - change)).mean(-1) / (2 * step)
        found += slope**2
    np.testing.assert_allclose(exact, found, rtol=1e-7)
    # In the direction of an orthonormal set of noises the approximations add up to it.
    noises = jnp.eye(4).reshape(4, 1, 2, 2, 1)
    total = sum(adversarial.approximate_penalty(smooth, x, noise, 1e-6) for noise in noises)
    np.testing.assert_allclose(total, exact, rtol=1e-5)
    # R1 can be differentiated by what the critic holds.
    by_weight = jax.grad(lambda w: adversarial.gradient_penalty(lambda x: w * smooth(x), x).sum())
    np.testing.assert_allclose(by_weight(1.0), 2 * exact.sum(), rtol=1e-9)


def test_adversarial_pairs_against_their_formulas():
    real, fake = jnp.asarray([[0.3, -2.0]]), jnp.asarray([[0.1, 4.0]])
    expected = {
        "hinge": ((0.7 + 3.0 + 1.1 + 5.0) / 4, -4.1 / 2),
        "softplus": (
            np.log1p(np.exp([-0.3, 2.0])).mean() + np.log1p(np.exp([0.1, 4.0])).mean(),
            np.log1p(np.exp([-0.1, -4.0])).mean(),
        ),
        "relativistic": (
            np.log1p(np.exp([-0.2, 6.0])).mean(),
            np.log1p(np.exp([0.2, -6.0])).mean(),
        ),
    }
    for name, (critic, generator) in adversarial.PAIRS.items():
        found = critic(real, fake)[0], generator(real, fake)[0]
        np.testing.assert_allclose(found, expected[name], rtol=1e-12, err_msg=name)


def test_area_under_the_curve():
    def ranks(*logits):
        return adversarial.rank_of_fakes(*map(jnp.asarray, logits)).tolist()

    assert ranks([5.0, 6.0, 7.0], [0.0, 1.0]) == [1, 1]
    assert ranks([0.0, 0.0, 0.0, 0.0], [0.0]) == [0.5]
    assert ranks([1.0, 3.0], [2.0, 0.0]) == [0.5, 1]


def test_twinflow_rests_where_the_fake_flow_is_the_real_one():
    latents, noise, _ = draw()
    t = jnp.linspace(0.05, 0.95, len(latents))

    def real(x, t):
        return x * trigflow.expand(t, x)

    def agreeing(x, t):
        return real(x, -t)  # asked at negative times

    one_step = noise - latents
    grad = jax.grad(
        lambda v: twinflow.rectify_loss(v, latents, noise, t, fake=agreeing, real=real)[0]
    )
    assert not grad(one_step).any()

    def shifted(x, t):
        return agreeing(x, t) + 0.3

    loss, aux = twinflow.rectify_loss(one_step, latents, noise, t, fake=shifted, real=real)
    np.testing.assert_allclose(loss, 0.09 / 2 * latents[0].size, rtol=1e-12)
    np.testing.assert_allclose(aux["gap"], 0.3, rtol=1e-12)


def test_the_twin_flow_is_the_flow_of_the_students_images_at_negative_times():
    latents, noise, _ = draw()
    t = jnp.linspace(0.05, 0.95, len(latents))
    seen = []

    def velocity(x, t):
        seen.append(t)
        return noise - latents

    assert twinflow.twin_flow_loss(velocity, latents, noise, t)[0] == 0
    np.testing.assert_array_equal(seen[0], -t)

    loss, aux = twinflow.twin_flow_loss(lambda x, t: velocity(x, t) + 0.3, latents, noise, t)
    size = latents[0].size
    np.testing.assert_allclose(loss, 0.09 / 2 * size, rtol=1e-12)
    np.testing.assert_allclose(aux["length"], 0.3 * size**0.5, rtol=1e-12)


def test_meanflow_is_zero_at_the_flow_map_of_a_gaussian():
    """Data N(0, a^2): x_r = x_t s_r / s_t with s_t^2 = ((1 - t) a)^2 + t^2."""
    a = 0.7

    def spread(t):
        return jnp.sqrt(((1 - t) * a) ** 2 + t**2)

    def teacher(x, t):
        s = trigflow.expand(t, x)
        return x * (s - (1 - s) * a**2) / spread(s) ** 2

    def average(scale, x, t, r):
        t, r = trigflow.expand(t, x), trigflow.expand(r, x)
        return scale * x * (1 - spread(r) / spread(t)) / (t - r)

    random = np.random.default_rng(0)
    latents, noise = (jnp.asarray(random.normal(size=(32, 1, 1, 1))) for _ in range(2))
    t = jnp.asarray(random.uniform(0.3, 1.0, 32))
    r = t * jnp.asarray(random.uniform(0, 0.9, 32))
    _, aux = meanflow.meanflow_loss(average, teacher, 1.0, latents, noise, t, r)
    np.testing.assert_allclose(aux["error"], 0, atol=1e-20)

    def weighted(scale, power):
        return meanflow.meanflow_loss(
            average, teacher, scale, latents, noise, t, r, power=power, constant=1e-6
        )[0]

    assert jax.grad(weighted)(1.2, 0.0) > 0 > jax.grad(weighted)(0.8, 0.0)


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_trajectory_loss_is_zero_at_the_consistency_function_of_a_gaussian(power):
    """Data N(0, a^2): the trajectory through x_t ends at x_t a / s_t with s_t^2 = (a cos)^2 + (sigma sin)^2."""
    a = 0.7
    x_t, _, t = draw()

    def end(x_t, t):
        t = trigflow.expand(t, x_t)
        return x_t * a / jnp.sqrt((a * jnp.cos(t)) ** 2 + (SIGMA * jnp.sin(t)) ** 2)

    def F(scale, x, t):
        angle, x_t = trigflow.expand(t, x), x * SIGMA
        return scale * (jnp.cos(angle) * x_t - end(x_t, t)) / (SIGMA * jnp.sin(angle))

    def loss(scale):
        run = lambda x, t: F(scale, x, t)  # noqa: E731
        how = dict(power=power, constant=1e-12)
        return losses.trajectory_loss(run, x_t, t, end(x_t, t), SIGMA, **how)

    value, aux = loss(1.0)
    assert value < 1e-15 and aux["error"].max() < 1e-12
    assert jax.grad(lambda s: loss(s)[0])(1.2) > 0 > jax.grad(lambda s: loss(s)[0])(0.8)
    if power:  # the gradient's length does not depend on the error: one of F's number a sample
        size = jnp.abs(F(1.0, x_t / SIGMA, t)).mean()
        np.testing.assert_allclose(jax.grad(lambda s: loss(s)[0])(3.0), 2 * size, rtol=1e-6)


@pytest.mark.parametrize("mean_norm", [False, True])
def test_lengths_are_those_of_the_gradient_by_the_networks_output(mean_norm):
    """Of the three losses that are not on images, by a network whose parameters are added to its output."""
    random = np.random.default_rng(0)
    shape = (5, 2, 2, 3)
    x0, z, zero = (jnp.asarray(random.normal(size=shape) * size) for size in (SIGMA, SIGMA, 0))
    t = jnp.asarray(random.uniform(0.3, 1.3, 5))
    teacher, fake = gaussian(0.3, 0.4), gaussian(-0.2, 0.7)

    def student(added, x, t):
        return fake(x, t) + added, jnp.sin(t)

    def scm(added):
        how = dict(sigma_d=SIGMA, warmup=1.0, mean_norm=mean_norm)
        return losses.scm_loss(student, teacher, added, x0, z, t, **how)

    def flow_map(added):
        average = lambda added, x, t, r: fake(x, t) + added  # noqa: E731
        return losses.meanflow_loss(average, teacher, added, x0, z, t / 1.6, t / 4)

    def path(added):
        run = lambda x, t: student(added, x, t)[0]  # noqa: E731
        return losses.trajectory_loss(run, x0, t, z, SIGMA)

    for loss in (scm, flow_map, path):
        gradient, aux = jax.grad(loss, has_aux=True)(zero)
        found = losses.per_sample_norm(gradient) * len(t)
        np.testing.assert_allclose(aux["length"], found, rtol=1e-9)


def test_package_names_every_loss():
    names = ("dmd_loss", "fake_score_loss", "meanflow_loss", "rectify_loss", "twin_flow_loss")
    for name in (*names, "trajectory_loss"):
        assert callable(getattr(losses, name))
