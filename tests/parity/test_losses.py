"""One step of every loss on images against torch, written from the papers' formulas; float64, relative 1e-9.

The networks are ``tanh(x W + t a) V`` of flattened images. Gradients are by all that a loss trains.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.func import jvp
from torch.nn.functional import softplus

from sprint_jax import losses, trigflow
from sprint_jax.losses import adversarial

B, D, H, S = 6, 12, 16, 0.5
SHAPE = (B, 2, 2, 3)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def draws():
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape)  # noqa: E731
    nets = {
        name: (draw(D, H) / 3, draw(H), draw(H, D) / 4) for name in ("student", "teacher", "fake")
    }
    values = {"noise": draw(B, D) * S, "z": draw(B, D) * S, "real": draw(B, D) * S, "e": draw(B, D)}
    return nets, values | {"t": random.uniform(0.2, 1.4, B)}


def ours(weights, x, t):
    w, a, v = weights
    return (jnp.tanh(x.reshape(len(x), -1) @ w + t[:, None] * a[None]) @ v).reshape(x.shape)


def theirs(weights, x, t):
    w, a, v = weights
    return torch.tanh(x @ w + t[:, None] * a) @ v


def tensors(tree):
    return jax.tree.map(lambda a: torch.tensor(a, requires_grad=True), tree)


def images(values, *names):
    return [jnp.asarray(values[name]).reshape(SHAPE) for name in names]


def gradients_of(loss, *inputs):
    return [gradient.numpy().ravel() for gradient in torch.autograd.grad(loss, inputs)]


def same(found, expected):
    for mine, other in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine).ravel(), other, rtol=1e-9, atol=1e-13)


def test_dmd_and_its_fake_score(draws):
    """rCM's form, whose loss is twice ours: half of the sum of squares."""
    nets, values = draws
    z1, z, t = *images(values, "noise", "z"), jnp.asarray(values["t"])
    end = jnp.full(B, np.pi / 2)

    def sample(student):
        return trigflow.predict_x0(z1, ours(student, z1 / S, end), end, S)

    def loss(student):
        teacher, fake = (lambda x, t, n=n: ours(nets[n], x, t) for n in ("teacher", "fake"))
        return losses.dmd_loss(sample(student), z, t, teacher=teacher, fake=fake, sigma_d=S)[0]

    def fake_loss(fake):
        x0 = sample(nets["student"])
        return losses.fake_score_loss(lambda x, t: ours(fake, x, t), x0, z, t, S)[0]

    their = tensors(nets)
    tz1, tz, tt = (torch.tensor(values[name]) for name in ("noise", "z", "t"))
    cos, sin = torch.cos(tt)[:, None], torch.sin(tt)[:, None]
    x0 = -S * theirs(their["student"], tz1 / S, torch.full((B,), np.pi / 2, dtype=torch.float64))
    x0 = x0 + np.cos(np.pi / 2) * tz1
    x_t = cos * x0.detach() + sin * tz
    denoised = {n: cos * x_t - sin * S * theirs(their[n], x_t / S, tt) for n in ("teacher", "fake")}
    with torch.no_grad():
        scale = (x0 - denoised["teacher"]).abs().mean(1, keepdim=True)
        g = (denoised["fake"] - denoised["teacher"]) / scale.clamp(min=1e-5)
    expected = ((x0 - (x0 - g).detach()) ** 2).sum() / B / 2
    same(jax.grad(loss)(nets["student"]), gradients_of(expected, *their["student"]))
    error = ((x0.detach() - denoised["fake"]) ** 2 / sin**2).mean() / S**2
    same(jax.grad(fake_loss)(nets["fake"]), gradients_of(error, *their["fake"]))


