"""Sample grids of a run: always the same prompts from the same noise."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from .. import sampling, trigflow
from ..config import Config
from ..data.digits import held_out_prompts
from .setup import Data, Nets
from .sharding import batch_ways, replicated

Tree = Any


def make_preview(
    c: Config, nets: Nets, data: Data, mesh: jax.sharding.Mesh, count: int = 16
) -> Callable[[Tree, dict], np.ndarray] | None:
    """A function of (params, frozen) to a picture: always the same prompts from the same noise.

    Columns are prompts. Rows are 1, 2 and 4 steps for a student; for a teacher, DPM-Solver++ with 20
    steps and CFG. Every process must call it.

    Returns:
      ``preview(params, frozen) -> uint8 [rows * H, columns * W, 3]``, pictures enlarged to 64 pixels;
      None for data without pictures.
    """
    if data.autoencoder is None:
        return None
    height, width = data.size
    # Every device draws as many; what is more than ``count`` is not shown.
    batch = -(-count // batch_ways(mesh)) * batch_ways(mesh)
    text, mask = data.text_encoder.encode(held_out_prompts(c.data.world, count, 0))
    text, mask = (np.resize(a, (batch, *a.shape[1:])) for a in (text, mask))
    shape = (height // data.autoencoder.factor, width // data.autoencoder.factor)
    shape = (*shape, nets.model.in_channels)

    def noise(number: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(c.seed), number)
        return sampling.noise_for(key, np.arange(batch), shape)

    guidance, sigma_d, shift = c.log.sample_guidance, c.sigma_d, c.flow.shift
    midpoint = c.sampler.midpoint

    def student(params, steps):
        def velocity(x, t):
            return nets.model.apply(
                {"params": params}, x, t, text, mask, jnp.full(batch, guidance * 0.1)
            )

        return sampling.consistency_sample(
            trigflow.to_trigflow(velocity),
            noise(0),
            schedule=trigflow.step_schedule(steps, midpoint=midpoint),
            sigma_d=sigma_d,
            step_noise=jnp.stack([noise(i) for i in range(1, steps)]) if steps > 1 else None,
        )

    def teacher(params, frozen):
        def velocity(x, t, text, mask):
            return nets.model.apply({"params": params}, x, t, text, mask)

        guided = sampling.with_cfg(
            velocity, guidance, frozen["null_text"][None], frozen["null_mask"][None]
        )
        return sampling.dpm_solver_sample(
            lambda x, t: guided(x, t, text, mask), noise(0), steps=20, shift=shift
        )

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def sample(params, frozen):
        rows = (
            [teacher(params, frozen)]
            if nets.teacher is None
            else [student(params, n) for n in (1, 2, 4)]
        )
        return jnp.stack([data.autoencoder.decode(row)[:count] for row in rows])

    def preview(params, frozen):
        pixels = np.asarray(jax.device_get(sample(params, frozen)))
        pixels = np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
        scale = max(1, 64 // height)
        return rearrange(pixels, "r n h w c -> (r h) (n w) c").repeat(scale, 0).repeat(scale, 1)

    return preview
