"""Times one distillation step of the digits student and its parts, and prints JSON lines.

    python benchmarks/train_step.py --rounds 10 > benchmarks/results/train_step.jsonl

The updates are the training loop's own; teacher weights and batch are random; one device. Arms take
turns within every round, compiled and warmed up before, and what they return is waited for. After
the first line: one per arm, two with what the parts leave of their update, and three that compare
one pass for primal and tangent with a separate jvp.
  ms         [minimum, median, maximum] over the rounds; ratios and shares are taken round by round
  compile_s  without tracing; means nothing if a compilation cache is on (see the first line)
  share      of the update that the arm is part of. XLA fuses across parts, so that "everything else"
             (noise, metrics, checks of finiteness) may come out negative
  gflop      "compiled": XLA's count of the optimized program; "traced": of the program handed to it;
             "matmuls": 2 per multiply-add of the forward's matmuls and depthwise convolutions
  forwards   those over the same count of one student forward of the batch
XLA counts element-wise work too, some percent of a network this narrow. Where "compiled" is below
"matmuls", library calls hide FLOPs from the backend's count: read "traced" there. Blocks must be
unrolled, without remat, because XLA counts the body of a loop once.
"""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sprint_jax import cli, losses, train
from sprint_jax.config import Config, load_config
from sprint_jax.data.digits import held_out_prompts
from sprint_jax.errors import UserError
from sprint_jax.models.discriminator import update_spectral
from sprint_jax.training import setup, sharding
from sprint_jax.training.log import write_json_atomic
from sprint_jax.training.state import TrainState, select, tree_norm

DIGITS = Path(__file__).resolve().parent.parent / "configs" / "digits.py"
FORWARD, SCM = "student forward", "sCM: student jvp, forward, backward"
GENERATOR, DISCRIMINATOR, SEPARATE = "generator update", "discriminator update", ", separate jvp"


class Run(NamedTuple):
    """A run before its first step; ``given``: ``frozen`` and the inputs of the parts."""

    c: Config
    nets: setup.Nets
    state: TrainState
    batch: dict
    frozen: dict
    given: dict


class Arm(NamedTuple):
    """``call(state, batch, inputs)``, compiled; ``flops`` are [compiled, traced]."""

    part_of: str | None
    call: Callable
    inputs: dict
    takes_state: bool
    compile_s: float
    flops: np.ndarray


def build(world, overrides):
    """The student of a world before its first step, from a teacher of random weights."""
    model = [word for word in overrides if word.startswith("--config.model.")]
    with tempfile.TemporaryDirectory() as workdir:
        teacher = load_config(f"{DIGITS}:teacher,{world}", model)
        write_json_atomic(Path(workdir) / "config.json", teacher.to_dict())
        c = load_config(f"{DIGITS}:student,{world}", [*overrides, f"--config.teacher={workdir}"])
        nets = setup.build_nets(c)
    if c.model.scan or c.model.remat != "none" or c.accumulate != 1 or not nets.heads:
        message = "counts need model.scan=false, model.remat=none, accumulate=1 and ladd.weight > 0"
        raise UserError(message, exit_code=2)
    autoencoder, text_encoder, (height, width) = setup.toy_parts(world)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    count, factor = c.data.batch_size, autoencoder.factor
    shape = count, height // factor, width // factor, nets.model.in_channels
    keys = jax.random.split(jax.random.key(0), 6)
    x, z = (jax.random.normal(key, shape) for key in keys[:2])
    t = jnp.linspace(0.1, 1.5, count)
    text, mask = text_encoder.encode(held_out_prompts(world, count, 0))
    batch = jax.device_put({"latents": x, "text": text, "mask": mask}, sharding.replicated(mesh))
    params = nets.teacher.init(keys[2], x, t, text, mask)["params"]
    # Layers that start at zero would send zeros through the network.
    params = jax.tree.map(jnp.add, params, normals(keys[3], params, 0.02))
    null_text, null_mask = (a[0] for a in text_encoder.encode([""]))
    frozen = {"teacher": params, "null_text": null_text, "null_mask": null_mask}
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
    state = setup.init_state(c, nets, batch, frozen, mesh)
    features = jax.eval_shape(train._features(nets, c, frozen, text, mask), x, t)
    given = {
        "t": t,
        "noise": c.sigma_d * z,
        "guidance": jnp.full(count, c.scm.guidance[0]),
        "features": [normals(key, features) for key in keys[3:]],
        "gradients": normals(keys[3], (state.params, state.disc["params"]), 1e-3),
    }
    given = frozen | jax.device_put(given, sharding.replicated(mesh))
    return Run(c, nets, state, batch, frozen, given)


