"""One pipeline for requests of several people: compiled beforehand, what it encoded kept by content."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..core.pixels import batch_rows, decode_bytes
from ..pipeline import SprintPipeline

KEPT = 128  # prompts whose features are kept, the ones used last


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture that somebody asked for: number ``index`` of a request, as in `SprintPipeline.draw`.

    Attributes:
      size: (height, width) in pixels.
      control: uint8 [H, W, 3] of that size; None draws without the control branch.
      control_kind: whether it is a 'sketch', white lines on black, or a 'photo' whose lines are found first.
      control_scale: how strongly it steers, 1 as in training.
    """

    prompt: str
    seed: int
    index: int
    steps: int
    guidance: float
    size: tuple[int, int]
    control: np.ndarray | None = None
    control_kind: str = "sketch"
    control_scale: float = 1.0

    @property
    def program(self) -> Hashable:
        """Jobs of one program can be drawn in one call."""
        return self.size, self.steps


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture, uint8 [H, W, 3], and the milliseconds of the phases of the call that drew it."""

    pixels: np.ndarray
    ms: dict[str, float]


class Recent(collections.OrderedDict):
    """The values of the keys used last, at most ``most`` of them."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __getitem__(self, key: Hashable) -> Any:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Hashable, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.most:
            self.popitem(last=False)


