"""The stages of training, one literal table, and the compiled updates of a run."""

import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from ..core.config import Config
from ..core.errors import UserError
from ..parallel.sharding import replicated
from .state import Nets, TrainState
from .updates import critic_updates, flow_update, generator_update, joint_update

COMPILERS = max(1, min(16, (os.cpu_count() or 1) // 4))  # threads, each of which uses several cores


class Stage(NamedTuple):
    """A kind of training run.

    Attributes:
      distills: whether a student is trained from a frozen teacher: it embeds guidance and predicts logvar.
      updates: ``updates(c)``: the functions of one step, in order, each for a batch of its own.
      headline: the metric by which runs of this stage are compared.
      preview_steps: sampling steps, one row of the sample grids each.
    """

    distills: bool
    updates: Callable[[Config], list[Callable]]
    headline: str
    preview_steps: tuple[int, ...]


def _distill_updates(c: Config) -> list[Callable]:
    if c.images.reuse and critic_updates(c):
        return [joint_update]
    return [generator_update, *critic_updates(c)]


STAGES = {
    "flow": Stage(False, lambda c: [flow_update], "loss/flow", (20,)),
    "distill": Stage(True, _distill_updates, "loss/total", (1, 2, 4)),
}


def stage_of(c: Config) -> Stage:
    """The row of `STAGES` that ``c.stage`` names; UserError (exit code 2) for another word."""
    if c.stage not in STAGES:
        names = ", ".join(STAGES)
        raise UserError(f"config.stage '{c.stage}' is not one of {names}", exit_code=2)
    return STAGES[c.stage]


def lower_updates(c: Config, nets: Nets, state: TrainState, batch: dict, frozen: dict) -> list:
    """Traces the updates of one step: ``compile()`` gives ``(state, batch, frozen) -> (state, metrics)``.

    Each takes a batch of its own, and the memory of the state it is given. Arguments may be arrays, or
    ShapeDtypeStructs with shardings, as from `setup.abstract_run`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, batch, frozen))
    everywhere = replicated(state.step.sharding.mesh)
    lowered = {}
    for update in (updates := stage_of(c).updates(c)):
        if update not in lowered:
            jitted = jax.jit(
                functools.partial(update, nets, c),
                donate_argnums=0,
                in_shardings=shardings,
                out_shardings=(shardings[0], everywhere),
            )
            lowered[update] = jitted.lower(state, batch, frozen)
    return [lowered[update] for update in updates]


@contextlib.contextmanager
def compile_updates(
    first: list, lower: Callable[[dict], list], shapes: Sequence[dict], most: int = 0
) -> Iterator[Callable[[dict], list | None]]:
    """Compiles the updates of batch shapes in the background: there may be dozens.

    Args:
      first: the lowered updates of the first shape, which are never given up.
      lower: `lower_updates` of the others, which are traced one after the other.
      most: so many shapes have updates at a time: what was not asked for the longest is given up, and made
        anew when it is asked for, from the cache of compiled programs. 0: all.

    Yields:
      ``updates(batch, wait)``, for any thread: the compiled updates of a batch's shape, in order; None if they
      are not ready and ``wait`` is false. What ends the tracing or compiling of a shape is raised there.
    """
    tracing, choosing = threading.Lock(), threading.Lock()
    batches = {batch["latents"].shape: batch for batch in shapes}

    def make(batch: dict) -> list:
        with tracing:  # it is Python, and would not be faster side by side
            lowered = lower(batch)
        return _compile(lowered)

    pool = concurrent.futures.ThreadPoolExecutor(COMPILERS, "compiling")
    always, *others = batches
    programs = {always: pool.submit(_compile, first)}
    programs |= {
        name: pool.submit(make, batches[name]) for name in others[: (most and most - 1) or None]
    }
    programs = dict(reversed(programs.items()))  # the first of them goes first

    def updates(batch: dict, wait: bool = True) -> list | None:
        name = batch["latents"].shape
        with choosing:
            program = programs.pop(name, None)
            if program is None:
                if len(programs) >= most:
                    programs.pop(next(other for other in programs if other != always)).cancel()
                program = pool.submit(make, batches[name])
            programs[name] = program
        return program.result() if wait or program.done() else None

    try:
        yield updates
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(updates: list) -> list:
    """Compiles each program once, however often a step runs it."""
    distinct = {id(update): update for update in updates}
    programs = {name: update.compile() for name, update in distinct.items()}
    return [programs[id(update)] for update in updates]
