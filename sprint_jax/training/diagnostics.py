"""Diagnostics of a run: metrics by time, and checks of the student's tangent."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..losses import per_sample_norm

Array = jax.Array
BINS = 8


def time_bins(t: Array, values: Array, limit: float = math.pi / 2) -> Array:
    """Returns means of ``values`` [B] in 8 equal bins of ``t`` [B] in [0, limit]; NaN where a bin is empty."""
    index = jnp.clip((t / limit * BINS).astype(jnp.int32), 0, BINS - 1)
    member = index[None] == jnp.arange(BINS)[:, None]
    # Chosen, not multiplied by 0: a sample that is not finite must show in its own bin alone.
    total = jnp.where(member, values[None], 0.0).sum(1)
    return total / jnp.where(member.any(1), member.sum(1), jnp.nan)


def binned(name: str, t: Array, values: Array, limit: float = math.pi / 2) -> dict[str, Array]:
    """Returns `time_bins` as metrics ``name/t0 ... name/t7``."""
    return {f"{name}/t{i}": value for i, value in enumerate(time_bins(t, values, limit))}


def verdict(records: list[dict]) -> list[str]:
    """Says in sentences what the losses on images did, from lines of metrics.jsonl."""

    def mean(name: str) -> float:
        values = [record[name] for record in records if record.get(name) is not None]
        return sum(values) / len(values) if values else math.nan

    share, cosine, auc = map(mean, ("share/images", "cosine/images", "critic/auc"))
    held_out, apart = mean("critic/held_out"), mean("critic/readable")
    unreadable, halfway = mean("unreadable/one_step"), mean(f"unreadable/t{BINS // 2}")
    near, far = mean("fake_gap/t0"), mean(f"fake_gap/t{BINS - 1}")
    lines = []
    if not math.isnan(share):
        beside = "" if math.isnan(cosine) else f", at cosine {cosine:.2f} to the others"
        lines.append(f"losses on images: {share:.0%} of the update{beside}")
    if not math.isnan(auc):
        said = f"AUC {auc:.2f}" if math.isnan(held_out) else f"AUC {held_out:.2f}, held out"
        line = f"critic: tells real from one-step images with {said}"
        line += "" if math.isnan(apart) else f", readable from unreadable ones with {apart:.2f}"
        lines.append(f"{line}; 0.5 is chance")
    if not math.isnan(far):
        lines.append(f"fake score: {near:.2f} off the teacher near data, {far:.2f} near noise")
    if not math.isnan(unreadable):
        lines.append(
            f"one step: {unreadable:.0%} unreadable from noise, {halfway:.0%} from halfway"
        )
    return lines


def tangent_checks(
    F: Callable, F_bfloat16: Callable, x: Array, t: Array, dx: Array, dt: Array, step=5e-3
):
    """Computes how far the student's tangent can be trusted.

    Args:
      F, F_bfloat16: the same TrigFlow network ``F(x, t)`` in float32 and with bfloat16 matmuls.
      x, t: inputs [B, h, w, C] and [B]; dx, dt: the direction of the tangent.
      step: of the central difference, relative to the direction.

    Returns:
      ``check/jvp``: relative difference of the jvp to the central difference; rounding and the
      curve of the network leave 0.01 in float32 (a wrong derivative leaves 1).
      ``check/bfloat16_tangent``: relative error of the bfloat16 jvp.
    """
    _, tangent = jax.jvp(F, (x, t), (dx, dt))
    difference = (F(x + step * dx, t + step * dt) - F(x - step * dx, t - step * dt)) / (2 * step)
    _, rough = jax.jvp(F_bfloat16, (x, t), (dx, dt))
    norm = per_sample_norm(tangent).mean()
    return {
        "check/jvp": per_sample_norm(tangent - difference).mean() / norm,
        "check/bfloat16_tangent": per_sample_norm(tangent - rough).mean() / norm,
    }
