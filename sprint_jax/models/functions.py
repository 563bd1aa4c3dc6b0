"""Networks with their text and guidance as functions of a noisy sample and its time.

Training, sampling, export and measurements all take their networks from here: a model and its parameters,
the text of a batch and its guidance become ``velocity(x_fm, t_fm)`` of flow matching, or ``F(x, t)`` of
TrigFlow (`trigflow.to_trigflow`), with ``x`` [B, h, w, C] and ``t`` [B]. Text is [B, L, D], its mask [B, L],
guidance [B] or a scalar: a CFG scale such as 4.5. A condition is a `control.Control`, for a network with a
control branch; None runs the network without it. Parameters are taken as they are given: on a mesh the
caller gathers them first (`parallel.sharding.in_use`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..sampling import with_cfg
from ..trigflow import flow_inputs, to_trigflow
from .control import Control
from .sana import SanaTransformer

Array = jax.Array
Params = Any

# Published students were shown CFG scales times 0.1 (diffusers: guidance_embeds_scale).
GUIDANCE_SCALE = 0.1


def velocity(
    model: SanaTransformer,
    params: Params,
    text: Array,
    mask: Array,
    guidance: Array | None = None,
    *,
    target: Array | None = None,
    control: Control | None = None,
    with_logvar: bool = False,
) -> Callable:
    """Returns ``velocity(x_fm, t_fm)``, or ``-> (velocity, logvar [B])`` where that is asked for.

    Args:
      guidance: [B], which a student embeds; not used by a network without such an embedding.
      target: [B], flow time to which a flow map jumps; None is 0, the image.
      with_logvar: also return the predicted log variance of the sCM loss.
    """
    embedded = _embedded(model, guidance)

    def run(x_fm: Array, t_fm: Array):
        inputs = x_fm, t_fm, text, mask, embedded
        options = dict(target=target, control=control, with_logvar=with_logvar)
        return model.apply({"params": params}, *inputs, **options)

    return run


def _embedded(model: SanaTransformer, guidance: Array | None) -> Array | None:
    """Guidance as the network embeds it; None for one that does not."""
    embeds = model.guidance_embeds and guidance is not None
    return guidance * GUIDANCE_SCALE if embeds else None


def trigflow(model: SanaTransformer, params: Params, text: Array, mask: Array, *args, **kwargs):
    """Returns ``F(x, t)``, or ``-> (F, logvar [B])``; arguments as those of `velocity`."""
    return to_trigflow(velocity(model, params, text, mask, *args, **kwargs))


def guided(
    form: Callable,
    model: SanaTransformer,
    params: Params,
    text: Array,
    mask: Array,
    guidance: Array | float,
    null: tuple[Array, Array],
    control: Control | None = None,
) -> Callable:
    """Returns a teacher's velocity or F with classifier-free guidance against the empty prompt.

    Guidance is by the text alone: with a condition both halves see it.

    Args:
      form: `velocity` or `trigflow`. Both give the same trajectories: F is affine in the velocity.
      null: text [L, D] and mask [L] of the empty prompt, or of a negative one.
    """

    twice = control.doubled() if control is not None else None

    def conditional(x, t, text, mask):
        return form(model, params, text, mask, control=twice)(x, t)

    both = with_cfg(conditional, guidance, *null)
    return lambda x, t: both(x, t, text, mask)


def features(
    model: SanaTransformer,
    params: Params,
    text: Array,
    mask: Array,
    guidance: Array | None = None,
    *,
    taps: tuple[int, ...],
    control: Control | None = None,
) -> Callable:
    """Returns ``features(x, t)`` of TrigFlow inputs: the outputs of the tapped blocks, [B, h', w', d] each."""

    embedded = _embedded(model, guidance)
    options = dict(taps=tuple(taps), control=control)

    def run(x: Array, t: Array) -> tuple[Array, ...]:
        x_fm, t_fm = flow_inputs(x, t)
        return model.apply({"params": params}, x_fm, t_fm, text, mask, embedded, **options)

    return run


def in_dtype(model: SanaTransformer, dtype: Any) -> SanaTransformer:
    """The same network with matmuls in ``dtype``; unchanged where that is None or empty."""
    return model.clone(dtype=jnp.dtype(dtype)) if dtype else model
