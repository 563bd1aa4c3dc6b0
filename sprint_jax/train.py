"""The one training loop: teachers (stage 'flow') and students (stage 'distill').

    python -m sprint_jax.train --config configs/digits.py:student --config.teacher=DIR --workdir DIR

The same line starts a run, resumes it exactly, or reports that it is done. A batch goes
`flow_update` -> `losses.flow_matching_loss`, or `generator_update` -> `losses.scm_loss` and
`losses.ladd_generator_loss`, then `discriminator_update` -> `losses.ladd_discriminator_loss`.
Frozen networks are arguments (``frozen``); randomness is a function of (seed, step).
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import cli, losses, sampling, trigflow
from .atomic import write_json_atomic
from .config import Config
from .data.loader import prefetch
from .errors import UserError
from .models.discriminator import update_spectral
from .training import distributed, setup, sharding
from .training.accumulate import gradients
from .training.checkpoint import Checkpoints
from .training.diagnostics import binned, tangent_checks
from .training.interrupt import Stop, end_stopped, nonfinite_error
from .training.log import MetricLog, Progress
from .training.setup import Nets
from .training.state import TrainState, ema_update, select, tree_norm


def flow_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One flow-matching update; ``batch`` has latents [B, h, w, C], text [B, L, D], mask [B, L]."""

    def loss(params, batch, key):
        keys = jax.random.split(key, 3)
        latents = batch["latents"]
        t = trigflow.sample_flow_time(
            keys[0], latents.shape[:1], c.flow.time_mean, c.flow.time_std, c.flow.shift
        )
        noise = jax.random.normal(keys[1], latents.shape)
        drop = jax.random.bernoulli(keys[2], c.flow.caption_dropout, t.shape)
        text = jnp.where(drop[:, None, None], frozen["null_text"][None], batch["text"])
        mask = jnp.where(drop[:, None], frozen["null_mask"][None], batch["mask"])

        def velocity(x, t):
            return nets.model.apply({"params": params}, x, t, text, mask)

        return losses.flow_matching_loss(velocity, latents, noise, t)

    key = jax.random.fold_in(jax.random.key(c.seed), state.step)
    value, aux, grads = gradients(loss, state.params, batch, key, c.accumulate)
    state, metrics = _apply(nets, c, state, value, grads)
    metrics |= {"loss/flow": value, **binned("flow_loss", aux["t"], aux["loss"], limit=1.0)}
    return state, metrics | _health(aux["loss"], state)


