"""The one training loop: teachers (stage 'flow') and students (stage 'distill').

    python -m sprint_jax.train --config configs/digits.py:student --config.teacher=DIR --workdir DIR

The same line starts a run, resumes it exactly, or reports that it is done. A batch goes
`flow_update` -> `losses.flow_matching_loss`, or `generator_update` -> `losses.scm_loss` and losses on images
(`training/terms.py`), then to the updates of the networks that judge these.
"""

import contextlib
import functools

import jax
import numpy as np

from .checkpoints.checkpoint import Checkpoints, saved_steps
from .checkpoints.workdir import write_workdir_config
from .core import cli
from .core.config import Config
from .core.progress import Progress
from .core.storage import AnyPath, as_path, make_folder
from .data import feed
from .data.loader import prefetch
from .parallel import distributed, sharding
from .parallel.interrupt import Stop, check_finite, end_stopped, named_memory
from .training import checks, setup
from .training.clock import Clock
from .training.exam import make_exam
from .training.log import MetricLog
from .training.preview import make_preview
from .training.profile import Profile
from .training.stages import compile_updates, lower_updates, stage_of
from .training.updates import check_tangent


def train(c: Config, workdir: AnyPath, peers=None) -> None:
    """Runs or resumes a run to its last step.

    Args:
      c: the resolved config.
      workdir: made if missing; see the README for what it holds.
      peers: the `parallel.peers.Peers` of a run of several processes.

    Raises:
      UserError: for whatever in config, workdir or data cannot work, before the first step; and when
        memory is not enough, or too many updates in a row were not finite.
    """
    with Stop(peers) as stop, named_memory(stop), checks.hold_workdir(workdir, peers):
        _train(c, workdir, stop, peers)