def normals(key, tree, scale=1.0):
    return jax.tree.map(lambda a: scale * jax.random.normal(key, a.shape, a.dtype), tree)


def parts(nets, c, state, batch, given):
    """{part: (its update, function)}; those of the optimizers return a state first."""
    x0, text, mask = train._data(c, batch)
    t, noise, guidance = given["t"], given["noise"], given["guidance"]
    student = train._student(nets, text, mask, guidance)
    teacher = train._teacher_with_cfg(nets, given, text, mask, guidance)
    features = train._features(nets, c, given, text, mask)
    disc = state.disc

    def generate(params=state.params):
        return train._generate(c, student, params, x0, *jax.random.split(jax.random.key(1)))

    def scm(params, shared_primal):
        options = {"sigma_d": c.sigma_d, "warmup": 1.0, "shared_primal": shared_primal}
        return losses.scm_loss(student, lambda x, t: noise - x, params, x0, noise, t, **options)[0]

    def ladd(params):
        def logits(x, t):
            return nets.heads.apply({"params": disc["params"]}, features(x, t), disc["spectral"])

        return losses.ladd_generator_loss(logits, generate(params), noise, t, c.sigma_d)[0]

    def hinge(params, spectral):
        ready, noisy = iter(given["features"]), (x0, noise, t)
        return losses.ladd_discriminator_loss(
            lambda x, t: next(ready),
            lambda features: nets.heads.apply({"params": params}, features, spectral),
            *(noisy, noisy, noisy),
            sigma_d=c.sigma_d,
        )[0]

    def heads_gradient():
        spectral = update_spectral(disc["params"], disc["spectral"])
        return jax.grad(hinge)(disc["params"], spectral), spectral

    def optimizer():
        return train._apply(nets, c, state, jnp.zeros(()), given["gradients"][0])

    def heads_optimizer():
        gradients, old = given["gradients"][1], (disc["params"], state.disc_opt_state)
        updates, moments = nets.disc_optimizer.update(gradients, old[1], old[0])
        new = optax.apply_updates(old[0], updates), moments
        params, moments = select(jnp.isfinite(tree_norm(gradients)), new, old)
        return state.replace(disc=disc | {"params": params}, disc_opt_state=moments), {}

    return {
        FORWARD: (None, lambda: student(state.params, x0 / c.sigma_d, t)),
        SCM + SEPARATE: (None, lambda: jax.grad(scm)(state.params, False)),
        "teacher with CFG": (GENERATOR, lambda: teacher(x0 / c.sigma_d, t)),
        SCM: (GENERATOR, lambda: jax.grad(scm)(state.params, True)),
        "LADD: student, features, heads, backward": (
            GENERATOR,
            lambda: jax.grad(ladd)(state.params),
        ),
        "optimizer and EMA": (GENERATOR, optimizer),
        "student forward to pictures": (DISCRIMINATOR, generate),
        "three feature passes": (
            DISCRIMINATOR,
            lambda: [features(x, t) for x in (x0, noise, x0 + noise)],
        ),
        "heads forward, backward": (DISCRIMINATOR, heads_gradient),
        "heads' optimizer": (DISCRIMINATOR, heads_optimizer),
    }


