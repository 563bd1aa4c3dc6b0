"""The losses of SANA-Sprint (arXiv 2503.09641), as pure functions of arrays and callables.

Networks come in as callables that already hold their text and guidance: ``F(x, t)`` is a TrigFlow
network of ``x = x_t / sigma_d`` [B, h, w, C] and the angle ``t`` [B] (see `trigflow.to_trigflow`).
All losses are float32 and return per-sample values beside the mean, for the diagnostics.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .trigflow import add_noise, expand, flow_add_noise

Array = jax.Array


def per_sample_mean(x: Array) -> Array:
    """Mean over all axes but the first: [B, ...] -> [B]."""
    return x.reshape(x.shape[0], -1).mean(-1)


def per_sample_norm(x: Array) -> Array:
    """Euclidean norm over all axes but the first: [B, ...] -> [B]."""
    return jnp.sqrt(jnp.square(x).reshape(x.shape[0], -1).sum(-1))


def flow_matching_loss(velocity: Callable, latents: Array, noise: Array, t_fm: Array):
    """``|v(x_fm, t_fm) - (noise - latents)|^2`` with ``x_fm = (1 - t_fm) latents + t_fm noise``.

    Args:
      velocity: ``velocity(x_fm, t_fm)``.
      latents: unit-variance latents [B, h, w, C] (no ``sigma_d``); noise: N(0, 1), same shape.
      t_fm: flow times [B], as from `trigflow.sample_flow_time`.

    Returns:
      ``(mean loss, {'loss': [B], 't': angle-free flow time [B]})``.
    """
    v = velocity(flow_add_noise(latents, noise, t_fm), t_fm)
    loss = per_sample_mean(jnp.square(v - (noise - latents)))
    return loss.mean(), {"loss": loss, "t": t_fm}


def scm_loss(
    student: Callable,
    teacher: Callable,
    params,
    x0: Array,
    z: Array,
    t: Array,
    *,
    sigma_d: float,
    warmup: Array,
    tangent_constant: float = 0.1,
    mean_norm: bool = False,
    shared_primal: bool = True,
):
    """Continuous-time consistency distillation (sCM), Eq. (9), in its stable, rearranged form.

    With everything multiplied by ``cos t sin t`` so that no factor is singular:

        g = -cos^2 t (sigma_d F^- - dx_t/dt) - r (cos t sin t x_t + sigma_d dF^-),
        dF^- = cos t sin t dF^-/dt along the teacher's trajectory, by one `jax.jvp`;
        g <- g / (|g| + c),
        loss = w(t) / exp(u) |F - F^- - g|^2 + u,   w(t) = 1 / (sigma_d tan t),  u = logvar(t).

    Args:
      student: ``student(params, x, t) -> (F, logvar [B])``; gradients flow to ``params``.
      teacher: ``teacher(x, t) -> F`` of the frozen teacher, guidance included.
      params: the student's parameters.
      x0, z: data and noise [B, h, w, C], both of standard deviation ``sigma_d``.
      t: angles [B] in (0, pi/2).
      warmup: tangent warm-up ``r`` in [0, 1], a function of the count of generator updates.
      tangent_constant: ``c``.
      mean_norm: root-mean-square instead of Euclidean norm of ``g`` (sCM paper's choice; the
        published SANA-Sprint code takes the Euclidean one).
      shared_primal: take ``F`` from the jvp's own primal (3.96 forward-equivalents instead of 4.96);
        False runs a separate jvp, as the references do. Both have the same gradient.

    Returns:
      ``(mean loss, aux)`` with per-sample aux [B]: 'loss', 't', 'tangent_norm' (before
      normalisation), 'teacher_gap' (``|F - F_teacher|`` root mean square), 'error' (mean ``g^2``
      after normalisation, weighted) and 'logvar'.
    """
    x_t = add_noise(x0, z, t)
    dx_t = jax.lax.stop_gradient(sigma_d * teacher(x_t / sigma_d, t))
    cos, sin = jnp.cos(expand(t, x_t)), jnp.sin(expand(t, x_t))

    primals = (x_t / sigma_d, t)
    tangents = (cos * sin * dx_t / sigma_d, jnp.cos(t) * jnp.sin(t))
    if shared_primal:
        (F, logvar), (dF, _) = jax.jvp(lambda x, t: student(params, x, t), primals, tangents)
    else:
        fixed = jax.lax.stop_gradient(params)
        _, (dF, _) = jax.jvp(lambda x, t: student(fixed, x, t), primals, tangents)
        F, logvar = student(params, *primals)
    F_minus, dF = jax.lax.stop_gradient((F, dF))

    g = -(cos**2) * (sigma_d * F_minus - dx_t) - warmup * (cos * sin * x_t + sigma_d * dF)
    norm = per_sample_norm(g)
    scale = (g[0].size ** -0.5) if mean_norm else 1.0
    g = g / expand(norm * scale + tangent_constant, g)

    weight = 1 / (sigma_d * jnp.tan(t))
    error = weight * per_sample_mean(jnp.square(F - F_minus - g))
    loss = error * jnp.exp(-logvar) + logvar
    aux = {
        "loss": loss,
        "t": t,
        "tangent_norm": norm,
        "teacher_gap": jnp.sqrt(per_sample_mean(jnp.square(F_minus - dx_t / sigma_d))),
        "error": error,
        "logvar": logvar,
    }
    return loss.mean(), jax.lax.stop_gradient(aux)


def ladd_generator_loss(discriminate: Callable, x0: Array, z: Array, t: Array, sigma_d: float):
    """Hinge generator loss ``-mean D(renoised student x0)`` of LADD.

    Args:
      discriminate: ``discriminate(x, t) -> logits [B, M]``: frozen teacher features into heads.
      x0: the student's images [B, h, w, C], standard deviation ``sigma_d``; gradients flow here.
      z: noise of standard deviation ``sigma_d``; t: angles [B] of the discriminator's distribution.

    Returns:
      ``(mean loss, {'logits': [B]})``.
    """
    logits = discriminate(add_noise(x0, z, t) / sigma_d, t)
    return -logits.mean(), {"logits": logits.mean(-1)}


def ladd_discriminator_loss(
    features: Callable,
    heads: Callable,
    real: tuple[Array, Array, Array],
    fake: tuple[Array, Array, Array],
    misaligned: tuple[Array, Array, Array] | None,
    *,
    sigma_d: float,
    r1_weight: float = 0.0,
):
    """Hinge discriminator loss of LADD: ``(mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2``.

    Args:
      features: ``features(x, t) -> tuple of [B, h, w, d]`` of the frozen teacher with the batch's text.
      heads: ``heads(features) -> logits [B, M]``; gradients flow to what it holds.
      real, fake: ``(x0, z, t)``: images [B, h, w, C], noise, angles [B]; each has its own times.
      misaligned: real images paired with other samples' text, ``(rolled x0, z, t)``, which count as
        fake; None leaves them out.
      r1_weight: weight of the gradient penalty: squared gradient norm of the summed logits with
        respect to the heads' input features of the real batch, divided by the number of heads.

    Returns:
      ``(loss, aux)``, aux with mean logits per sample 'real' [B], 'fake' [B], 'misaligned' [B]
      (if any), and 'r1' (if weighted).
    """

    def noisy_features(x0, z, t):
        return jax.lax.stop_gradient(features(add_noise(x0, z, t) / sigma_d, t))

    # Each kind has a batch of its own. Published code puts fakes and misaligned pairs into one; its batch
    # norm works in groups of 8, and so gives the same wherever 8 divides the batch.
    kinds = {"fake": fake} | ({"misaligned": misaligned} if misaligned is not None else {})
    negative = {name: heads(noisy_features(*triple)) for name, triple in kinds.items()}
    positive = noisy_features(*real)
    real_logits = heads(positive)
    fake_loss = sum(jax.nn.relu(1 + logits).mean() for logits in negative.values()) / len(negative)
    loss = (jax.nn.relu(1 - real_logits).mean() + fake_loss) / 2

    aux = {name: logits.mean(-1) for name, logits in ({"real": real_logits} | negative).items()}
    if r1_weight:
        gradients = jax.grad(lambda inputs: heads(inputs).sum())(positive)
        penalty = sum(jnp.square(per_sample_norm(g.astype(jnp.float32))).mean() for g in gradients)
        aux["r1"] = penalty / len(gradients)
        loss = loss + r1_weight * aux["r1"]
    return loss, jax.lax.stop_gradient(aux)
