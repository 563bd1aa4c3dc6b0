"""The loss of continuous-time consistency distillation (sCM), which turns a teacher into a student."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ..trigflow import add_noise, expand
from .per_sample import per_sample_mean, per_sample_norm

Array = jax.Array


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
      after normalisation, weighted), 'logvar' and 'length', of the loss's gradient by F.
    """
    chex.assert_shape([z, t], [x0.shape, x0.shape[:1]])
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
    chex.assert_shape([F, logvar, dx_t], [x0.shape, t.shape, x0.shape])
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
        "length": 2 * weight * jnp.exp(-logvar) * per_sample_norm(F - F_minus - g) / g[0].size,
    }
    return loss.mean(), jax.lax.stop_gradient(aux)