def compile_arms(run):
    """Returns ({name: arm}, FLOPs of the matmuls of a student forward)."""
    arms, rest = {}, run[1:5]
    updates = train.lower_updates(run.c.override({"scm.shared_primal": True}), *rest)
    updates += train.lower_updates(run.c.override({"scm.shared_primal": False}), *rest)[:1]
    names = GENERATOR, DISCRIMINATOR, GENERATOR + SEPARATE
    for name, lowered in zip(names, updates, strict=True):
        arms[name] = compile_arm(None, lowered, run.frozen, True)
    inputs = run.state, run.batch, run.given
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state), None
    for name, (part_of, _) in parts(run.nets, run.c, *inputs).items():
        donated = {"donate_argnums": 0, "out_shardings": shardings} if "optimizer" in name else {}
        part = jax.jit(lambda *a, name=name: parts(run.nets, run.c, *a)[name][1](), **donated)
        traced = part.trace(*inputs)
        arms[name] = compile_arm(part_of, traced.lower(), run.given, bool(donated))
        if name == FORWARD:
            matmuls = matmul_flops(traced.jaxpr)
    return arms, matmuls


def compile_arm(part_of, lowered, inputs, takes_state):
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    counts = [(each.cost_analysis() or {}).get("flops", np.nan) for each in (compiled, lowered)]
    return Arm(part_of, compiled, inputs, takes_state, seconds, np.array(counts))


def matmul_flops(jaxpr):
    """2 per multiply-add of the matmuls and depthwise convolutions of a jaxpr without loops."""
    total = 0
    for equation in jaxpr.eqns:
        size = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            shape, axes = equation.invars[0].aval.shape, equation.params["dimension_numbers"][0][0]
            total += 2 * size * math.prod(shape[axis] for axis in axes)
        elif equation.primitive.name == "depthwise_convolve":
            total += 2 * 9 * size
        inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
        total += sum(matmul_flops(each) for each in inner if hasattr(each, "eqns"))
    return total


def time_arms(run, arms, rounds):
    """Returns {name: milliseconds per round}; the state goes from update to update."""
    times, state = {name: [] for name in arms}, run.state
    for turn in range(-2, rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            out = jax.block_until_ready(arm.call(state, run.batch, arm.inputs))
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
            state = out[0] if arm.takes_state else state
    return {name: np.array(each) for name, each in times.items()}


def rounded(values):
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def summary(values):
    return rounded((values.min(), np.median(values), values.max()))


def counts(flops):
    return dict(zip(("compiled", "traced"), rounded(flops), strict=True))


def report(arms, matmuls, times):
    """Yields the lines after the first."""
    unit = arms[FORWARD].flops
    for name, arm in arms.items():
        line = {"arm": name, "ms": summary(times[name]), "compile_s": round(arm.compile_s, 2)}
        line |= {"gflop": counts(arm.flops / 1e9), "forwards": counts(arm.flops / unit)}
        if name == FORWARD:
            line["gflop"] |= {"matmuls": rounded([matmuls / 1e9])[0]}
        if arm.part_of:
            line |= {"part_of": arm.part_of, "share": summary(times[name] / times[arm.part_of])}
        yield line
    for update in (GENERATOR, DISCRIMINATOR):
        its = [times[name] for name, arm in arms.items() if arm.part_of == update]
        share = summary(1 - sum(its) / times[update])
        yield {"arm": "everything else", "part_of": update, "share": share}
    both = GENERATOR, DISCRIMINATOR
    for of, shared in (("sCM branch", [SCM]), (GENERATOR, [GENERATOR]), ("step", both)):
        separate = [shared[0] + SEPARATE, *shared[1:]]
        (flops, ms), (more_flops, more_ms) = (
            (sum(arms[name].flops for name in names), sum(times[name] for name in names))
            for names in (shared, separate)
        )
        yield {
            "comparison": "separate jvp over shared",
            "of": of,
            "forwards_shared": counts(flops / unit),
            "forwards_separate": counts(more_flops / unit),
            "flops_ratio": counts(more_flops / flops),
            "time_ratio": summary(more_ms / ms),
            "forward_times_shared": summary(ms / times[FORWARD]),
        }


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
    latents, text = (run.batch[name].shape for name in ("latents", "text"))
    header = {
        "command": " ".join(["python", "benchmarks/train_step.py", *argv]),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
        "latents": latents,
        "text": text,
        "blocks": run.nets.model.num_layers,
        "width": run.nets.model.features,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.state.params)),
        "dtype": flags.dtype,
        "rounds": flags.rounds,
    }
    print(json.dumps(header), flush=True)
    arms, matmuls = compile_arms(run)
    for line in report(arms, matmuls, time_arms(run, arms, flags.rounds)):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    cli.run_command(main)