class Engine:
    """Draws batches of jobs. One thread at a time may call it.

    Jobs with and without a control image are drawn together: scale 0 gives the network without its branch bit
    for bit.

    Args:
      pipe: of `SprintPipeline.from_pretrained`.
      most: pictures in one call, at most; a power of two. Fewer are filled up to one.
      conditions: of `encoders.conditions.load_conditions`, which finds the lines of photos; None takes none.
    """

    def __init__(self, pipe: SprintPipeline, most: int, conditions: Any = None):
        self.pipe, self.most, self.controlled = pipe, most, "control" in pipe.params
        self._conditions = conditions
        self._text, self._lines = Recent(KEPT), Recent(KEPT)
        self._noise = jax.jit(self._draw_noise, static_argnames=("shape", "steps"))

    def knows(self, prompt: str) -> bool:
        """Whether the text encoder takes this prompt."""
        try:
            self.pipe.encode_text([prompt])
        except UserError:
            return False
        return True

    def programs(self, sizes: Sequence[tuple[int, int]], steps: Sequence[int]) -> list[list[Job]]:
        """A batch of jobs for each program of these sizes and numbers of steps.

        Raises:
          UserError: this pipeline has no such size, or cannot take so many steps.
        """
        for size in sizes:
            self.pipe.latent_shape(*size)
        for each in steps:
            self.pipe.check_steps(each)
        counts = [1 << power for power in range(self.most.bit_length())]
        each = itertools.product(sizes, steps, counts)
        return [[Job("", 0, 0, s, self.pipe.guidance, size)] * count for size, s, count in each]

    def compile(self, programs: Sequence[list[Job]]) -> Iterator[int]:
        """Runs programs once, so that no request waits for a compiler; yields how many are ready."""
        for count in sorted({len(jobs) for jobs in programs}):
            self.pipe.encode_text([" " * copy for copy in range(count)])
        if self.controlled:
            for size in dict.fromkeys(jobs[0].size for jobs in programs):
                self._compile_conditions(size)
        for done, jobs in enumerate(programs, 1):
            self.draw(jobs)
            yield done

    def _compile_conditions(self, size: tuple[int, int]) -> None:
        """Runs the programs of any number of control images that were never seen before."""
        new = itertools.count(1)
        for count in range(1, self.most + 1):
            images = [np.full((*size, 3), next(new) % 256, np.uint8) for _ in range(count)]
            self.pipe.encode_control(np.stack(images), *size)
        if self._conditions is not None:
            self._find_lines(images[0])

    def draw(self, jobs: Sequence[Job]) -> list[Drawn | UserError]:
        """Draws jobs of one program in one call.

        Returns:
          For each job its picture, the same as `SprintPipeline` draws for it alone, or why its prompt cannot
          be drawn.
        """
        clock = Clock()
        features = self._features([job.prompt for job in jobs])
        clock.lap("text")
        answers: list[Any] = [features[job.prompt] for job in jobs]
        drawn = [i for i, answer in enumerate(answers) if not isinstance(answer, UserError)]
        if drawn:
            for i, picture in zip(drawn, self._pictures(jobs, drawn, answers, clock), strict=True):
                answers[i] = Drawn(picture, clock.ms)
        return answers

    def _pictures(self, jobs, drawn: list[int], features: list, clock: "Clock") -> np.ndarray:
        (rows,) = batch_rows(len(drawn), self.most)
        filled = [drawn[row] for row in rows]
        text, mask = (np.stack([features[i][part] for i in filled]) for part in (0, 1))
        steps, shape = jobs[0].steps, self.pipe.latent_shape(*jobs[0].size)
        seeds, indices = (
            np.asarray([getattr(jobs[i], name) for i in filled], np.uint32)
            for name in ("seed", "index")
        )
        noise, step_noise = self._noise(seeds, indices, shape=shape, steps=steps)
        guidance = np.asarray([jobs[i].guidance for i in filled], np.float32)
        how = {"steps": steps, "guidance": guidance, "step_noise": step_noise}
        if self.controlled:
            how |= self._condition([jobs[i] for i in filled])
            clock.lap("condition")
        x0 = jax.block_until_ready(self.pipe.denoise(text, mask, noise, **how))
        clock.lap("denoise")
        pictures = decode_bytes(self.pipe.autoencoder, x0)[: len(drawn)]
        clock.lap("decode")
        return pictures

    def _condition(self, jobs: list[Job]) -> dict[str, Any]:
        """Control latents [B, h, w, C] and scales [B]; black ones of scale 0 where there is no image."""
        blank = np.zeros((*jobs[0].size, 3), np.uint8)
        images = np.stack([blank if job.control is None else self._sketch(job) for job in jobs])
        scales = [0.0 if job.control is None else job.control_scale for job in jobs]
        latents = jax.block_until_ready(self.pipe.encode_control(images, *jobs[0].size))
        return {"control": latents, "control_scale": np.asarray(scales, np.float32)}

    def _sketch(self, job: Job) -> np.ndarray:
        return job.control if job.control_kind == "sketch" else self._find_lines(job.control)

    def _find_lines(self, photo: np.ndarray) -> np.ndarray:
        """The lines of a photo, white on black, uint8 [H, W, 3]."""
        key = photo.shape, hashlib.sha256(photo).digest()
        if key not in self._lines:
            (lines,) = self._conditions.draw(photo[None], [np.zeros(1, int)])
            self._lines[key] = np.asarray(lines)[0]
        return self._lines[key]

    def _features(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Features [L, D] and mask [L] of each prompt, or the UserError that it raises."""
        found = {prompt: self._text[prompt] for prompt in prompts if prompt in self._text}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if not new:
            return found
        try:
            made = dict(zip(new, zip(*self._encode(new), strict=True), strict=True))
        except UserError:  # of one of them: the others must not suffer
            made = {}
            for prompt in new:
                try:
                    made[prompt] = tuple(part[0] for part in self._encode([prompt]))
                except UserError as error:
                    made[prompt] = error
        for prompt, features in made.items():
            if not isinstance(features, UserError):
                self._text[prompt] = features
        return found | made

    def _encode(self, prompts: list[str]) -> list[np.ndarray]:
        return [np.asarray(part) for part in self.pipe.encode_text(prompts)]

    def _draw_noise(self, seeds, indices, *, shape: tuple[int, int, int], steps: int):
        """`SprintPipeline.draw_noise` for several requests: noise [B, ...] and step noise [S, B, ...]."""
        one = functools.partial(self.pipe.draw_noise, shape=shape, steps=steps)
        noise, later = jax.vmap(lambda seed, index: one(seed, index[None]))(seeds, indices)
        return noise[:, 0], None if later is None else jnp.moveaxis(later[:, :, 0], 0, 1)


class Clock:
    """Milliseconds between laps, by name."""

    def __init__(self):
        self.ms: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.ms[name], self._since = 1000 * (now - self._since), now
