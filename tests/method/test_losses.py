"""The losses against formulas written out in numpy, and the cost of the sCM branch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.tiny_sana import cast, fast_jit, setup

from sprint_jax import losses, trigflow
from sprint_jax.models.sana import SIZES, SanaTransformer

pytestmark = pytest.mark.usefixtures("quick")

SIGMA_D = 0.5
SHAPE = (3, 2, 3, 4)


def draw(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape) for shape in shapes]


def expand(t):
    return np.reshape(t, (-1, 1, 1, 1))


# --- sCM on a linear network, by hand


def linear_student(params, x, t):
    """F = x W + t b + a and logvar = l t + m."""
    F = x @ params["W"] + t[:, None, None, None] * params["b"][None, None, None]
    F = F + params["a"][None, None, None]
    return F, params["l"] * t + params["m"]


def draw_linear(seed=0):
    W, b, a, T = draw((4, 4), (4,), (4,), (4, 4), seed=seed)
    return {"W": W, "b": b, "a": a, "l": np.float64(0.3), "m": np.float64(-0.7)}, T


def scm_by_hand(p, T, x0, z, t, *, warmup, constant, mean_norm):
    """Loss, its gradient and its parts: the derivative of F is written out, no autodiff."""
    n, batch = x0[0].size, len(x0)
    cos, sin = np.cos(expand(t)), np.sin(expand(t))
    x_t = cos * x0 + sin * z
    x = x_t / SIGMA_D
    F_teacher = x @ T
    F = x @ p["W"] + expand(t) * p["b"] + p["a"]
    dF = cos * sin * (F_teacher @ p["W"] + p["b"])  # dx/dt = F_teacher, dt/dt = 1
    velocity = SIGMA_D * F_teacher
    g = -(cos**2) * (SIGMA_D * F - velocity) - warmup * (cos * sin * x_t + SIGMA_D * dF)
    norm = np.sqrt((g**2).sum((1, 2, 3)))
    g = g / expand((norm / np.sqrt(n) if mean_norm else norm) + constant)
    weight = 1 / (SIGMA_D * np.tan(t))
    logvar = p["l"] * t + p["m"]
    error = weight * (g**2).mean((1, 2, 3))
    per_sample = error * np.exp(-logvar) + logvar
    to_F = expand(weight * np.exp(-logvar)) * -2 * g / (n * batch)
    to_logvar = (1 - error * np.exp(-logvar)) / batch
    gradient = {
        "W": np.einsum("bhwi,bhwo->io", x, to_F),
        "b": (expand(t) * to_F).sum((0, 1, 2)),
        "a": to_F.sum((0, 1, 2)),
        "l": (t * to_logvar).sum(),
        "m": to_logvar.sum(),
    }
    aux = {
        "loss": per_sample,
        "t": t,
        "tangent_norm": norm,
        "teacher_gap": np.sqrt(((F - F_teacher) ** 2).mean((1, 2, 3))),
        "error": error,
        "logvar": logvar,
        "length": np.sqrt((to_F**2).sum((1, 2, 3))) * batch,
    }
    return per_sample.mean(), gradient, aux


@pytest.mark.parametrize("shared_primal", [True, False])
@pytest.mark.parametrize("mean_norm", [True, False])
@pytest.mark.parametrize(("warmup", "constant"), [(0.0, 0.1), (0.37, 0.1), (1.0, 0.6)])
def test_scm_equals_the_hand_derivation(shared_primal, mean_norm, warmup, constant):
    params, T = draw_linear()
    x0, z = (SIGMA_D * x for x in draw(SHAPE, SHAPE, seed=1))
    t = np.array([0.2, 0.9, 1.5])
    expected, gradient, aux = scm_by_hand(
        params, T, x0, z, t, warmup=warmup, constant=constant, mean_norm=mean_norm
    )
    options = dict(tangent_constant=constant, mean_norm=mean_norm, shared_primal=shared_primal)
    options |= dict(sigma_d=SIGMA_D, warmup=warmup)
    loss = functools.partial(losses.scm_loss, linear_student, lambda x, t: x @ T, **options)
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, actual_aux), actual = run(*jax.tree.map(jnp.asarray, (params, x0, z, t)))
        assert value.dtype == jnp.float64
        assert value == pytest.approx(expected, rel=1e-12)
        assert_close(dict(actual), gradient, 1e-12)
        assert_close(dict(actual_aux), aux, 1e-12)


def test_scm_of_the_perfect_student_keeps_only_the_tangent():
    """Student = teacher = exact velocity of one point: F constant on the line, so g = 0."""
    latents, noise = draw(SHAPE, SHAPE, seed=3)
    t = np.array([0.3, 1.0, 1.4])

    def exact(params, x, t):
        # All data are one point c: x = cos(t) c + sin(t) eps, so F = (cos(t) x - c) / sin(t).
        time = trigflow.expand(t, x)
        F = (jnp.cos(time) * x - params * jnp.asarray(latents)) / jnp.sin(time)
        return F, jnp.zeros_like(t)

    with jax.enable_x64(True):
        _, aux = losses.scm_loss(
            exact,
            lambda x, t: exact(1.0, x, t)[0],
            jnp.float64(1),
            *map(jnp.asarray, (SIGMA_D * latents, SIGMA_D * noise, t)),
            sigma_d=SIGMA_D,
            warmup=1.0,
        )
    np.testing.assert_allclose(aux["tangent_norm"], 0, atol=1e-13)
    np.testing.assert_allclose(aux["teacher_gap"], 0, atol=1e-13)


# --- sCM on the real network


def real_student(fields, inputs):
    model = SanaTransformer(**fields)

    def student(params, x, t):
        def velocity(x_fm, t_fm):
            return model.apply({"params": params}, x_fm, t_fm, *inputs, with_logvar=True)

        return trigflow.to_trigflow(velocity)(x, t)

    return student


@pytest.mark.parametrize(
    ("remat", "scan"),
    [
        ("none", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("full", True), ("none", False)]
        ),
    ],
)
def test_shared_and_separate_jvp_have_the_same_gradient(remat, scan):
    fields, params, inputs = setup()
    blocks = jax.tree.map(lambda leaf: leaf[:2], params["transformer_blocks"])
    params = cast(params | {"transformer_blocks": blocks}, jnp.float32)
    fields = fields | dict(num_layers=2, remat=remat, scan=scan, out_channels=3)
    # As many channels out as in.
    params["proj_out"] = jax.tree.map(lambda leaf: leaf[..., :3], params["proj_out"])
    x, _, text, mask, guidance = cast(inputs, jnp.float32)
    z, v = (jnp.asarray(a, jnp.float32) for a in draw(x.shape, x.shape, seed=5))
    student = real_student(fields, (text, mask, guidance))

    def loss(params, teacher, shared):
        return losses.scm_loss(
            student,
            lambda x, t: teacher * x + v,
            params,
            SIGMA_D * x,
            SIGMA_D * z,
            jnp.array([0.4, 1.2]),
            sigma_d=SIGMA_D,
            warmup=0.7,
            shared_primal=shared,
        )

    @fast_jit
    def run(params, teacher):
        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return [grad(params, teacher, shared) for shared in (True, False)]

    shared, separate = run(params, jnp.float32(0.3))
    (value, aux), (gradient, to_teacher) = shared
    assert_close(shared[0], separate[0], 1e-5)
    assert_close(gradient, separate[1][0], 1e-5)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    # The teacher matters to the value and has no gradient.
    assert to_teacher == separate[1][1] == 0
    other, other_aux = run(params, jnp.float32(0.6))[0][0]
    assert abs(other - value) > 1e-5
    assert jnp.abs(other_aux["teacher_gap"] - aux["teacher_gap"]).min() > 1e-3
    assert value.dtype == jnp.float32
    assert {leaf.shape for leaf in jax.tree.leaves(aux)} == {(2,)}


@pytest.mark.slow
def test_forward_equivalents():
    """At the width of the 0.6B model, one image of 1024 px; unrolled, as the body of a loop is counted once."""
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    x, t = float32(1, 32, 32, 32), float32(1)
    inputs = float32(1, 300, 2304), float32(1, 300), float32(1)

    def flops(layers, make):
        fields = SIZES["600m"] | dict(logvar=True, scan=False, num_layers=layers)
        params = jax.eval_shape(SanaTransformer(**fields).init, jax.random.key(0), x, t, *inputs)
        run = fast_jit(
            lambda params, x, t, inputs: make(real_student(fields, inputs), params, x, t)
        )
        return run.lower(params["params"], x, t, inputs).compile().cost_analysis()["flops"]

    def forward(student, params, x, t):
        return student(params, x, t)

    def tangent(student, params, x, t):
        return jax.jvp(lambda x, t: student(params, x, t), (x, t), (x, t))

    def scm(shared, student, params, x, t):
        options = dict(sigma_d=SIGMA_D, warmup=0.5, shared_primal=shared)
        loss = functools.partial(losses.scm_loss, student, lambda x, t: x, **options)
        return jax.value_and_grad(loss, has_aux=True)(params, x, x, t)

    one = flops(2, forward)
    assert 1.9 < flops(2, tangent) / one <= 2.05
    assert 3.8 < flops(2, functools.partial(scm, True)) / one <= 4.1
    assert 4.6 < flops(2, functools.partial(scm, False)) / one <= 5.1
    # The published count of a whole forward, from its first block and each further one.
    first = flops(1, forward)
    assert first + 27 * (one - first) == pytest.approx(1121.5e9, rel=0.01)


# --- LADD


def test_generator_loss():
    x0, z, w = draw(SHAPE, SHAPE, SHAPE[1:])
    t = np.array([0.2, 0.9, 1.5])

    def discriminate(x, t):  # two logits per sample
        projection = (x * w[None]).sum((1, 2, 3))
        return jnp.stack([projection, 2 * projection + t], axis=1)

    def run(x0):
        return losses.ladd_generator_loss(discriminate, x0, *map(jnp.asarray, (z, t)), SIGMA_D)

    with jax.enable_x64(True):
        (value, aux), gradient = jax.value_and_grad(run, has_aux=True)(jnp.asarray(x0))
        projection = (noisy(x0, z, t) * w).sum((1, 2, 3))
        assert value == pytest.approx(-(3 * projection + t).mean() / 2, rel=1e-12)
        assert_close(aux, {"logits": (3 * projection + t) / 2}, 1e-12)
        expected = -np.cos(expand(t)) * w * 3 / (SIGMA_D * 2 * len(x0))
        assert_close(gradient, expected, 1e-12)


TIMES = ([0.1, 0.7, 1.2], [1.5, 0.3, 0.4], [0.5, 0.8, 1.1])
REAL, FAKE, ROLLED = ((*draw(SHAPE, SHAPE, seed=i + 1), np.array(t)) for i, t in enumerate(TIMES))
HEADS = {"w": draw((4,), seed=4)[0] / 4, "q": np.float64(0.05)}


def features(x, t):
    """Two feature maps of a noisy image."""
    return x, x**2 + t[:, None, None, None]


def heads(params, maps):
    """The second head sees the whole batch, as batch norm does."""
    second = params["q"] * (maps[1] ** 2).sum((1, 2, 3))[:, None]
    return (maps[0] @ params["w"]).reshape(len(maps[0]), -1), second - second.mean(0, keepdims=True)


def noisy(x0, z, t):
    return (np.cos(expand(t)) * x0 + np.sin(expand(t)) * z) / SIGMA_D


def discriminator_loss(rolled, heads=heads, **options):
    """((loss, aux), (gradient by the heads, gradient by the real images)), in float64."""
    real, fake, rolled = jax.tree.map(jnp.asarray, (REAL, FAKE, rolled))

    def run(params, real):
        join = lambda x, t: jnp.concatenate(heads(params, features(x, t)), axis=1)  # noqa: E731
        kinds = real, fake, rolled
        return losses.ladd_discriminator_loss(join, *kinds, sigma_d=SIGMA_D, **options)

    gradient = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    return gradient(jax.tree.map(jnp.asarray, HEADS), real)


@pytest.mark.parametrize("rolled", [None, ROLLED], ids=["two kinds", "misaligned pairs"])
def test_discriminator_hinge(rolled):
    """Fakes and misaligned pairs are batches of their own."""
    kinds = dict(real=REAL, fake=FAKE) | ({} if rolled is None else dict(misaligned=rolled))
    logits = {
        name: np.concatenate(heads(HEADS, features(noisy(*each), each[2])), axis=1)
        for name, each in kinds.items()
    }
    aux_expected = {name: each.mean(1) for name, each in logits.items()}
    real, fake = logits.pop("real"), np.concatenate(list(logits.values()))
    assert 0 < (real > 1).mean() < 1 and 0 < (fake < -1).mean() < 1  # both sides of both hinges
    expected = (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()) / 2
    with jax.enable_x64(True):
        (value, aux), (gradient, (to_images, *_)) = discriminator_loss(rolled)
        assert value == pytest.approx(expected, rel=1e-12)
        assert_close(aux, aux_expected, 1e-12)
        assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
        assert not to_images.any()


def test_pairs_that_are_not_misaligned_count_as_the_fakes_of_their_rows():
    with jax.enable_x64(True):
        two, all_wrong = discriminator_loss(None), discriminator_loss(ROLLED)
        for wrong, expected in ((False, two), (True, all_wrong)):
            (value, aux), (gradient, _) = discriminator_loss(ROLLED, wrong=jnp.full(3, wrong))
            assert value == pytest.approx(float(expected[0][0]), rel=1e-12)
            assert_close(gradient, expected[1][0], 1e-12)
            assert np.isnan(aux["misaligned"]).all() == (not wrong)
        # Of single rows, which the second head would tie together.
        alone = lambda params, maps: heads(params, maps)[:1] * 2  # noqa: E731
        wrong = jnp.array([True, False, True])
        (value, aux), _ = discriminator_loss(ROLLED, alone, wrong=wrong)
        real, fake, rolled = (
            (features(noisy(*each), each[2])[0] @ HEADS["w"]).reshape(3, -1)
            for each in (REAL, FAKE, ROLLED)
        )
        negative = np.concatenate([fake, rolled[[0]], fake[[1]], rolled[[2]]])
        expected = (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + negative).mean()) / 2
        assert value == pytest.approx(expected, rel=1e-12)
        assert np.isnan(aux["misaligned"]).tolist() == [False, True, False]


def test_discriminator_penalties():
    """D = q sum f^2 of f = x / sigma_d has the gradient 2 q f / (count sigma_d) by its mean logit."""

    def square(params, maps):
        return params["q"] * (maps[0] ** 2).sum((1, 2, 3))[:, None], jnp.zeros((len(maps[0]), 1))

    def size(x):
        return (x**2).sum((1, 2, 3)).mean()

    with jax.enable_x64(True):
        plain = discriminator_loss(None, square)[0][0]
        for clean in (False, True):
            inputs = {"r1": REAL, "r2": FAKE}
            seen = {k: v[0] / SIGMA_D if clean else noisy(*v) for k, v in inputs.items()}
            slope = {
                # Two heads, of which one is constant; noise adds cos(t) inside.
                name: (2 * HEADS["q"] / 2 / SIGMA_D) ** 2
                * size(x * (1 if clean else np.cos(expand(inputs[name][2]))))
                for name, x in seen.items()
            }
            plain = discriminator_loss(None, square, clean=clean)[0][0]
            for weights in ({"r1": 0.3}, {"r2": 0.3}, {"r1": 0.2, "r2": 0.7}):
                value = discriminator_loss(None, square, clean=clean, **weights)[0][0]
                expected = sum(weight / 2 * slope[name] for name, weight in weights.items())
                assert value - plain == pytest.approx(expected, rel=1e-9)
        # In one direction, by a difference.
        noise, scale = jnp.asarray(REAL[1]), 1e-6
        how = {"clean": True, "noise": noise, "noise_scale": scale}
        value = discriminator_loss(None, square, r1=1.0, **how)[0][0]
        along = (HEADS["q"] / SIGMA_D**2 * (REAL[0] * REAL[1])).sum((1, 2, 3))
        assert value - plain == pytest.approx((along**2).mean() / 2, rel=1e-4)


def test_generator_of_pairs():
    """A relativistic generator sees the real image at the same noise."""
    with jax.enable_x64(True):
        z, t = map(jnp.asarray, REAL[1:])
        join = lambda x, t: jnp.concatenate(heads(HEADS, features(x, t)), axis=1)  # noqa: E731
        how = dict(sigma_d=SIGMA_D, real=jnp.asarray(REAL[0]))
        pair = losses.adversarial.relativistic_generator
        value, _ = losses.ladd_generator_loss(
            join, jnp.asarray(FAKE[0]), z, t, generator=pair, **how
        )
        logits = [
            np.concatenate(heads(HEADS, features(noisy(x0, *REAL[1:]), REAL[2])), axis=1)
            for x0 in (REAL[0], FAKE[0])
        ]
        assert value == pytest.approx(np.log1p(np.exp(logits[0] - logits[1])).mean(), rel=1e-12)


# --- Flow matching


def test_flow_matching_loss():
    latents, noise, W = draw(SHAPE, SHAPE, (4, 4))
    t = np.array([0.0, 0.4, 1.0])
    with jax.enable_x64(True):

        def run(W):
            velocity = lambda x, t: x @ W + trigflow.expand(t, x)  # noqa: E731
            return losses.flow_matching_loss(velocity, *map(jnp.asarray, (latents, noise, t)))

        (value, aux), gradient = jax.value_and_grad(run, has_aux=True)(jnp.asarray(W))
        x = (1 - expand(t)) * latents + expand(t) * noise
        residual = x @ W + expand(t) - (noise - latents)
        assert value == pytest.approx((residual**2).mean(), rel=1e-12)
        assert_close(aux, {"loss": (residual**2).mean((1, 2, 3)), "t": t}, 1e-12)
        expected = 2 * np.einsum("bhwi,bhwo->io", x, residual) / x.size
        assert_close(gradient, expected, 1e-12)
