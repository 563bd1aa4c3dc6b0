"""Noise to latents with a network: a student's steps or a teacher's solver, as pure functions of arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ... import sampling
from ...trigflow import to_trigflow
from .. import functions
from ..control import Control
from . import transformer
from .int8 import quantize

Array = jax.Array

STATIC = ("shape", "steps", "solver", "strength")  # arguments of `Sampler.from_noise`


class Seed(NamedTuple):
    """Pictures number ``numbers`` [B] of a request with that seed; their latents have a shape (h, w, C)."""

    seed: int
    numbers: np.ndarray
    shape: tuple[int, int, int]

    @property
    def arrays(self) -> tuple[Any, np.ndarray]:
        """Seed and numbers."""
        return np.uint32(self.seed), np.asarray(self.numbers, np.uint32)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a network draws; the fields are those of `pipeline.SprintPipeline`.

    With ``arranged`` the parameters of `latents` and `from_noise` are those that `arrange` returns, and the
    network runs in its inference form, with the ``attention`` of `transformer.attention_on` its device, and
    with ``int8`` weights in eight bits.
    """

    model: Any
    is_student: bool
    sigma_d: float
    shift: float
    midpoint: float
    integer_times: bool
    arranged: bool = False
    attention: Callable = transformer.softmax_attention
    int8: bool = False

    def arrange(self, params: Any) -> Any:
        """Parameters of the network, arranged for inference."""
        finish = {"finish": quantize} if self.int8 else {}
        return transformer.prepare(self.model, params, unrolled=True, **finish)

    def steps_from_image(self, steps: int, strength: float) -> int:
        """How many of a student's steps run when an image is changed."""
        return len(sampling.student_schedule(steps, self.midpoint, strength)) - 1

    def draw_noise(
        self, seed: Any, indices: Array, shape: tuple[int, int, int], steps: int
    ) -> tuple[Array, Array | None]:
        """See `pipeline.SprintPipeline.draw_noise`."""
        key = jax.random.key(seed)
        noise = sampling.noise_for(jax.random.fold_in(key, 0), indices, shape)
        if not self.is_student or steps == 1:
            return noise, None
        later = (jax.random.fold_in(key, step) for step in range(1, steps))
        return noise, jnp.stack([sampling.noise_for(k, indices, shape) for k in later])

    def from_noise(
        self,
        params: Any,
        text: Array,
        mask: Array,
        noise: Any,
        guidance: Array,
        null: tuple[Array, Array] | None = None,
        step_noise: Array | None = None,
        start: Array | None = None,
        *,
        steps: int,
        shape: tuple[int, int, int] | None = None,
        strength: float = 1.0,
        **options: Any,
    ) -> Array:
        """`latents`, also from the arrays of a `Seed` in the place of noise, whose shape is then given."""
        if shape is not None:
            run = steps if start is None else self.steps_from_image(steps, strength)
            noise, step_noise = self.draw_noise(*noise, shape, run)
        inputs = params, text, mask, noise, guidance, null, step_noise, start
        return self.latents(*inputs, steps=steps, strength=strength, **options)

    def latents(
        self,
        params: Any,
        text: Array,
        mask: Array,
        noise: Array,
        guidance: Array,
        null: tuple[Array, Array] | None = None,
        step_noise: Array | None = None,
        start: Array | None = None,
        control: Control | None = None,
        *,
        steps: int,
        solver: str = "dpm",
        strength: float = 1.0,
    ) -> Array:
        """Noise [B, h, w, C] to latents of that shape, float32.

        Args:
          null: text [L, D] and mask [L] that a teacher is guided away from.
          step_noise, start, strength: of a student, see `SprintPipeline.denoise`; solver: of a teacher.
        """
        velocity = self._velocity(params, text, mask, guidance, null, control)
        if self.is_student:
            how = {"midpoint": self.midpoint, "strength": strength, "start": start}
            how |= {"sigma_d": self.sigma_d, "step_noise": step_noise}
            return sampling.draw_student(to_trigflow(velocity), noise, steps=steps, **how)
        how = {"shift": self.shift, "sigma_d": self.sigma_d, "solver": solver}
        how |= {"integer_times": self.integer_times}
        return sampling.draw_teacher(velocity, noise, steps=steps, **how)

    def _velocity(self, params, text, mask, guidance, null, control) -> Callable:
        network = self.model, params, text, mask, guidance
        if self.arranged:
            return transformer.guided(*network, null, self.attention, control)
        if self.is_student:
            return functions.velocity(*network, control=control)
        return functions.guided(functions.velocity, *network, null, control)
