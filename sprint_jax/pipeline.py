"""SprintPipeline: text encoder, network and autoencoder together; the API of inference.

    pipe = SprintPipeline.from_pretrained("runs/student")
    images = pipe(["a red 3 on blue"], steps=2, guidance=4.5, seed=0)

A student (stage 'distill') takes 1 to 4 consistency steps with its guidance embedded. A teacher
(stage 'flow') takes any number of solver steps with classifier-free guidance.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from . import sampling, trigflow
from .artifacts.loading import load_parts
from .core.errors import UserError
from .core.pixels import nearest_size, resize_and_crop, to_bytes, to_pixels
from .models.sana import SanaTransformer

Array = jax.Array

SOLVERS = ("dpm", "flow_euler", "trigflow_euler")


class SprintPipeline:
    """Prompts to pictures. Load one with `from_pretrained`, or give the parts.

    Args:
      model: a SanaTransformer.
      params: its parameters; may be sharded over a mesh.
      autoencoder: has ``encode(pixels) -> latents``, ``decode(latents) -> pixels`` and the integer ``factor``
        between their sizes; compiled by itself where that matters.
      text_encoder: has ``encode(prompts) -> (text [B, L, Ct], mask [B, L])``, and ``encode_plain`` for what
        guidance leads away from, where '' is the null prompt.
      stage: 'distill' for a student, 'flow' for a teacher.
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
        stage: str,
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
        self.stage, self.sigma_d, self.shift, self.midpoint = stage, sigma_d, shift, midpoint
        self.guidance, self.size, self.meta = guidance, size, meta or {}
        self.integer_times = integer_times
        self._student = jax.jit(self._student_sample, static_argnames="schedule")
        self._teacher = jax.jit(self._teacher_sample, static_argnames=("steps", "solver"))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Any = jnp.float32,
        params: str = "ema",
        *,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "SprintPipeline":
        """Loads a student or a teacher.

        Args:
          path: the workdir of a training, a pipeline folder of diffusers (SanaSprintPipeline or
            SanaPipeline), or the id of one on the Hugging Face hub, which is downloaded once.
          dtype: of parameters and of the networks' matmuls; samplers stay float32.
          params: of a workdir, 'ema' or 'raw'.
          mesh: of `parallel.sharding.make_mesh`, over which parameters are split; by default they lie on
            the default device.

        Raises:
          UserError: if path is none of these, or something in it is missing, damaged or not supported.
        """
        return cls(**load_parts(path, dtype, params, mesh))

    @property
    def is_student(self) -> bool:
        """Whether it samples in 1 to 4 consistency steps."""
        return self.stage == "distill"

    def __call__(
        self,
        prompts: Sequence[str],
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        images_per_prompt: int = 1,
        *,
        image: Any = None,
        strength: float = 0.6,
        negative: str = "",
        binning: bool = False,
        solver: str | None = None,
        batch_size: int = 64,
    ) -> list[Image.Image]:
        """Draws pictures.

        Args:
          prompts: one sentence each.
          steps: 1 to 4 for a student (default 2); any number for a teacher (default 20).
          guidance: CFG scale; default that of the training's own samples, 4.5 for published models.
          seed: picture i of the list depends on (seed, i) and its prompt, on no other picture.
          height, width: in pixels; default the size of the training pictures.
          images_per_prompt: pictures of one prompt follow each other in the result.
          image: to start from instead of noise, one for all or one for each picture of the result; students
            only. See `pictures.to_pixels`.
          strength: how much of ``image`` may change, above 0 and at most 1, where it is ignored. See
            `trigflow.image_schedule`.
          negative: what a teacher is guided away from.
          binning: draw at the nearest of the sizes that 1024-pixel models were trained on, then scale and
            cut to the size asked for.
          solver: for a teacher, one of `SOLVERS` (default 'dpm').
          batch_size: at most so many pictures at once.

        Returns:
          PIL images, ``len(prompts) * images_per_prompt``.

        Raises:
          UserError: for an empty list, or a step count, size, image or solver that cannot be.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of sentences, not the sentence {prompts!r}")
        repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        batches = self.draw(
            repeated,
            steps=steps,
            guidance=guidance,
            seed=seed,
            height=height,
            width=width,
            image=image,
            strength=strength,
            negative=negative,
            binning=binning,
            solver=solver,
            batch_size=batch_size,
        )
        return [Image.fromarray(picture) for batch in batches for picture in batch]

    def draw(
        self,
        prompts: Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        strength: float = 0.6,
        negative: str = "",
        binning: bool = False,
        solver: str | None = None,
        batch_size: int = 64,
    ) -> Iterator[np.ndarray]:
        """The pictures of `__call__`, one for each prompt, as they come.

        Yields:
          uint8 [b, H, W, 3], ``batch_size`` pictures at a time and the rest in the last.
        """
        if not prompts:
            raise UserError("there is nothing to draw: give at least one prompt")
        schedule = self.schedule(steps, solver, strength if image is not None else None)
        asked = (height or self.size[0], width or self.size[1])
        drawn = nearest_size(*asked) if binning else (height, width)
        shape = self.latent_shape(*drawn)
        count = len(prompts)
        size = min(batch_size, count)
        if image is not None:
            pixels = to_pixels(
                image, count, *(self.autoencoder.factor * side for side in shape[:2])
            )
        for start in range(0, count, size):
            # A short last batch is filled up, so that every batch runs the same program.
            indices = np.minimum(np.arange(start, start + size), count - 1)
            text, mask = self.encode_text([prompts[i] for i in indices])
            noise, step_noise = self.draw_noise(seed, indices, shape, len(schedule) - 1)
            how = dict(guidance=guidance, step_noise=step_noise, solver=solver, negative=negative)
            if image is not None:
                how |= dict(start=self.autoencoder.encode(pixels[indices]), strength=strength)
            x0 = self.denoise(text, mask, noise, steps=steps, **how)
            pictures = self.autoencoder.decode(x0)
            if binning:
                pictures = resize_and_crop(pictures, *asked)
            yield to_bytes(np.asarray(pictures)[: count - start])

    def encode_text(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Text features [B, L, Ct] float32 and mask [B, L] int32 (1 keeps)."""
        return self.text_encoder.encode(list(prompts))

    def decode(self, x0: Array) -> Array:
        """Latents [B, h, w, C] to pixels [B, H, W, 3], clipped to [-1, 1]."""
        return jnp.clip(self.autoencoder.decode(x0), -1, 1)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple:
        """(h, w, C) of the latents of a picture; UserError unless both sides fit the network."""
        height = self.size[0] if height is None else height
        width = self.size[1] if width is None else width
        unit = self.autoencoder.factor * self.model.patch_size
        if height < unit or width < unit or height % unit or width % unit:
            raise UserError(f"size {height}x{width}: both must be multiples of {unit}", exit_code=2)
        factor = self.autoencoder.factor
        return height // factor, width // factor, self.model.in_channels

    def schedule(
        self, steps: int | None = None, solver: str | None = None, strength: float | None = None
    ) -> tuple[float, ...]:
        """A student's angles, or as many zeros for a teacher: one more than it takes steps.

        Args:
          steps: None for the usual number.
          strength: of changing an image, else None.

        Raises:
          UserError: if this network cannot take so many steps, or not with that solver or from an image.
        """
        if self.is_student and solver is not None:
            raise UserError(f"solver {solver} is for teachers, this is a student", exit_code=2)
        if solver is not None and solver not in SOLVERS:
            raise UserError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}", exit_code=2)
        steps = steps if steps is not None else 2 if self.is_student else 20
        if not self.is_student:
            if strength is not None:
                raise UserError("an image to start from is for students, this is a teacher", 2)
            if steps < 1:
                raise UserError(f"steps must be at least 1, not {steps}", exit_code=2)
            return (0.0,) * (steps + 1)
        if steps not in (1, 2, 3, 4):
            raise UserError(f"steps must be 1, 2, 3 or 4 for a student, not {steps}", exit_code=2)
        angles = trigflow.step_schedule(steps, midpoint=self.midpoint)
        if strength is None:
            return angles
        if not 0 < strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, not {strength}", exit_code=2)
        return trigflow.image_schedule(angles, strength)

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
        negative: str = "",
        solver: str | None = None,
    ) -> Array:
        """Noise to latents; compiled once for each schedule, shape and solver.

        Args:
          text, mask: of `encode_text`.
          noise: [B, h, w, C], N(0, 1).
          steps: see `__call__`.
          guidance: CFG scale, a scalar or [B]; default as in `__call__`.
          step_noise: [steps-1, B, h, w, C], what a student renoises with; by default drawn for
            pictures 0..B-1 of seed 0. From an image the steps are those of `schedule`.
          start: latents [B, h, w, C] of images to change; strength: see `__call__`.
          negative, solver: see `__call__`.

        Returns:
          Latents [B, h, w, C] float32.

        Raises:
          UserError: for steps, solver, strength or step_noise that do not fit.
        """
        schedule = self.schedule(steps, solver, strength if start is not None else None)
        guidance = self.guidance if guidance is None else guidance
        guidance = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), noise.shape[:1])
        run = len(schedule) - 1
        if self.is_student:
            if negative:
                raise UserError("a student's guidance is embedded: it takes no negative prompt", 2)
            if step_noise is None:
                _, step_noise = self.draw_noise(0, np.arange(len(noise)), noise.shape[1:], run)
            expected = (run - 1, *noise.shape)
            if step_noise is not None and tuple(step_noise.shape) != expected:
                raise UserError(f"step_noise has shape {step_noise.shape}, not {expected}")
            inputs = (text, mask, noise, guidance, step_noise, start)
            return self._student(self.params, *inputs, schedule=schedule)
        if step_noise is not None:
            raise UserError("step_noise is for students: a teacher's solvers draw no noise")
        null = self.text_encoder.encode_plain([negative])
        static = dict(steps=run, solver=solver or "dpm")
        return self._teacher(self.params, text, mask, noise, guidance, *null, **static)

    def _student_sample(self, params, text, mask, noise, guidance, step_noise, start, *, schedule):
        # The published models saw CFG scales times 0.1.
        told = guidance * 0.1 if self.model.guidance_embeds else None

        def velocity(x, t):
            return self.model.apply({"params": params}, x, t, text, mask, told)

        return sampling.consistency_sample(
            trigflow.to_trigflow(velocity),
            noise,
            schedule=schedule,
            sigma_d=self.sigma_d,
            step_noise=step_noise,
            start=start,
        )

    def _teacher_sample(
        self, params, text, mask, noise, guidance, null_text, null_mask, *, steps, solver
    ):
        def network(x, t, text, mask):
            return self.model.apply({"params": params}, x, t, text, mask)

        guided = sampling.with_cfg(network, guidance, null_text[0], null_mask[0])

        def velocity(x, t):
            return guided(x, t, text, mask)

        if solver == "dpm":
            return sampling.dpm_solver_sample(
                velocity,
                noise,
                steps=steps,
                shift=self.shift,
                integer_times=self.integer_times,
            )
        if solver == "flow_euler":
            return sampling.flow_euler_sample(velocity, noise, steps=steps, shift=self.shift)
        F = trigflow.to_trigflow(velocity)
        return sampling.trigflow_euler_sample(F, noise, steps=steps, sigma_d=self.sigma_d)
