"""Times one distillation step of the digits student and its parts, and prints JSON lines.

    python benchmarks/train_step.py --rounds 10 > benchmarks/results/train_step.jsonl

The updates are the training loop's own; teacher weights and batch are random; one device. Arms take turns in
every round (see `sprint_jax.benchmarking.timing`); no round is dropped. After the first line: one per arm, two
of what parts leave of their update, three that compare one pass for primal and tangent with a separate jvp.
  ms         [minimum, median, maximum] over the rounds; ratios and shares are taken round by round
  compile_s  without tracing; means nothing if a compilation cache is on (see the first line)
  share      of the update that the arm is part of. XLA fuses across parts, so that "everything else"
             (noise, metrics, checks of finiteness) may come out negative
  gflop      XLA's counts: [of the optimized program, of the program handed to XLA]
  forwards   those over the same counts of one student forward of the batch
XLA counts element-wise work too, some percent of a network this narrow. If the forward's first count
is far below its second, library calls hide FLOPs from the backend: read the second. Blocks must be
unrolled, without remat, because XLA counts the body of a loop once.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax import losses
from sprint_jax.benchmarking.timing import header, paired_rounds, spread
from sprint_jax.core import cli
from sprint_jax.core.config import load_config
from sprint_jax.core.errors import UserError
from sprint_jax.digits.encoders import digits_parts
from sprint_jax.digits.scenes import held_out_prompts
from sprint_jax.models import functions
from sprint_jax.models.discriminator import update_spectral
from sprint_jax.parallel import sharding
from sprint_jax.training import checks, draws, setup
from sprint_jax.training.stages import lower_updates
from sprint_jax.training.state import apply_student, trained_of

DIGITS = Path(__file__).resolve().parent.parent / "configs" / "digits.py"
FORWARD, SCM = "student forward", "sCM without teacher"
GENERATOR, DISCRIMINATOR, SEPARATE = "generator update", "discriminator update", ", separate jvp"


class Arm(NamedTuple):
    """A compiled ``call(state, batch, given)``; ``flops`` [2] are what the module's docstring says."""

    part_of: str | None
    call: Callable
    takes_state: bool
    compile_s: float
    flops: np.ndarray


def build(world, overrides):
    """``(c, nets, state, batch, given)`` of a student; given: ``frozen`` and the parts' inputs."""
    model = [word for word in overrides if word.startswith("--config.model.")]
    teacher = load_config(f"{DIGITS}:teacher,{world}", model)
    c = load_config(f"{DIGITS}:student,{world},sprint", overrides)
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    nets = setup.build_nets(c, mesh, dict(teacher.model) | {"guidance_embeds": False})
    if c.model.scan or c.model.remat != "none" or c.accumulate != 1 or not nets.heads:
        raise UserError("needs scan=false, remat=none, accumulate=1, ladd.weight>0", exit_code=2)
    checks.check_batch(c, mesh)
    (autoencoder, text_encoder, size), count = digits_parts(world), c.data.batch_size
    shape = autoencoder.encode(np.zeros((count, *size, 3))).shape
    keys = jax.random.split(jax.random.key(0), 6)
    x, noise = (jax.random.normal(key, shape) for key in keys[:2])
    t = jnp.linspace(0.1, 1.5, count)
    text, mask = jax.device_put(text_encoder.encode(held_out_prompts(world, count, 0)))
    null_text, null_mask = jax.device_put([rows[0] for rows in text_encoder.encode([""])])
    params = jax.jit(nets.teacher.init)(keys[2], x, t, text, mask)["params"]
    # Layers that start at zero would send zeros through the network.
    params = jax.tree.map(jnp.add, params, normals(keys[3], params, 0.02))
    batch = {"latents": x, "text": text, "mask": mask}
    frozen = {"teacher": params, "null_text": null_text, "null_mask": null_mask}
    frozen["seed"] = jnp.uint32(c.seed)
    state = setup.init_state(c, nets, batch, frozen, mesh)
    seen = functions.features(nets.teacher, params, text, mask, taps=c.ladd.taps)
    features = jax.eval_shape(seen, x, t)
    given = frozen | {
        "t": t,
        "noise": c.sigma_d * noise,
        "guidance": jnp.full(count, c.scm.guidance[0]),
        "features": [normals(key, features) for key in keys[3:]],
        "gradients": normals(keys[3], (state.params, trained_of(state.disc)), 1e-3),
    }
    return c, nets, state, batch, given