def generator_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update of the student: sCM plus LADD. Touches neither heads nor teacher; counts the step."""

    def loss(params, batch, key):
        keys = jax.random.split(key, 7)
        x0, text, mask = _data(c, batch)
        count = x0.shape[:1]
        guidance = jax.random.choice(keys[0], jnp.asarray(c.scm.guidance, jnp.float32), count)
        student = _student(nets, text, mask, guidance)
        teacher = _teacher_with_cfg(nets, frozen, text, mask, guidance)

        t = trigflow.sample_time(keys[1], count, c.scm.time_mean, c.scm.time_std, c.sigma_d)
        warmup = (
            jnp.minimum(1.0, state.step / c.scm.tangent_warmup) if c.scm.tangent_warmup else 1.0
        )
        scm, aux = losses.scm_loss(
            student,
            teacher,
            params,
            x0,
            _noise(c, keys[2], x0),
            t,
            sigma_d=c.sigma_d,
            warmup=warmup,
            tangent_constant=c.scm.tangent_constant,
            mean_norm=c.scm.mean_norm,
            shared_primal=c.scm.shared_primal,
        )
        total = c.scm.weight * scm
        if nets.heads is not None:
            fake = _generate(c, student, params, x0, keys[3], keys[4])
            t_disc = trigflow.sample_time(
                keys[5], count, c.ladd.time_mean, c.ladd.time_std, c.sigma_d
            )
            features = _features(nets, c, frozen, text, mask)

            def discriminate(x, t):
                return nets.heads.apply(
                    {"params": state.disc["params"]}, features(x, t), state.disc["spectral"]
                )

            adversarial, gan = losses.ladd_generator_loss(
                discriminate, fake, _noise(c, keys[6], x0), t_disc, c.sigma_d
            )
            total = total + c.ladd.weight * adversarial
            aux |= {"generator_logits": gan["logits"]}
        return total, aux

    key = jax.random.fold_in(jax.random.key(c.seed), 2 * state.step)
    value, aux, grads = gradients(loss, state.params, batch, key, c.accumulate)
    state, metrics = _apply(nets, c, state, value, grads)
    metrics |= {"loss/total": value, "loss/scm": aux["loss"].mean()}
    if nets.heads is not None:
        metrics["loss/ladd_generator"] = -aux["generator_logits"].mean()
    for name in ("tangent_norm", "teacher_gap", "error", "logvar"):
        metrics |= binned(name, aux["t"], aux[name])
    return state, metrics | _health(aux["loss"], state)


def discriminator_update(nets: Nets, c, state: TrainState, batch: dict, frozen: dict):
    """One update of the LADD heads; the student and the step counter stay as they are."""
    spectral = update_spectral(state.disc["params"], state.disc["spectral"])

    def loss(params, batch, key):
        keys = jax.random.split(key, 9)
        x0, text, mask = _data(c, batch)
        count = x0.shape[:1]
        guidance = jax.random.choice(keys[0], jnp.asarray(c.scm.guidance, jnp.float32), count)
        student = _student(nets, text, mask, guidance)
        fake = jax.lax.stop_gradient(_generate(c, student, state.params, x0, keys[1], keys[2]))

        def noisy(x0, time_key, noise_key):
            t = trigflow.sample_time(time_key, count, c.ladd.time_mean, c.ladd.time_std, c.sigma_d)
            return x0, _noise(c, noise_key, x0), t

        rolled = noisy(jnp.roll(x0, 1, axis=0), keys[7], keys[8]) if c.ladd.misaligned else None
        return losses.ladd_discriminator_loss(
            _features(nets, c, frozen, text, mask),
            lambda features: nets.heads.apply({"params": params}, features, spectral),
            noisy(x0, keys[3], keys[4]),
            noisy(fake, keys[5], keys[6]),
            rolled,
            sigma_d=c.sigma_d,
            r1_weight=c.ladd.r1_weight,
        )

    # The step was counted by the generator update just before; odd keys are the discriminator's.
    key = jax.random.fold_in(jax.random.key(c.seed), 2 * state.step - 1)
    value, aux, grads = gradients(loss, state.disc["params"], batch, key, c.accumulate)
    norm = tree_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    updates, opt_state = nets.disc_optimizer.update(
        grads, state.disc_opt_state, state.disc["params"]
    )
    params = optax.apply_updates(state.disc["params"], updates)
    new = ({"params": params, "spectral": spectral}, opt_state)
    disc, disc_opt_state = select(finite, new, (state.disc, state.disc_opt_state))
    bad = (~finite).astype(jnp.int32)
    state = state.replace(
        disc=disc,
        disc_opt_state=disc_opt_state,
        skipped=state.skipped + bad,
        in_a_row=state.in_a_row.at[1].set(jnp.where(finite, 0, state.in_a_row[1] + 1)),
    )
    metrics = {"loss/ladd_discriminator": value, "grad/heads": norm}
    metrics |= {f"logits/{name}": values.mean() for name, values in aux.items()}
    return state, metrics | {
        "health/skipped": state.skipped,
        "health/in_a_row": state.in_a_row.max(),
    }


def check_tangent(nets: Nets, c, state: TrainState, batch: dict, frozen: dict) -> dict:
    """The student's tangent against a central difference, and in bfloat16 against float32."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(c.seed), state.step), 3)
    x0, text, mask = _data(c, batch)
    guidance = jax.random.choice(keys[0], jnp.asarray(c.scm.guidance, jnp.float32), x0.shape[:1])
    t = trigflow.sample_time(keys[1], x0.shape[:1], c.scm.time_mean, c.scm.time_std, c.sigma_d)
    x = trigflow.add_noise(x0, _noise(c, keys[2], x0), t) / c.sigma_d
    scale = jnp.cos(t) * jnp.sin(t)
    dx = trigflow.expand(scale, x) * _teacher_with_cfg(nets, frozen, text, mask, guidance)(x, t)

    def F(dtype):
        student = _student(nets._replace(model=nets.model.clone(dtype=dtype)), text, mask, guidance)
        return lambda x, t: student(state.params, x, t)[0]

    return tangent_checks(F(jnp.float32), F(jnp.bfloat16), x, t, dx, scale)