def test_twinflow(draws):
    """Their means over an image's numbers, times half of these."""
    nets, values = draws
    latents, noise = (each / S for each in images(values, "real", "z"))
    s = jnp.asarray(values["t"]) / 1.6
    real = lambda x, t: ours(nets["teacher"], x, t)  # noqa: E731

    def twin(student):
        return losses.twin_flow_loss(lambda x, t: ours(student, x, t), latents, noise, s)[0]

    def rectify(student):
        z1 = images(values, "noise")[0] / S
        one_step = ours(student, z1, jnp.ones(B))
        fake = lambda x, t: ours(nets["student"], x, t)  # noqa: E731
        return losses.rectify_loss(one_step, z1 - one_step, noise, s, fake=fake, real=real)[0]

    student, teacher = tensors(nets["student"]), tensors(nets["teacher"])
    x, n, z1 = (torch.tensor(values[name]) / S for name in ("real", "z", "noise"))
    ts = torch.tensor(values["t"]) / 1.6
    mix = (1 - ts)[:, None] * x + ts[:, None] * n
    error = ((theirs(student, mix, -ts) - (n - x)) ** 2).mean() * D / 2
    same(jax.grad(twin)(nets["student"]), gradients_of(error, *student))

    one = theirs(student, z1, torch.ones(B, dtype=torch.float64))
    fakes = (z1 - one).detach()
    mix = (1 - ts)[:, None] * fakes + ts[:, None] * n
    difference = (theirs(student, mix, -ts) - theirs(teacher, mix, ts)).detach()
    error = ((one - (one.detach() - difference)) ** 2).mean() * D / 2
    same(jax.grad(rectify)(nets["student"]), gradients_of(error, *student))


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_meanflow(power, draws):
    nets, values = draws
    latents, noise = (each / S for each in images(values, "real", "z"))
    t, r = jnp.asarray(values["t"]) / 1.6, jnp.asarray(values["t"]) / 4
    teacher = lambda x, t: ours(nets["teacher"], x, t)  # noqa: E731

    def average(student, x, t, r):
        return ours(student, x, t + jnp.sin(r))

    def loss(student):
        how = dict(power=power, constant=1e-3)
        return losses.meanflow_loss(average, teacher, student, latents, noise, t, r, **how)[0]

    student = tensors(nets["student"])
    x, n = (torch.tensor(values[name]) / S for name in ("real", "z"))
    tt, tr = torch.tensor(values["t"]) / 1.6, torch.tensor(values["t"]) / 4
    mix = (1 - tt)[:, None] * x + tt[:, None] * n
    v = theirs(jax.tree.map(torch.tensor, nets["teacher"]), mix, tt)
    function = lambda x, t, r: theirs(student, x, t + torch.sin(r))  # noqa: E731
    tangents = (v, torch.ones_like(tt), torch.zeros_like(tr))
    u, du = jvp(function, (mix, tt, tr), tangents)
    error = ((u - (v - (tt - tr)[:, None] * du).detach()) ** 2).sum(1)
    weighted = (error / (error.detach() + 1e-3) ** power).mean()
    same(jax.grad(loss)(nets["student"]), gradients_of(weighted, *student))


@pytest.mark.parametrize("name", adversarial.PAIRS)
def test_critic_with_exact_penalties_and_its_generator(name, draws):
    """Paired, at one noise; R3GAN's penalties by a second derivative."""
    nets, values = draws
    real, fake, z = images(values, "real", "noise", "z")
    t, gamma = jnp.asarray(values["t"]), 0.3
    critic, generator = adversarial.PAIRS[name]
    logits = lambda weights: lambda x, t: ours(weights, x, t).reshape(B, -1)  # noqa: E731

    def loss(weights):
        pair = (real, z, t), (fake, z, t)
        how = dict(sigma_d=S, critic=critic, r1=gamma, r2=gamma)
        return losses.ladd_discriminator_loss(logits(weights), *pair, **how)[0]

    def generate(x):
        how = dict(real=real, generator=generator)
        return losses.ladd_generator_loss(logits(nets["fake"]), x, z, t, S, **how)[0]

    weights = tensors(nets["fake"])
    tt = torch.tensor(values["t"])
    cos, sin = torch.cos(tt)[:, None], torch.sin(tt)[:, None]
    inputs = {n: torch.tensor(values[n], requires_grad=True) for n in ("real", "noise")}
    seen = {
        n: theirs(weights, (cos * x + sin * torch.tensor(values["z"])) / S, tt)
        for n, x in inputs.items()
    }
    r, f = seen["real"], seen["noise"]
    expected, own = {
        "hinge": ((torch.relu(1 - r) + torch.relu(1 + f)).mean() / 2, -f.mean()),
        "softplus": ((softplus(-r) + softplus(f)).mean(), softplus(-f).mean()),
        "relativistic": (softplus(f - r).mean(), softplus(r.detach() - f).mean()),
    }[name]
    (by_image,) = torch.autograd.grad(own, inputs["noise"], retain_graph=True)
    for n, x in inputs.items():
        (slope,) = torch.autograd.grad(seen[n].mean(1).sum(), x, create_graph=True)
        expected = expected + gamma / 2 * (slope**2).sum(1).mean()
    same(jax.grad(loss)(nets["fake"]), gradients_of(expected, *weights))
    same(jax.grad(generate)(fake), [by_image.numpy().ravel()])
