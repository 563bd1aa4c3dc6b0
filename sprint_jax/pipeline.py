"""SprintPipeline: text encoder, network and autoencoder together; the API of inference.

    pipe = SprintPipeline.from_pretrained("runs/student")
    images = pipe(["a red 3 on blue"], steps=2, guidance=4.5, seed=0)

A student takes 1 to 4 consistency steps with its guidance embedded. A teacher takes any number of solver
steps with classifier-free guidance.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

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
from .models.control import Control
from .models.inference.int8 import check_installed
from .models.inference.operations import arrange
from .models.inference.sampler import STATIC, Sampler, Seed
from .models.inference.transformer import attention_on
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
      arranged: draw by the form of the network that is made for GPUs (`models.inference`), whose
        weights are arranged here, once; ``params`` then lie in the host's memory.
      int8: arranged, with the weights of the transformer's blocks in eight bits (`models.inference.int8`).
      device: that will draw, which decides how attention is computed there; default the first.
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
        arranged: bool = False,
        int8: bool = False,
        device: jax.Device | None = None,
    ):
        self.model, self.params = model, params
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.is_student, self.sigma_d, self.shift = is_student, sigma_d, shift
        self.midpoint, self.guidance, self.size = midpoint, guidance, size
        self.integer_times, self.meta = integer_times, meta or {}
        self._conditions = Remembered(autoencoder)
        how = (is_student, sigma_d, shift, midpoint, integer_times)
        self.sampler = Sampler(model, *how)
        if arranged:
            attention = attention_on(model, device or jax.devices()[0])
            self.sampler = Sampler(model, *how, arranged, attention, int8)
        self._weights = params
        if arranged:
            self._weights, self.params = arrange(self.sampler.arrange, params, by_parts=True)
        self._latents = jax.jit(self.sampler.from_noise, static_argnames=STATIC)

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
        low_memory: bool = False,
        autoencoder: str | Path | None = None,
        int8: bool = False,
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
          low_memory: keeps the text encoder of a folder of diffusers, the largest part, in the host's memory
            and sends it to the device for every batch of prompts; slower, for cards where not all fits.
          autoencoder: where another autoencoder for the same latents lies, such as DC-AE-Lite: a folder of
            diffusers' AutoencoderDC or of a pipeline, or the hub id of one.
          int8: keeps the weights of the transformer's blocks and of the text encoder's layers in eight bits,
            half of bfloat16's memory, on one device.

        Raises:
          UserError: if path is none of these, or something in it is missing, damaged or not supported.
        """
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        if int8:
            check_installed()
            if mesh is not None or low_memory:
                raise UserError("int8 is for weights on one device: without mesh and low_memory", 2)
        arranged = int8 or (mesh is None and jax.default_backend() == "gpu")
        how = allow_nonfinite, control, low_memory, autoencoder, int8, arranged
        parts = load_parts(path, dtype, params, mesh, *how)
        return cls(**parts, arranged=arranged, int8=int8)

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
            self.steps_from_image(steps, request.strength)  # raises, where it cannot be
            pixels = to_pixels(request.image, count, *sides)
            options["strength"] = request.strength
        if request.control is not None:
            conditions = self.encode_control(request.control, *sides, count=count)
            conditions = jnp.broadcast_to(conditions, (count, *shape))
            options["control_scale"] = request.control_scale
        finish = functools.partial(resize_and_crop, height=asked[0], width=asked[1])
        for indices in batch_rows(count, request.batch_size):
            text, mask = self.encode_text([prompts[i] for i in indices])
            numbers = request.first + indices
            if pixels is not None:
                encode, area = self.autoencoder.encode, pixels.shape[1] * pixels.shape[2]
                options["start"] = jnp.concatenate(map_pictures(encode, pixels[indices], area))
            if conditions is not None:
                options["control"] = conditions[indices]
            seed = Seed(request.seed, numbers, shape)
            x0 = self.denoise(text, mask, seed, steps=steps, **options)
            drawn = indices[-1] - indices[0] + 1
            x0 = x0 if drawn == len(x0) else x0[:drawn]
            yield decode_bytes(self.autoencoder, x0, finish if request.binning else None)

    def encode_text(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Text features [B, L, D] float32, maybe not computed yet, and mask [B, L] int32 (1 keeps)."""
        encoder = self.text_encoder
        return getattr(encoder, "encode_ahead", encoder.encode)(list(prompts))

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
        return self.sampler.steps_from_image(steps, strength)

    def draw_noise(
        self, seed: int, indices: Array, shape: tuple[int, int, int], steps: int
    ) -> tuple[Array, Array | None]:
        """The noise of pictures number ``indices`` [B] of a request.

        Returns:
          noise [B, *shape], the same for every step count; and step_noise [steps-1, B, *shape], or
          None where there is no renoising.
        """
        return self.sampler.draw_noise(seed, indices, shape, steps)

    def denoise(
        self,
        text: Array,
        mask: Array,
        noise: "Array | Seed",
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
          noise: [B, h, w, C], N(0, 1); or a `Seed`, whose noise, a student's later one too, is drawn in the
            same call.
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
        guidance, scale = (_rows(value, len(mask)) for value in (guidance, control_scale))
        drawn = isinstance(noise, Seed)
        shape = noise.shape if drawn else None
        if control is not None:
            self._check_control()
            control = Control(control, scale)
        if not self.is_student:
            if step_noise is not None:
                raise UserError("step_noise is for students: a teacher's solvers draw no noise")
            null_text, null_mask = self.text_encoder.encode_plain([negative])
            noise = noise.arrays if drawn else noise
            inputs = (text, mask, noise, guidance, (null_text[0], null_mask[0]))
            how = dict(steps=steps, solver=solver or "dpm", control=control, shape=shape)
            return self._latents(self._weights, *inputs, **how)
        if negative:
            raise UserError("a student's guidance is embedded: it takes no negative prompt", 2)
        if drawn:
            if step_noise is not None:
                raise UserError("noise of a seed comes with its step_noise: leave it out", 2)
            noise = noise.arrays
        else:
            if step_noise is None:
                _, step_noise = self.draw_noise(0, np.arange(len(noise)), noise.shape[1:], run)
            expected = (run - 1, *noise.shape)
            if step_noise is not None and tuple(step_noise.shape) != expected:
                raise UserError(f"step_noise has shape {step_noise.shape}, not {expected}")
        inputs = (text, mask, noise, guidance, None, step_noise, start)
        strength = strength if start is not None else 1.0  # static: no program for nothing
        how = dict(steps=steps, strength=strength, control=control, shape=shape)
        return self._latents(self._weights, *inputs, **how)

    def latents(self, params: Any, *inputs: Any, **options: Any) -> Array:
        """Noise to latents as a pure function of arrays, for export; see `Sampler.latents`."""
        plain = dataclasses.replace(self.sampler, arranged=False)
        return plain.latents(params, *inputs, **options)


def _rows(value: Any, count: int) -> Any:
    """A number or [count] of them as float32 [count]; made on the host, unless it is on a device."""
    xp = jnp if isinstance(value, Array) else np
    return xp.broadcast_to(xp.asarray(value, xp.float32), (count,))