def _data(c, batch):
    return batch["latents"] * c.sigma_d, batch["text"], batch["mask"]


def _noise(c, key, x0):
    return c.sigma_d * jax.random.normal(key, x0.shape)


def _student(nets, text, mask, guidance):
    """``student(params, x, t) -> (F, logvar)`` of one batch."""

    def student(params, x, t):
        def velocity(x_fm, t_fm):
            return nets.model.apply(
                {"params": params}, x_fm, t_fm, text, mask, guidance * 0.1, with_logvar=True
            )

        return trigflow.to_trigflow(velocity)(x, t)

    return student


def _teacher_with_cfg(nets, frozen, text, mask, guidance):
    """``teacher(x, t) -> F`` with classifier-free guidance against the empty prompt."""

    def velocity(x_fm, t_fm, text, mask):
        return nets.teacher.apply({"params": frozen["teacher"]}, x_fm, t_fm, text, mask)

    F = trigflow.to_trigflow(velocity)
    guided = sampling.with_cfg(F, guidance, frozen["null_text"][None], frozen["null_mask"][None])
    return lambda x, t: guided(x, t, text, mask)


def _features(nets, c, frozen, text, mask):
    """``features(x, t)``: the frozen teacher's tapped blocks on TrigFlow inputs."""

    def features(x, t):
        x_fm, t_fm = trigflow.flow_inputs(x, t)
        return nets.teacher.apply(
            {"params": frozen["teacher"]}, x_fm, t_fm, text, mask, taps=tuple(c.ladd.taps)
        )

    return features


def _generate(c, student, params, x0, time_key, noise_key):
    """The student's image from real images noised to random times, often to the largest."""
    keys = jax.random.split(time_key)
    t = trigflow.sample_time(keys[0], x0.shape[:1], c.scm.time_mean, c.scm.time_std, c.sigma_d)
    t = trigflow.with_max_time(keys[1], t, c.ladd.max_time_probability)
    x_t = trigflow.add_noise(x0, _noise(c, noise_key, x0), t)
    F, _ = student(params, x_t / c.sigma_d, t)
    return trigflow.predict_x0(x_t, F, t, c.sigma_d)


def _apply(nets, c, state, value, grads):
    """Optimizer and EMA; a non-finite update leaves everything but the counters as it was."""
    norm = tree_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    updates, opt_state = nets.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = ema_update(state.ema, params, c.ema_decay, state.step)
    params, ema, opt_state = select(
        finite, (params, ema, opt_state), (state.params, state.ema, state.opt_state)
    )
    state = state.replace(
        step=state.step + 1,
        params=params,
        ema=ema,
        opt_state=opt_state,
        skipped=state.skipped + (~finite).astype(jnp.int32),
        in_a_row=state.in_a_row.at[0].set(jnp.where(finite, 0, state.in_a_row[0] + 1)),
    )
    distance = tree_norm(jax.tree.map(jnp.subtract, ema, params)) / tree_norm(params)
    return state, {"grad/student": norm, "ema/distance": distance}


def _health(loss, state):
    bad = 1 - jnp.isfinite(loss).astype(jnp.float32)
    return {
        "health/nonfinite_samples": bad.mean(),
        "health/skipped": state.skipped,
        "health/in_a_row": state.in_a_row.max(),
    }


def lower_updates(c: Config, nets: Nets, state: TrainState, batch: dict, frozen: dict) -> list:
    """The updates of one step, traced: ``compile()`` gives ``(state, batch, frozen) -> (state, metrics)``."""
    updates = [flow_update] if c.stage == "flow" else [generator_update]
    if nets.heads is not None:
        updates.append(discriminator_update)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = [
        jax.jit(
            functools.partial(update, nets, c), donate_argnums=0, out_shardings=(shardings, None)
        )
        for update in updates
    ]
    return [update.lower(state, batch, frozen) for update in jitted]


