"""Sample grids of a run: always the same prompts from the same noise."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image

from .. import sampling
from ..core.config import Config
from ..core.sheet import enlarge
from ..data.feed import Data
from ..models import functions
from ..models.control import Control
from ..parallel.sharding import batch_ways, replicated
from .stages import stage_of
from .state import Nets

Tree = Any


def make_preview(
    c: Config, nets: Nets, data: Data, mesh: jax.sharding.Mesh, count: int = 16
) -> Callable[[Tree, dict], np.ndarray] | None:
    """Makes the function that draws the sample grids of a run; every process must call it.

    Returns:
      ``preview(params, frozen) -> uint8 [rows * H, columns * W, 3]``, pictures of 64 to 256 pixels: a column
      for each prompt, a row for each number of steps of the stage. None for data without pictures.
    """
    if data.decode is None:
        return None
    # Every device draws as many; what is more than ``count`` is not shown.
    batch = -(-count // batch_ways(mesh)) * batch_ways(mesh)
    text, mask = (np.resize(a, (batch, *a.shape[1:])) for a in data.prompts(count))
    shape, control = data.shapes[0]["latents"].shape[1:], None
    if nets.model.control_blocks:
        latents = data.control(count)
        control = Control(np.resize(latents, (batch, *latents.shape[1:])))

    def noise(number: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(c.seed), number)
        return sampling.noise_for(key, np.arange(batch), shape)

    guidance, stage = c.log.sample_guidance, stage_of(c)

    def student(network, frozen, steps):
        F = functions.trigflow(*network, jnp.full(batch, guidance), control=control)
        later = jnp.stack([noise(i) for i in range(1, steps)]) if steps > 1 else None
        how = dict(steps=steps, sigma_d=c.sigma_d, midpoint=c.sampler.midpoint, step_noise=later)
        return sampling.draw_student(F, noise(0), **how)

    def teacher(network, frozen, steps):
        null = frozen["null_text"][None], frozen["null_mask"][None]  # as `sample` draws
        velocity = functions.guided(functions.velocity, *network, guidance, null, control)
        how = dict(steps=steps, sigma_d=c.sigma_d, shift=c.flow.shift)
        return sampling.draw_teacher(velocity, noise(0), **how)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def sample(params, frozen):
        params = {**frozen.get("trunk", {}), **params}
        draw, network = student if stage.distills else teacher, (nets.model, params, text, mask)
        return jnp.stack([draw(network, frozen, n)[:count] for n in stage.preview_steps])

    def preview(params, frozen):
        rows = jax.device_get(sample(params, frozen))
        if jax.process_index():  # pictures are written by the first process
            return np.zeros((1, 1, 3), np.uint8)
        return np.concatenate([_strip(data.decode, row) for row in rows])

    return preview


def _strip(decode: Callable[[Any], np.ndarray], latents: np.ndarray) -> np.ndarray:
    """Decodes latents [n, h, w, C] into pictures side by side: uint8 [H, W, 3], each 64 to 256 pixels high."""
    pictures = decode(latents)
    strip = rearrange(pictures, "n h w c -> h (n w) c")
    picture = Image.fromarray(enlarge(strip, max(1, 64 // pictures.shape[1])))
    return np.asarray(picture.reduce(max(1, pictures.shape[1] // 256)))
