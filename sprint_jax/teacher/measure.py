"""Measurements of a teacher ahead of its distillation, on latents that it was not trained on.

Measurements by time are in 8 equal bins of flow time, or of TrigFlow's angle, with one batch at each of equally
spaced times. Noise is drawn from fixed keys: all teachers are measured on the same samples.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import losses, sampling, trigflow
from ..models import functions
from ..models.sana import SanaTransformer
from ..parallel.sharding import in_use
from ..training.diagnostics import BINS, tangent_checks

Array = jax.Array


class Setting(NamedTuple):
    """The data and constants of a measurement.

    Attributes:
      batches: of equal size, on devices: latents [B, h, w, C], text [B, L, D], mask [B, L].
      null_text: [L, D] and null_mask [L], of the empty prompt; no mask: that of the caption beside it.
      guidance: CFG scale of the trajectories and of the samples.
      sigma_d: TrigFlow's; shift: of the sampler's times.
    """

    batches: list[dict[str, Array]]
    null_text: Array
    null_mask: Array | None
    guidance: float
    sigma_d: float
    shift: float

    @property
    def calls(self) -> int:
        """The number of times that `measure` calls ``tick``."""
        return 2 * BINS * len(self.batches) + 2


def measure(
    model: SanaTransformer, params: Any, setting: Setting, tick: Callable[[], None]
) -> tuple[dict[str, Any], np.ndarray]:
    """Computes all numbers of one teacher, plain floats and lists of `BINS` of them, and its samples.

    Args:
      model, params: a flow network.
      tick: called `Setting.calls` times on the way.

    Returns:
      ``(numbers, latents)``: latents of `draw`. Numbers: ``transform`` of `transform_errors`, ``flow`` of
      `flow_losses`, ``tangent`` of `tangents`; of ``samples``, which are the latents, the share of finite
      values, and their standard deviation over that of the held-out latents.
    """
    result = {"transform": transform_errors(model, params, setting)}
    tick()
    result["flow"] = flow_losses(model, params, setting, tick)
    result["tangent"] = tangents(model, params, setting, tick)
    latents = draw(model, params, setting)
    real = np.asarray(setting.batches[0]["latents"], np.float32)
    result["samples"] = {
        "finite": float(np.isfinite(latents).mean()),
        "deviation": float(latents.std() / real.std()),
    }
    tick()
    return result, latents


def _velocity(model, params, batch) -> Callable:
    return functions.velocity(model, in_use(model, params), batch["text"], batch["mask"])


def _guided(model, params, setting: Setting, batch) -> Callable:
    network = model, in_use(model, params), batch["text"], batch["mask"]
    mask = batch["mask"] if setting.null_mask is None else setting.null_mask[None]
    null = setting.null_text[None], mask
    return functions.guided(functions.velocity, *network, setting.guidance, null)


def transform_errors(model: SanaTransformer, params: Any, setting: Setting) -> dict[str, float]:
    """Computes the errors of Prop. 3.1 in float32, as max |a - b| / max |b| over a batch.

    Returns:
      ``velocity``: that of the network, transformed there and back, at flow times over [0, 1];
      ``x0``: the clean latents that both forms predict.
    """
    model = model.clone(dtype=jnp.float32)
    batch, sigma_d = setting.batches[0], setting.sigma_d
    noise = jax.random.normal(jax.random.key(1), batch["latents"].shape)
    t = jnp.linspace(0, 1, len(noise))

    @jax.jit
    def forms(params, batch):
        velocity = _velocity(model, params, batch)
        trig = trigflow.to_trigflow(velocity)
        x = trigflow.flow_add_noise(batch["latents"], noise, t)
        v, again = velocity(x, t), trigflow.to_velocity(trig)(x, t)
        angle = trigflow.trig_time(t)
        x_t = x / trigflow.flow_inputs(jnp.ones_like(x), angle)[0] * sigma_d
        x0 = trigflow.predict_x0(x_t, trig(x_t / sigma_d, angle), angle, sigma_d) / sigma_d
        return v, again, trigflow.flow_predict_x0(x, v, t), x0

    v, again, x0, trig_x0 = (np.asarray(a) for a in forms(params, batch))
    pairs = {"velocity": (again, v), "x0": (trig_x0, x0)}
    return {name: float(np.abs(a - b).max() / np.abs(b).max()) for name, (a, b) in pairs.items()}


def flow_losses(
    model: SanaTransformer, params: Any, setting: Setting, tick: Callable[[], None]
) -> dict[str, Any]:
    """Computes the flow-matching loss by bins of flow time.

    Returns:
      ``loss``: [BINS]; ``linear``: [BINS], the loss of the best multiple of the noisy latents in place of a
      network, at the latents' mean square; ``mean``, ``linear_mean``: of these.
    """

    @jax.jit
    def loss(params, batch, t, key):
        velocity = _velocity(model, params, batch)
        noise = jax.random.normal(key, batch["latents"].shape)
        return losses.flow_matching_loss(velocity, batch["latents"], noise, t)[0]

    by_bin = [[] for _ in range(BINS)]
    for bin_index, _, batch, t, key in _visits(setting, limit=1.0):
        by_bin[bin_index].append(float(loss(params, batch, t, key)))
        tick()
    found = [float(np.mean(values)) for values in by_bin]
    power = float(np.mean([jnp.square(batch["latents"]).mean() for batch in setting.batches]))
    t = (np.arange(BINS * 64) + 0.5) / (BINS * 64)
    covariance, variance = t - (1 - t) * power, (1 - t) ** 2 * power + t**2
    linear = (1 + power - covariance**2 / variance).reshape(BINS, -1).mean(1)
    return {
        "loss": found,
        "linear": linear.tolist(),
        "mean": float(np.mean(found)),
        "linear_mean": float(linear.mean()),
    }


def tangents(
    model: SanaTransformer, params: Any, setting: Setting, tick: Callable[[], None]
) -> dict[str, list[float]]:
    """Computes tangents and gradients of `losses.scm_loss` at a student's start, by bins of the angle.

    The trajectory is the guided teacher's; the student is the teacher without guidance, as a fresh guidance
    embedder leaves it. The tangent's warm-up is over.

    Returns:
      Lists of [BINS]: ``size``: the tangent's norm before it is normalised, over sigma_d times that of F;
      ``gradient``: norm of the gradient by the parameters, of the loss without its weight w(t);
      ``bend``: relative difference of the jvp to a central difference (`diagnostics.tangent_checks`);
      ``bfloat16``: relative error of the tangent with bfloat16 matmuls; ``nonfinite``: share of samples.
    """
    sigma_d = setting.sigma_d

    def inputs(batch, key):
        return sigma_d * batch["latents"], sigma_d * jax.random.normal(key, batch["latents"].shape)

    @jax.jit
    def visit(params, batch, t, key):
        x0, z = inputs(batch, key)
        teacher = trigflow.to_trigflow(_guided(model, params, setting, batch))

        def student(params, x, t):
            velocity = _velocity(model, params, batch)
            return trigflow.to_trigflow(velocity)(x, t), jnp.zeros(len(x))

        def loss(params):
            return losses.scm_loss(student, teacher, params, x0, z, t, sigma_d=sigma_d, warmup=1.0)

        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
        x_t = trigflow.add_noise(x0, z, t)
        F = losses.per_sample_norm(student(params, x_t / sigma_d, t)[0])
        bad = ~(jnp.isfinite(aux["loss"]) & jnp.isfinite(aux["tangent_norm"]))
        weight = 1 / (sigma_d * jnp.tan(t[0]))
        grads = jax.tree.map(lambda leaf: leaf / weight, grads)
        return grads, (aux["tangent_norm"] / (sigma_d * F)).mean(), bad.mean()

    @jax.jit
    def check(params, batch, t, key):
        x0, z = inputs(batch, key)
        x = trigflow.add_noise(x0, z, t) / sigma_d
        dt = jnp.cos(t) * jnp.sin(t)
        teacher = trigflow.to_trigflow(_guided(model, params, setting, batch))

        def F(dtype):
            net = model.clone(dtype=jnp.dtype(dtype))
            return trigflow.to_trigflow(_velocity(net, params, batch))

        dx = trigflow.expand(dt, x) * teacher(x, t)
        return tangent_checks(F(jnp.float32), F(jnp.bfloat16), x, t, dx, dt)

    add = jax.jit(functools.partial(jax.tree.map, jnp.add))
    norm = jax.jit(optax.tree.norm)
    names = ("size", "gradient", "bend", "bfloat16", "nonfinite")
    found = {name: [0.0] * BINS for name in names}
    count = len(setting.batches)
    total = None
    for bin_index, number, batch, t, key in _visits(setting, limit=np.pi / 2):
        grads, size, bad = visit(params, batch, t, key)
        total = grads if number == 0 else add(total, grads)
        found["size"][bin_index] += float(size) / count
        found["nonfinite"][bin_index] += float(bad) / count
        if number == 0:
            checks = check(params, batch, t, key)
            found["bend"][bin_index] = float(checks["check/jvp"])
            found["bfloat16"][bin_index] = float(checks["check/bfloat16_tangent"])
        if number == count - 1:
            found["gradient"][bin_index] = float(norm(total)) / count
        tick()
    return found


def draw(model: SanaTransformer, params: Any, setting: Setting) -> np.ndarray:
    """Draws latents [B, h, w, C] for the first batch's prompts, in 20 steps of DPM-Solver++ with guidance."""
    shape = setting.batches[0]["latents"].shape

    @jax.jit
    def sample(params, batch):
        noise = sampling.noise_for(0, jnp.arange(shape[0]), shape[1:])
        velocity = _guided(model, params, setting, batch)
        return sampling.dpm_solver_sample(velocity, noise, steps=20, shift=setting.shift)

    return np.asarray(sample(params, setting.batches[0]))


def _visits(setting: Setting, limit: float):
    """Yields every bin with every batch: (bin, number of the batch, batch, its time [B], key)."""
    size, count = len(setting.batches[0]["latents"]), len(setting.batches)
    for bin_index in range(BINS):
        for number, batch in enumerate(setting.batches):
            t = jnp.full(size, (bin_index + (number + 0.5) / count) / BINS * limit)
            key = jax.random.fold_in(jax.random.key(2), bin_index * count + number)
            yield bin_index, number, batch, t, key