def train(c: Config, workdir: Path, overridden: list[str], peers=None) -> None:
    """Runs or resumes a run to its last step.

    Args:
      c: the resolved config.
      workdir: made if missing; see the README for what it holds.
      overridden: dotted keys that the user set by hand; one that nothing reads is an error.
      peers: the `training.peers.Peers` of a run of several processes.

    Raises:
      UserError: for whatever in config, workdir or data cannot work, before the first step; and when
        too many updates in a row were not finite.
    """
    # --- Checks, devices, data, networks
    setup.check_workdir(workdir, c)
    setup.check_values(c)
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp)
    setup.check_batch(c, mesh)
    if peers:
        peers.meet("checked")  # before process 0 puts something into the workdir
    nets = setup.build_nets(c)
    data = setup.open_data(c)
    frozen, origin = setup.load_frozen(c, data, mesh)
    batch = sharding.to_devices(mesh, data.batches(0))
    state = setup.init_state(c, nets, batch, frozen, mesh)
    lowered = lower_updates(c, nets, state, batch, frozen)
    checks = jax.jit(functools.partial(check_tangent, nets, c)) if c.stage == "distill" else None
    preview = setup.make_preview(c, nets, data)
    options = {key: c.log[key] for key in c.log}
    total, limit, depth = c.steps, c.max_nonfinite, c.data.prefetch
    unread = sorted(set(c.unread()) & set(overridden))
    if unread:
        raise UserError(
            f"config.{unread[0]} is not read by stage '{c.stage}'; leave it out", exit_code=2
        )

    # --- Resume
    workdir.mkdir(parents=True, exist_ok=True)
    meta = {"stage": c.stage, "teacher_hash": origin.get("hash", ""), "teacher": origin}
    expected = {key: meta[key] for key in ("stage", "teacher_hash")}
    checkpoints = Checkpoints(
        workdir / "checkpoints", keep=options["keep"], every=options["checkpoint_every"]
    )
    restored = checkpoints.restore_latest(state, expected, donate=True)
    state = restored[0] if restored else state
    start = int(state.step)
    if start >= total:
        print(f"{workdir} is at step {start} of {total}: nothing to do", flush=True)
        return
    write_json_atomic(workdir / "config.json", c.to_dict())

    # --- Loop
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6
    print(f"{c.stage}: {size:.2f} M parameters, {mesh.size} device(s); compiling", flush=True)
    updates = [program.compile() for program in lowered]
    feed = prefetch(data.batches, start * len(updates), depth)
    stop = Stop(peers)
    in_a_row = np.zeros(())
    progress = Progress(total, start)
    with checkpoints, MetricLog(workdir, resume_step=start) as log:
        for step in range(start + 1, total + 1):
            metrics = {}
            for update in updates:
                batch = sharding.to_devices(mesh, next(feed)[1])
                state, more = update(state, batch, frozen)
                metrics |= more
            stopping = stop.after(step)
            last = step == total or stopping
            # The value of the step before, so that the device always has work queued.
            before, in_a_row = in_a_row, metrics["health/in_a_row"]
            if int(in_a_row if last else before) >= limit:
                raise nonfinite_error(workdir, step, metrics, limit)
            if checks and step % options["diagnostics_every"] == 0:
                metrics |= checks(state, batch, frozen)
            if step % options["every"] == 0 or last:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                log.write(step, values)
                shown = {name: value for name, value in values.items() if name.startswith("loss/")}
                progress.update(step, shown)
            if step % options["sample_every"] == 0 or step == total:
                for name, params in (("raw", state.params), ("ema", state.ema)):
                    log.image(step, name, preview(params, frozen))
                log.curves()
            if last or step % options["checkpoint_every"] == 0:
                log.sync()  # so that no crash leaves the metrics behind the checkpoint
            checkpoints.save(step, state, meta, force=last)
            if stopping:
                break
    if stopping:
        end_stopped(stopping, step)
    print(f"done: {workdir}/samples, {workdir}/curves.png, {workdir}/metrics.jsonl", flush=True)


def main(argv: list[str]) -> None:
    parser = cli.make_parser("train", __doc__)
    cli.add_config(parser)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="made if missing; resumed if not"
    )
    distributed.add_flags(parser)
    flags, config = cli.parse_with_config(parser, argv)
    words, _ = cli.split_overrides(argv)
    overridden = [word.removeprefix("--config.").partition("=")[0] for word in words]
    with distributed.joined(flags) as peers:
        train(config, Path(flags.workdir), overridden, peers)


if __name__ == "__main__":
    cli.run_command(main)
