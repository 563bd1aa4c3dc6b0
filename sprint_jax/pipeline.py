"""SprintPipeline: text encoder, network and autoencoder together; the API of inference.

    pipe = SprintPipeline.from_pretrained("runs/student")
    images = pipe(["a red 3 on blue"], steps=2, guidance=4.5, seed=0)

A student takes 1 to 4 consistency steps with its guidance embedded. A teacher takes any number of solver
steps with classifier-free guidance.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from . import sampling
from .artifacts.loading import load_parts
from .core.errors import UserError
from .core.pixels import (
    batch_rows,
    decode_bytes,
    map_pictures,
    nearest_size,
    resize_and_crop,
    to_pixels,
    to_rows,
)
from .core.request import Request
from .encoders.autoencoder import Remembered
from .models import functions
from .models.control import Control
from .models.sana import SanaTransformer
from .sampling import SOLVERS

Array = jax.Array


class SprintPipeline:
    """Prompts to pictures. Load one with `from_pretrained`, or give the parts.

    Args:
      model: a SanaTransformer.
      params: its parameters; may be sharded over a mesh.
      autoencoder: has ``encode(pixels) -> latents``, ``decode(latents) -> pixels`` and the integer ``factor``
        between their sizes; compiled by itself where that matters.
      text_encoder: has ``encode(prompts) -> (text [B, L, D], mask [B, L])``, and ``encode_plain`` for negative
        prompts, where '' is the null prompt.
      is_student: whether it samples in 1 to 4 consistency steps.
      sigma_d: standard deviation of TrigFlow's data.
      shift: resolution shift of a teacher's sampling times.
      midpoint: second angle of a student's two-step schedule.
      guidance: CFG scale where none is asked for.
      size: (height, width) in pixels of pictures whose size is not asked for.
      integer_times: show a teacher times cut to thousandths, as diffusers does (`sampling.dpm_solver_sample`).
      meta: where the parameters come from.
    """

    def __init__(
        self,
        model: SanaTransformer,
        params: Any,
        autoencoder: Any,
        text_encoder: Any,
        *,
        is_student: bool,
        sigma_d: float,
        shift: float,
        midpoint: float,
        guidance: float,
        size: tuple[int, int],
        integer_times: bool = False,
        meta: dict[str, Any] | None = None,
    ):
        self.model, self.params = model, params
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.is_student, self.sigma_d, self.shift = is_student, sigma_d, shift
        self.midpoint, self.guidance, self.size = midpoint, guidance, size
        self.integer_times, self.meta = integer_times, meta or {}
        self._conditions = Remembered(autoencoder)
        self._latents = jax.jit(self.latents, static_argnames=("steps", "solver", "strength"))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Any = None,
        params: str = "ema",
        *,
        control: str | Path | None = None,
        mesh: jax.sharding.Mesh | None = None,
        allow_nonfinite: bool = False,
    ) -> "SprintPipeline":
        """Loads a student or a teacher, with its control branch if it has one.

        Args:
          path: the workdir of a training, a pipeline folder of diffusers (SanaSprintPipeline, SanaPipeline or
            SanaControlNetPipeline), or the id of one on the Hugging Face hub, which is downloaded once.
          control: where a control branch lies, for a network without one: the workdir of its training, a
            folder of diffusers (SanaControlNetModel) or a ``.pth`` file of NVlabs.
          dtype: of parameters and of the networks' matmuls, by default float32 on CPU and bfloat16 on
            accelerators; samplers stay float32.
          params: of a workdir, 'ema' or 'raw'.
          mesh: of `parallel.sharding.make_mesh`, over which parameters are split; by default they lie on
            the default device.
          allow_nonfinite: takes a network whose parameters hold NaN or infinity, to look at it.

        Raises:
          UserError: if path is none of these, or something in it is missing, damaged or not supported.
        """
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        return cls(**load_parts(path, dtype, params, mesh, allow_nonfinite, control))

    def __call__(
        self, prompts: Sequence[str], steps: int | None = None, **options
    ) -> list[Image.Image]:
        """Draws pictures.

        Args:
          prompts: one sentence each.
          steps, options: the fields of `Request`: guidance, seed, height, width, images_per_prompt, image, ...

        Returns:
          PIL images, ``len(prompts) * images_per_prompt``.

        Raises:
          UserError: for an empty list, or a step count, size, image or solver that cannot be.
        """
        batches = self.draw(prompts, Request(steps, **options))
        return [Image.fromarray(picture) for batch in batches for picture in batch]

    def draw(self, prompts: Sequence[str], request: Request) -> Iterator[np.ndarray]:
        """Draws the pictures of a request as they come, so that few are held at once.

        Yields:
          uint8 [b, H, W, 3], ``batch_size`` pictures at a time and the rest in the last.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of sentences, not the sentence {prompts!r}")
        prompts = [prompt for prompt in prompts for _ in range(request.images_per_prompt)]
        if not prompts:
            raise UserError("there is nothing to draw: give at least one prompt")
        steps = self.check_steps(request.steps, request.solver)
        given = zip((request.height, request.width), self.size, strict=True)
        asked = tuple(usual if side is None else side for side, usual in given)
        shape = self.latent_shape(*(nearest_size(*asked) if request.binning else asked))
        options = {key: getattr(request, key) for key in ("guidance", "solver", "negative")}
        count, pixels, conditions = len(prompts), None, None
        sides = tuple(self.autoencoder.factor * side for side in shape[:2])
        if request.image is not None:
            steps_run = self.steps_from_image(steps, request.strength)
            pixels = to_pixels(request.image, count, *sides)
            options["strength"] = request.strength
        else:
            steps_run = steps
        if request.control is not None:
            conditions = self.encode_control(request.control, *sides, count=count)
            conditions = jnp.broadcast_to(conditions, (count, *shape))
            options["control_scale"] = request.control_scale
        finish = functools.partial(resize_and_crop, height=asked[0], width=asked[1])
        for indices in batch_rows(count, request.batch_size):
            text, mask = self.encode_text([prompts[i] for i in indices])
            numbers = request.first + indices
            noise, step_noise = self.draw_noise(request.seed, numbers, shape, steps_run)
            if pixels is not None:
                encode, area = self.autoencoder.encode, pixels.shape[1] * pixels.shape[2]
                options["start"] = jnp.concatenate(map_pictures(encode, pixels[indices], area))
            if conditions is not None:
                options["control"] = conditions[indices]
            options["step_noise"] = step_noise
            x0 = self.denoise(text, mask, noise, steps=steps, **options)
            drawn = indices[-1] - indices[0] + 1
            yield decode_bytes(self.autoencoder, x0[:drawn], finish if request.binning else None)

    def encode_text(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Text features [B, L, D] float32 and mask [B, L] int32 (1 keeps)."""
        return self.text_encoder.encode(list(prompts))

    def encode_control(
        self,
        images: Any,
        height: int | None = None,
        width: int | None = None,
        count: int | None = None,
    ) -> Array:
        """Condition latents [n, h, w, C] of one control image or several, remembered by content.

        Args:
          images: white lines on black, see `core.pixels.to_rows`.
          height, width: of the pictures that they steer, in pixels; default the training's size.
          count: of these pictures, for which there must be one image or one each; None: any number.

        Raises:
          UserError: this network has no control branch, the size does not fit it, or as `core.pixels.to_rows`.
        """
        self._check_control()
        h, w, _ = self.latent_shape(height, width)
        factor = self.autoencoder.factor
        return self._conditions.encode(to_rows(images, h * factor, w * factor, count))

    def _check_control(self) -> None:
        if "control" not in self.params:
            raise UserError(
                "this model has no control branch: take the workdir of one's training, or give one beside it"
            )

    def decode(self, x0: Array) -> Array:
        """Latents [B, h, w, C] to pixels [B, H, W, 3], clipped to [-1, 1]."""
        area = x0.shape[1] * x0.shape[2] * self.autoencoder.factor**2
        parts = map_pictures(self.autoencoder.decode, x0, area)
        return jnp.clip(jnp.concatenate(parts), -1, 1)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple:
        """(h, w, C) of the latents of a picture, by default of the training's size.

        Raises:
          UserError: a side does not fit the network.
        """
        height = self.size[0] if height is None else height
        width = self.size[1] if width is None else width
        unit = self.autoencoder.factor * self.model.patch_size
        if height < unit or width < unit or height % unit or width % unit:
            raise UserError(f"size {height}x{width}: both must be multiples of {unit}", exit_code=2)
        factor = self.autoencoder.factor
        return height // factor, width // factor, self.model.in_channels

    def check_steps(self, steps: int | None = None, solver: str | None = None) -> int:
        """The number of steps, by default the usual one.

        Raises:
          UserError: this network cannot take so many steps, or not with that solver.
        """
        if solver is not None and solver not in SOLVERS:
            raise UserError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}", exit_code=2)
        if solver is not None and self.is_student:
            raise UserError(f"solver {solver} is for teachers, this is a student", exit_code=2)
        if steps is None:
            return 2 if self.is_student else 20
        if self.is_student and steps not in (1, 2, 3, 4):
            raise UserError(f"steps must be 1, 2, 3 or 4 for a student, not {steps}", exit_code=2)
        if steps < 1:
            raise UserError(f"steps must be at least 1, not {steps}", exit_code=2)
        return steps

    def steps_from_image(self, steps: int, strength: float) -> int:
        """How many of the steps run when an image is changed.

        Raises:
          UserError: this is a teacher, or the strength is out of range.
        """
        if not self.is_student:
            raise UserError("an image to start from is for students, this is a teacher", 2)
        if not 0 < strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, not {strength}", exit_code=2)
        return len(sampling.student_schedule(steps, self.midpoint, strength)) - 1

    def draw_noise(
        self, seed: int, indices: Array, shape: tuple[int, int, int], steps: int
    ) -> tuple[Array, Array | None]:
        """The noise of pictures number ``indices`` [B] of a request.

        Returns:
          noise [B, *shape], the same for every step count; and step_noise [steps-1, B, *shape], or
          None where there is no renoising.
        """
        key = jax.random.key(seed)
        noise = sampling.noise_for(jax.random.fold_in(key, 0), indices, shape)
        if not self.is_student or steps == 1:
            return noise, None
        later = (jax.random.fold_in(key, step) for step in range(1, steps))
        return noise, jnp.stack([sampling.noise_for(k, indices, shape) for k in later])

    def denoise(
        self,
        text: Array,
        mask: Array,
        noise: Array,
        *,
        steps: int | None = None,
        guidance: float | Array | None = None,
        step_noise: Array | None = None,
        start: Array | None = None,
        strength: float = 0.6,
        control: Array | None = None,
        control_scale: float | Array = 1.0,
        negative: str = "",
        solver: str | None = None,
    ) -> Array:
        """Noise to latents; compiled once for each number of steps, shape and solver.

        Args:
          text, mask: of `encode_text`.
          noise: [B, h, w, C], N(0, 1).
          guidance: CFG scale, a scalar or [B].
          step_noise: [steps-1, B, h, w, C], with which a student renoises; by default drawn for
            pictures 0..B-1 of seed 0. From an image the steps are those of `steps_from_image`.
          start: latents [B, h, w, C] of images to change.
          control: of `encode_control`, [B, h, w, C]; control_scale: a scalar or [B].
          steps, strength, negative, solver: see `Request`.

        Returns:
          Latents [B, h, w, C] float32.

        Raises:
          UserError: for steps, solver, strength, control or step_noise that do not fit.
        """
        steps = self.check_steps(steps, solver)
        run = steps if start is None else self.steps_from_image(steps, strength)
        guidance = self.guidance if guidance is None else guidance
        guidance, scale = (
            jnp.broadcast_to(jnp.asarray(value, jnp.float32), noise.shape[:1])
            for value in (guidance, control_scale)
        )
        if control is not None:
            self._check_control()
            control = Control(control, scale)
        if not self.is_student:
            if step_noise is not None:
                raise UserError("step_noise is for students: a teacher's solvers draw no noise")
            null_text, null_mask = self.text_encoder.encode_plain([negative])
            inputs = (text, mask, noise, guidance, (null_text[0], null_mask[0]))
            how = dict(steps=steps, solver=solver or "dpm", control=control)
            return self._latents(self.params, *inputs, **how)
        if negative:
            raise UserError("a student's guidance is embedded: it takes no negative prompt", 2)
        if step_noise is None:
            _, step_noise = self.draw_noise(0, np.arange(len(noise)), noise.shape[1:], run)
        expected = (run - 1, *noise.shape)
        if step_noise is not None and tuple(step_noise.shape) != expected:
            raise UserError(f"step_noise has shape {step_noise.shape}, not {expected}")
        inputs = (text, mask, noise, guidance, None, step_noise, start)
        strength = strength if start is not None else 1.0  # static: no program for nothing
        how = dict(steps=steps, strength=strength, control=control)
        return self._latents(self.params, *inputs, **how)

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
        """Noise to latents as a pure function of arrays, for `denoise` and for export.

        Args:
          null: text [L, D] and mask [L] that a teacher is guided away from.
          step_noise, start, strength: of a student, see `denoise`; solver: of a teacher.
        """
        network = self.model, params, text, mask, guidance
        if self.is_student:
            how = {"midpoint": self.midpoint, "strength": strength, "start": start}
            F = functions.trigflow(*network, control=control)
            how |= {"sigma_d": self.sigma_d, "step_noise": step_noise}
            return sampling.draw_student(F, noise, steps=steps, **how)
        how = {"shift": self.shift, "sigma_d": self.sigma_d, "solver": solver}
        velocity = functions.guided(functions.velocity, *network, null, control)
        how |= {"integer_times": self.integer_times}
        return sampling.draw_teacher(velocity, noise, steps=steps, **how)
