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
from .data.digits import CELL, get_world
from .errors import UserError
from .models.sana import SanaTransformer, from_fields
from .models.toy import SpaceToDepth, WordEncoder
from .training.checkpoint import load_params
from .training.setup import read_workdir_config

Array = jax.Array

SOLVERS = ("dpm", "flow_euler", "trigflow_euler")


class SprintPipeline:
    """Prompts to pictures. Load one with `from_pretrained`, or give the parts.

    Args:
      model: a SanaTransformer.
      params: its parameters; may be sharded over a mesh.
      autoencoder: has ``decode(latents) -> pixels`` and the integer ``factor`` between their sizes.
      text_encoder: has ``encode(prompts) -> (text [B, L, Ct], mask [B, L])``; '' is the null
        prompt of classifier-free guidance.
      stage: 'distill' for a student, 'flow' for a teacher.
      sigma_d: standard deviation of TrigFlow's data.
      shift: resolution shift of a teacher's sampling times.
      midpoint: second angle of a student's two-step schedule.
      guidance: CFG scale where none is asked for.
      size: (height, width) in pixels of pictures whose size is not asked for.
      meta: where the parameters come from; `from_pretrained` gives that of their checkpoint.
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
        meta: dict[str, Any] | None = None,
    ):
        self.model, self.params = model, params
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.stage, self.sigma_d, self.shift, self.midpoint = stage, sigma_d, shift, midpoint
        self.guidance, self.size, self.meta = guidance, size, meta or {}
        self._student = jax.jit(self._student_sample, static_argnames="steps")
        self._teacher = jax.jit(self._teacher_sample, static_argnames=("steps", "solver"))
        self._decode = jax.jit(lambda x0: jnp.clip(autoencoder.decode(x0), -1, 1))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: Any = jnp.float32, params: str = "ema"
    ) -> "SprintPipeline":
        """Loads a student or a teacher from the workdir of its training.

        Args:
          path: the workdir.
          dtype: of parameters and of the network's matmuls; samplers stay float32.
          params: 'ema' or 'raw'.

        Raises:
          UserError: if path is no workdir, or has no checkpoint. A diffusers folder and a hub id
            are not supported in this version.
        """
        _require_workdir(path)
        config = read_workdir_config(str(path))
        try:
            stage, sigma_d, shift = config.stage, config.sigma_d, config.flow.shift
            midpoint = config.sampler.midpoint
            guidance = config.log.sample_guidance
            fields, cells = dict(config.model), get_world(config.data.world).cells
        except AttributeError as error:
            raise UserError(f"{Path(path) / 'config.json'} is not of a training: {error}") from None
        student = stage == "distill"
        # The published student is its teacher plus an embedding of guidance.
        model = from_fields(fields, **({"guidance_embeds": True} if student else {}))
        tree, meta = load_params(str(path), params)
        tree = jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
        return cls(
            model.clone(dtype=jnp.dtype(dtype)),
            tree,
            SpaceToDepth(),
            WordEncoder(),
            stage=stage,
            sigma_d=sigma_d,
            shift=shift,
            midpoint=midpoint,
            guidance=guidance,
            size=(CELL * cells[0], CELL * cells[1]),
            meta=meta,
        )

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
        solver: str | None = None,
        batch_size: int = 64,
    ) -> list[Image.Image]:
        """Draws pictures.

        Args:
          prompts: one sentence each.
          steps: 1 to 4 for a student (default 2); any number for a teacher (default 20).
          guidance: CFG scale; default that of the training's own samples.
          seed: picture i of the list depends on (seed, i) and its prompt, on no other picture.
          height, width: in pixels; default the size of the training pictures.
          images_per_prompt: pictures of one prompt follow each other in the result.
          solver: for a teacher, one of `SOLVERS` (default 'dpm').
          batch_size: at most so many pictures at once.

        Returns:
          PIL images, ``len(prompts) * images_per_prompt``.

        Raises:
          UserError: for an empty list, or a step count, size or solver that cannot be.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of sentences, not the sentence {prompts!r}")
        repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        run = dict(steps=steps, guidance=guidance, seed=seed, height=height, width=width)
        batches = self.draw(repeated, **run, solver=solver, batch_size=batch_size)
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
        solver: str | None = None,
        batch_size: int = 64,
    ) -> Iterator[np.ndarray]:
        """The pictures of `__call__`, one for each prompt, as they come.

        Yields:
          uint8 [b, H, W, 3], ``batch_size`` pictures at a time and the rest in the last.
        """
        if not prompts:
            raise UserError("there is nothing to draw: give at least one prompt")
        steps = self.steps_or_default(steps, solver)
        shape = self.latent_shape(height, width)
        text, mask = self.encode_text(prompts)
        count = len(prompts)
        size = min(batch_size, count)
        for start in range(0, count, size):
            # A short last batch is filled up, so that every batch runs the same program.
            indices = np.minimum(np.arange(start, start + size), count - 1)
            noise, step_noise = self.draw_noise(seed, indices, shape, steps)
            run = dict(steps=steps, guidance=guidance, step_noise=step_noise, solver=solver)
            x0 = self.denoise(text[indices], mask[indices], noise, **run)
            yield to_bytes(np.asarray(self.decode(x0))[: count - start])

    def encode_text(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Text features [B, L, Ct] float32 and mask [B, L] int32 (1 keeps)."""
        return self.text_encoder.encode(list(prompts))

    def decode(self, x0: Array) -> Array:
        """Latents [B, h, w, C] to pixels [B, H, W, 3], clipped to [-1, 1]."""
        return self._decode(x0)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple:
        """(h, w, C) of the latents of a picture; UserError unless both sides fit the network."""
        height = self.size[0] if height is None else height
        width = self.size[1] if width is None else width
        unit = self.autoencoder.factor * self.model.patch_size
        if height < unit or width < unit or height % unit or width % unit:
            raise UserError(f"size {height}x{width}: both must be multiples of {unit}", exit_code=2)
        factor = self.autoencoder.factor
        return height // factor, width // factor, self.model.in_channels

    def steps_or_default(self, steps: int | None, solver: str | None = None) -> int:
        """The number of steps to take: ``steps``, or the usual one if None.

        Raises:
          UserError: if this network cannot take so many, or not with that solver.
        """
        if self.is_student and solver is not None:
            raise UserError(f"solver {solver} is for teachers, this is a student", exit_code=2)
        if solver is not None and solver not in SOLVERS:
            raise UserError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}", exit_code=2)
        if steps is None:
            return 2 if self.is_student else 20
        if self.is_student and steps not in (1, 2, 3, 4):
            raise UserError(f"steps must be 1, 2, 3 or 4 for a student, not {steps}", exit_code=2)
        if steps < 1:
            raise UserError(f"steps must be at least 1, not {steps}", exit_code=2)
        return steps

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
        solver: str | None = None,
    ) -> Array:
        """Noise to latents; compiled once for each step count, shape and solver.

        Args:
          text, mask: of `encode_text`.
          noise: [B, h, w, C], N(0, 1).
          steps: see `__call__`.
          guidance: CFG scale, a scalar or [B]; default as in `__call__`.
          step_noise: [steps-1, B, h, w, C], what a student renoises with; by default drawn for
            pictures 0..B-1 of seed 0.
          solver: see `__call__`.

        Returns:
          Latents [B, h, w, C] float32.

        Raises:
          UserError: for steps, solver or step_noise that do not fit.
        """
        steps = self.steps_or_default(steps, solver)
        guidance = self.guidance if guidance is None else guidance
        guidance = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), noise.shape[:1])
        if self.is_student:
            if step_noise is None:
                _, step_noise = self.draw_noise(0, np.arange(len(noise)), noise.shape[1:], steps)
            expected = (steps - 1, *noise.shape)
            if step_noise is not None and tuple(step_noise.shape) != expected:
                raise UserError(f"step_noise has shape {step_noise.shape}, not {expected}")
            return self._student(self.params, text, mask, noise, guidance, step_noise, steps=steps)
        if step_noise is not None:
            raise UserError("step_noise is for students: a teacher's solvers draw no noise")
        null = self.encode_text([""])
        static = dict(steps=steps, solver=solver or "dpm")
        return self._teacher(self.params, text, mask, noise, guidance, *null, **static)

    def _student_sample(self, params, text, mask, noise, guidance, step_noise, *, steps):
        # The published models saw CFG scales times 0.1.
        told = guidance * 0.1 if self.model.guidance_embeds else None

        def velocity(x, t):
            return self.model.apply({"params": params}, x, t, text, mask, told)

        return sampling.consistency_sample(
            trigflow.to_trigflow(velocity),
            noise,
            schedule=trigflow.step_schedule(steps, midpoint=self.midpoint),
            sigma_d=self.sigma_d,
            step_noise=step_noise,
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
            return sampling.dpm_solver_sample(velocity, noise, steps=steps, shift=self.shift)
        if solver == "flow_euler":
            return sampling.flow_euler_sample(velocity, noise, steps=steps, shift=self.shift)
        F = trigflow.to_trigflow(velocity)
        return sampling.trigflow_euler_sample(F, noise, steps=steps, sigma_d=self.sigma_d)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] of any shape as uint8 0..255, rounded."""
    return np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)


def _require_workdir(path: str | Path) -> None:
    folder = Path(path)
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        return
    if (folder / "model_index.json").is_file() or (folder / "transformer").is_dir():
        raise UserError(f"{path} is a diffusers folder: this version reads training workdirs only")
    if folder.exists():
        raise UserError(f"{path} is not a training workdir: it has no config.json and checkpoints")
    raise UserError(
        f"{path} does not exist: give a training workdir (this version does not read hub ids)"
    )
