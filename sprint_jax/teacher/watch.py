"""Looking into a transformer while it runs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .. import trigflow
from ..models.blocks import compute_params, unstack_blocks
from ..models.layers import wide
from ..models.sana import SanaTransformer

Array = jax.Array


def watched(model: SanaTransformer, params: Any, inputs: tuple, look: Callable) -> list:
    """Runs a network once and collects what ``look`` makes of its modules' calls.

    Blocks run unrolled, whatever ``model.scan`` says: values inside of a scan cannot be handed out.

    Args:
      inputs: of ``model.apply`` after the parameters: x, t, text, mask.
      look: ``look(module, arguments, result)``, called after every module's ``__call__``, inner modules
        first; None is not collected.

    Returns:
      What ``look`` returned, in the order of the calls.
    """
    seen, running = [], []

    def intercept(call, arguments, keywords, context):
        # `Linear` calls the method that it overrides, which is the same module once more.
        inner = bool(running) and running[-1] is context.module
        running.append(context.module)
        result = call(*arguments, **keywords)
        running.pop()
        if context.method_name == "__call__" and not inner:
            value = look(context.module, arguments, result)
            if value is not None:
                seen.append(value)
        return result

    plain = model.clone(scan=False, remat="none", partition=None)
    with nn.intercept_methods(intercept):
        plain.apply({"params": unstack_blocks(compute_params(params, model.dtype))}, *inputs)
    return seen


def noisy_inputs(batch: dict[str, Array], t: Array, key: Array) -> tuple[Array, ...]:
    """A batch's inputs at flow times ``t`` [B]: x_fm, t, text, mask."""
    noise = jax.random.normal(key, batch["latents"].shape)
    x = trigflow.flow_add_noise(wide(batch["latents"]), noise, t)
    return x, t, batch["text"], batch["mask"]


def mean_over_times(
    measure: Callable, params: Any, batches: list[dict[str, Array]], times: int, seed: int = 0
) -> np.ndarray:
    """The mean of ``measure(params, inputs) -> array`` over batches and equally spaced flow times.

    Args:
      measure: see `noisy_inputs` for its inputs; is compiled.
      batches: latents [B, h, w, C], text [B, L, D], mask [B, L] each.
      times: how many, at the middles of equal parts of [0, 1].

    Returns:
      Of the shape of what ``measure`` returns, float64.
    """
    run = jax.jit(lambda params, batch, t, key: measure(params, noisy_inputs(batch, t, key)))
    total, count = 0.0, 0
    for batch in batches:
        for i in range(times):
            t = jnp.full(batch["latents"].shape[:1], (i + 0.5) / times, jnp.float32)
            key = jax.random.fold_in(jax.random.key(seed), count)
            total = total + np.asarray(run(params, batch, t, key), np.float64)
            count += 1
    return total / count