def normals(key, tree, scale=1.0):
    return jax.tree.map(lambda a: scale * jax.random.normal(key, a.shape, a.dtype), tree)


def parts(nets, c, state, batch, given):
    """{part: (its update, function)}; those of the optimizers return a state first."""
    x0, text, mask = draws.images_of(c, batch)
    t, noise, gradients, disc = given["t"], given["noise"], given["gradients"], state.disc
    student = draws.student_of(nets, c, text, mask, given["guidance"])
    teacher = draws.teacher_of(nets, c, given, text, mask, given["guidance"])
    features = functions.features(nets.teacher, given["teacher"], text, mask, taps=c.ladd.taps)

    def generate(params=state.params):
        keys = jax.random.split(jax.random.key(1))
        return draws.generate(c, student, params, x0, *keys)[0]

    def scm(shared_primal):
        def loss(params):
            options = {"sigma_d": c.sigma_d, "warmup": 1.0, "shared_primal": shared_primal}
            return losses.scm_loss(student, lambda *_: x0, params, x0, noise, t, **options)[0]

        return jax.grad(loss)(state.params)

    def ladd(params):
        def logits(x, t):
            return nets.heads.apply({"params": disc["params"]}, features(x, t), disc["spectral"])

        return losses.ladd_generator_loss(logits, generate(params), noise, t, c.sigma_d)[0]

    def heads_gradient():
        spectral = update_spectral(disc["params"], disc["spectral"])
        ready, noisy = iter(given["features"]), (x0, noise, t)

        def loss(params):
            logits = lambda x, t: nets.heads.apply({"params": params}, next(ready), spectral)  # noqa: E731
            kinds = noisy, noisy, noisy
            return losses.ladd_discriminator_loss(logits, *kinds, sigma_d=c.sigma_d)[0]

        return jax.grad(loss)(disc["params"])

    def heads_optimizer():
        trained = trained_of(disc)
        updates, moments = nets.disc_optimizer.update(gradients[1], state.disc_opt_state, trained)
        disc_now = disc | jax.tree.map(jnp.add, trained, updates)
        return state.replace(disc=disc_now, disc_opt_state=moments), {}

    def optimizer_and_ema():
        how = dict(ema_decay=c.ema_decay)
        return apply_student(nets.optimizer, state, t[0], gradients[0], **how)

    return {
        FORWARD: (None, lambda: student(state.params, x0, t)),
        SCM + SEPARATE: (None, lambda: scm(False)),
        "teacher with CFG": (GENERATOR, lambda: teacher(x0, t)),
        SCM: (GENERATOR, lambda: scm(True)),
        "LADD with student": (GENERATOR, lambda: jax.grad(ladd)(state.params)),
        "optimizer and EMA": (GENERATOR, optimizer_and_ema),
        "student's pictures": (DISCRIMINATOR, generate),
        "feature passes": (DISCRIMINATOR, lambda: [features(a, t) for a in (x0, noise, x0 + 1)]),
        "heads forward, backward": (DISCRIMINATOR, heads_gradient),
        "heads' optimizer": (DISCRIMINATOR, heads_optimizer),
    }