def _train(c: Config, workdir: AnyPath, stop: Stop, peers) -> None:
    # --- Checks, devices, data, networks
    changes = checks.check_workdir(workdir, c)
    checks.check_values(c)
    mesh = setup.mesh_from(c)
    checks.check_batch(c, mesh)
    if peers:
        peers.meet("checked")  # before process 0 puts something into the workdir
    nets = setup.build_nets(c, mesh)
    stop.phase("opening the data")
    data = feed.open_data(c, mesh, workdir)
    checks.check_sizes(c, [batch["latents"].shape[1:3] for batch in data.shapes])
    stop.phase("reading frozen weights")
    frozen, origin = setup.load_frozen(c, data, mesh)
    to_devices = functools.partial(sharding.to_devices, mesh)
    shapes = [sharding.place_shapes(batch, sharding.batch_sharding(mesh)) for batch in data.shapes]
    stop.phase("reading the first batch")
    data.batches(0)  # what is wrong with the data is said before anything is compiled
    stop.phase("making the first state")
    like = setup.state_shapes(c, nets, shapes[0], frozen, mesh)
    # One answer for all: a host may see the folder later than the others.
    saved = bool(sharding.same_everywhere(np.asarray(bool(saved_steps(workdir)))))
    first = None if saved else setup.init_state(c, nets, shapes[0], frozen, mesh)
    frozen = setup.at_compute_precision(c, nets, frozen)
    lower = functools.partial(lower_updates, c, nets, like, frozen=frozen)
    stop.phase("tracing the updates")
    lowered = lower(shapes[0])
    everywhere, diagnose = sharding.replicated(mesh), None
    if stage_of(c).distills:
        diagnose = jax.jit(functools.partial(check_tangent, nets, c), out_shardings=everywhere)
    preview, exam = make_preview(c, nets, data, mesh), make_exam(c, nets, data, mesh)
    profile = Profile(workdir / "profile", c.log)

    # --- Resume
    if peers:
        peers.meet("prepared")  # no collective waits for those whose start takes longer
    stop.phase("restoring")
    make_folder(workdir)
    if not saved:  # before checkpoints/, since a folder that has those without a config is nobody's
        write_workdir_config(workdir, c, 0, {})
    trunk = origin.pop("trunk", {})
    meta = {"stage": c.stage, "teacher_hash": origin.get("hash", ""), "teacher": origin}
    meta |= {"trunk_hash": trunk["hash"], "trunk": trunk} if trunk else {}
    meta |= {"data": data.identity} if data.identity else {}
    expected = {key: meta[key] for key in meta if key not in ("teacher", "trunk")}
    every = c.log.checkpoint_every
    kept = dict(keep=c.log.keep, keep_period=c.log.keep_period or None)
    checkpoints = Checkpoints(workdir / "checkpoints", every=every, **kept)
    state, *_ = checkpoints.restore_latest(like, expected) or (first,)
    start = int(state.step)
    if saved:
        write_workdir_config(workdir, c, start, changes)
    if start >= c.steps:
        print(f"{workdir} is at step {start} of {c.steps}: nothing to do", flush=True)
        return

    # --- Loop: the host prepares one step while the devices work on the one before.
    print(f"{setup.describe(c, state, mesh)}; compiling", flush=True)
    stop.phase("compiling")
    compiling = compile_updates(lowered, lower, shapes, c.data.loaded_sizes)
    passes = range(len(lowered))

    stream = prefetch(data.batches, start * len(passes), c.data.prefetch, to_devices)
    lines = MetricLog(workdir, resume_step=start, progress=Progress(c.steps, start))
    in_a_row, clock = 0, Clock(start, c.data.batch_size)
    with (
        compiling as updates,
        checkpoints,
        profile,
        contextlib.closing(stream) as batches,
        lines as log,
    ):
        updates(shapes[0])
        if peers:
            peers.meet("compiled")
        stop.begin()
        for step in range(start + 1, c.steps + 1):
            profile.at(step, state)
            metrics = {}
            for k in passes:
                with clock("data_wait"):
                    number, batch = next(batches)
                with clock("step"):
                    if not (programs := updates(batch, wait=False)):
                        stop.phase("compiling")
                        programs = updates(batch)
                    state, more = programs[k](state, batch, frozen)
                metrics |= more
            stopping = stop.after(step)
            last = step == c.steps or stopping
            sample = preview and (step % c.log.sample_every == 0 or step == c.steps)
            save = step % every == 0 or last
            # The value of the step before, so that the devices always have work queued; this step's
            # own where the state itself is needed next.
            before, in_a_row = in_a_row, metrics["health/in_a_row"]
            with clock("step"):
                bad = int(jax.device_get(in_a_row if sample or save else before))
            with clock("log"):
                log.flush()  # the line of the step before
                if sample:
                    stop.phase("drawing samples")
                metrics |= exam(state, frozen) if exam and sample else {}
            if diagnose and step % c.log.diagnostics_every == 0:
                stop.phase("checking the tangent")
                if batch["latents"].shape != shapes[0]["latents"].shape:
                    batch = to_devices(data.batches(data.next_of_first(number)))
                metrics |= diagnose(state, batch, frozen)
            if step % c.log.every == 0 or last or sample:
                log.defer(step, metrics | clock.lap(step))
            check_finite(bad, c.max_nonfinite, workdir, step, metrics)
            with clock("log"):
                if sample:
                    log.image(step, "raw", preview(state.params, frozen))
                    log.image(step, "ema", preview(state.ema, frozen))
                    log.curves()
                if save:
                    log.sync()  # so that no crash leaves the metrics behind the checkpoint
            if save:
                stop.phase("writing a checkpoint")
            with clock("checkpoint"):
                checkpoints.save(step, state, meta, force=last)
            if stopping:
                break
        log.verdict()
    if stopping:
        end_stopped(stopping, step)
    print(f"done: {workdir}/samples, {workdir}/curves.png, {workdir}/metrics.jsonl", flush=True)


def main(argv: list[str]) -> None:
    parser = cli.make_parser("train", __doc__)
    cli.add_config(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="made, or resumed")
    distributed.add_flags(parser)
    flags, config = cli.parse_with_config(parser, argv)
    cli.use_compilation_cache()
    with distributed.joined(flags) as peers:
        train(config, as_path(flags.workdir), peers)


if __name__ == "__main__":
    cli.run_command(main)