def compile_arms(c, nets, state, batch, given):
    """{name: arm} of both updates, the generator's with a separate jvp, and all parts."""
    inputs = state, batch, given
    lowered = lower_updates(c.override({"scm.shared_primal": True}), nets, *inputs)
    lowered += lower_updates(c.override({"scm.shared_primal": False}), nets, *inputs)[:1]
    names = GENERATOR, DISCRIMINATOR, GENERATOR + SEPARATE
    arms = {n: compile_arm(None, each, True) for n, each in zip(names, lowered, strict=True)}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state), None
    for name, (part_of, _) in parts(nets, c, *inputs).items():
        donated = {"donate_argnums": 0, "out_shardings": shardings} if "optimizer" in name else {}
        part = jax.jit(lambda *a, name=name: parts(nets, c, *a)[name][1](), **donated)
        arms[name] = compile_arm(part_of, part.lower(*inputs), bool(donated))
    return arms


def compile_arm(part_of, lowered, takes_state):
    start = time.perf_counter()
    compiled, seconds = lowered.compile(), time.perf_counter() - start
    flops = [(each.cost_analysis() or {}).get("flops", np.nan) for each in (compiled, lowered)]
    return Arm(part_of, compiled, takes_state, seconds, np.array(flops))


def time_arms(arms, rounds, state, batch, given):
    """{name: milliseconds per round}; arms that take the memory of a state go on with what they return."""

    def stepping(arm):
        own = jax.tree.map(jnp.copy, state) if arm.takes_state else state

        def step():
            nonlocal own
            out = jax.block_until_ready(arm.call(own, batch, given))
            own = out[0] if arm.takes_state else own

        return step

    taken = paired_rounds({name: stepping(arm) for name, arm in arms.items()}, rounds)
    return {name: np.array([each.ms[name] for each in taken]) for name in arms}


def rounded(values):
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def report(arms, times):
    """Yields the lines after the first."""
    unit = arms[FORWARD].flops
    for name, arm in arms.items():
        line = {"arm": name, "ms": spread(times[name]), "compile_s": round(arm.compile_s, 2)}
        line |= {"gflop": rounded(arm.flops / 1e9), "forwards": rounded(arm.flops / unit)}
        if arm.part_of:
            line |= {"part_of": arm.part_of, "share": spread(times[name] / times[arm.part_of])}
        yield line
    for update in (GENERATOR, DISCRIMINATOR):
        its = sum(times[name] for name, arm in arms.items() if arm.part_of == update)
        share = spread(1 - its / times[update])
        yield {"arm": "everything else", "part_of": update, "share": share}
    for names in ([SCM], [GENERATOR], [GENERATOR, DISCRIMINATOR]):
        line, both = {"separate_over_shared": " + ".join(names)}, []
        for kind, first in (("shared", names[0]), ("separate", names[0] + SEPARATE)):
            its = [first, *names[1:]]
            both.append(sum(times[name] for name in its))
            line[f"forwards_{kind}"] = rounded(sum(arms[name].flops for name in its) / unit)
            line[f"forward_times_{kind}"] = spread(both[-1] / times[FORWARD])
        yield line | {"time_ratio": spread(both[1] / both[0])}


def main(argv):
    parser = cli.Parser(prog="python benchmarks/train_step.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="turns of every arm (default 10)")
    parser.add_argument("--world", default="full", help="full (default) or small")
    parser.add_argument("--batch", type=int, default=64, help="pictures per update (default 64)")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    words, rest = cli.split_overrides(argv)
    flags = parser.parse_args(rest)
    if flags.rounds < 1:
        raise UserError(f"--rounds {flags.rounds} must be at least 1", exit_code=2)
    words += [f"--config.data.batch_size={flags.batch}", f"--config.model.dtype={flags.dtype}"]
    run = build(flags.world, words)
    about = {
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
        "shapes": {name: each.shape for name, each in run[3].items()},
        "dtype": flags.dtype,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run[2].params)),
    }
    command = " ".join(["python benchmarks/train_step.py", *argv])
    print(json.dumps(header(command, **about)), flush=True)
    arms = compile_arms(*run)
    for line in report(arms, time_arms(arms, flags.rounds, *run[2:])):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    cli.run_command(main)
