"""Two modes and nothing else: the blends between them at one step, by the losses that a student has.

    python benchmarks/two_modes.py

Images of 8x8 numbers are all white or all black (means +1 and -1, deviation 0.1): a mixture on a line, along
which the noise's deviation is a sixteenth of the modes' distance. The teacher is exact. The student, a network
of two hidden layers, first learns the teacher's flow, then distils it; the same budget of updates for all
methods, four seeds. A blend is an image whose mean lies between -0.5 and 0.5. Writes
benchmarks/results/two_modes.jsonl and benchmarks/pictures/two_modes.png.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from sprint_jax import losses, sampling, trigflow
from sprint_jax.benchmarking.scripts import write_lines
from sprint_jax.losses import adversarial

HERE = Path(__file__).parent
SIZE, WIDTH, BATCH, SIGMA, SPREAD = 64, 128, 128, 0.5, 0.1
SHAPE = (BATCH, 8, 8, 1)
UPDATES, SEEDS = 3000, 4
ARMS = ("scm", "scm + dmd", "scm + twinflow", "scm + critic", "trajectories", "trajectories + dmd")


def velocity(x, t):
    """The teacher: E[noise - latents | x_t] of the two modes."""
    s = trigflow.expand(t, x)
    variance = ((1 - s) * SPREAD) ** 2 + s**2
    # The posterior of the sign, by the sum over the image.
    sign = jnp.tanh((1 - s) * x.sum((1, 2, 3), keepdims=True) / variance)
    latents = sign + (1 - s) * SPREAD**2 / variance * (x - (1 - s) * sign)
    return jnp.where(s > 1e-4, (x - latents) / jnp.maximum(s, 1e-4), -latents)


def network(params, x, t, outputs=SIZE):
    """Velocity of flow inputs: a network of the image and sines of the time."""
    waves = jnp.concatenate(
        [f(t[:, None] * jnp.asarray([[1.0, 2.0, 4.0]])) for f in (jnp.sin, jnp.cos)], 1
    )
    h = jnp.concatenate([x.reshape(len(x), -1), waves], 1)
    for layer in params[:-1]:
        h = jax.nn.silu(h @ layer["w"] + layer["b"][None])
    h = h @ params[-1]["w"] + params[-1]["b"][None]
    return h.reshape(x.shape) if outputs == SIZE else h


def init(key, outputs=SIZE):
    sizes = [SIZE + 6, WIDTH, WIDTH, outputs]
    keys = jax.random.split(key, 3)
    return [
        {"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def data(key):
    sign, noise = jax.random.split(key)
    signs = jnp.where(jax.random.bernoulli(sign, 0.5, (BATCH, 1, 1, 1)), 1.0, -1.0)
    return signs + SPREAD * jax.random.normal(noise, SHAPE)


def generate(params, z):
    end = jnp.full(len(z), trigflow.MAX_TIME)
    F = trigflow.to_trigflow(lambda x, t: network(params, x, t))
    return trigflow.predict_x0(z, F(z / SIGMA, end), end, SIGMA)


def times(key):
    return trigflow.trig_time(jax.random.uniform(key, (BATCH,), minval=1e-3, maxval=1 - 1e-3))


def as_trigflow(params):
    return trigflow.to_trigflow(lambda x, t: network(params, x, t))


def student_loss(arm, student, other, step, key):
    """The sum of an arm's losses, each with a gradient by F of about sCM's length."""
    keys = jax.random.split(key, 8)
    x0, z = SIGMA * data(keys[0]), SIGMA * jax.random.normal(keys[1], SHAPE)
    teacher = trigflow.to_trigflow(velocity)
    total = 0.0
    if "scm" in arm:

        def with_logvar(params, x, t):
            # Settled: exp(-logvar) is the inverse of weight over size.
            return as_trigflow(params)(x, t), -jnp.log(SIZE * SIGMA * jnp.tan(t))

        t = trigflow.sample_time(keys[2], (BATCH,), 0.0, 1.6, SIGMA)
        warm = jnp.minimum(1.0, step / 300)
        total += losses.scm_loss(
            with_logvar, teacher, student, x0, z, t, sigma_d=SIGMA, warmup=warm
        )[0]
    if "trajectories" in arm:
        times_of = jnp.linspace(1.0, 0.0, 13).at[0].set(1 - 1 / 3000)
        noise = jax.random.normal(keys[3], SHAPE)
        end, points = sampling.dpm_solver_path(velocity, noise, times_of, times_of[:-1])
        which = jax.random.randint(keys[2], (BATCH,), 0, 12) * jax.random.bernoulli(
            keys[4], 0.5, (BATCH,)
        )
        s = times_of[which]
        x_t = points[which, jnp.arange(BATCH)] / trigflow.expand(
            jnp.sqrt(s**2 + (1 - s) ** 2), noise
        )
        found = losses.trajectory_loss(
            as_trigflow(student), SIGMA * x_t, trigflow.trig_time(s), SIGMA * end, SIGMA
        )
        total += found[0]
    if "dmd" in arm or "twinflow" in arm or "critic" in arm:
        made, renoised, t = (
            generate(student, z),
            SIGMA * jax.random.normal(keys[5], SHAPE),
            times(keys[6]),
        )

        def judged(images):
            if "dmd" in arm:
                how = dict(teacher=teacher, fake=as_trigflow(other), sigma_d=SIGMA)
                return losses.dmd_loss(images, renoised, t, **how)[0]
            if "twinflow" in arm:
                fixed = jax.lax.stop_gradient(student)
                latents = images / SIGMA
                fake = lambda x, t: network(fixed, x, t)  # noqa: E731
                noise, s = renoised / SIGMA, trigflow.flow_time(t)
                return losses.rectify_loss(-latents, latents, noise, s, fake=fake, real=velocity)[0]
            critic = lambda x, t: network(other, x, t, 1)  # noqa: E731
            how = dict(real=x0, generator=adversarial.relativistic_generator)
            return losses.ladd_generator_loss(critic, images, renoised, t, SIGMA, **how)[0]

        pull = jax.grad(judged)(jax.lax.stop_gradient(made))
        length = losses.per_sample_norm(pull).mean() * BATCH * SIGMA
        total += 2 / jnp.maximum(length, 1e-9) * (jax.lax.stop_gradient(pull) * made).sum()
    if "twinflow" in arm:
        noise, s = jax.random.normal(keys[7], SHAPE), trigflow.flow_time(times(keys[4]))
        twin, aux = losses.twin_flow_loss(
            lambda x, t: network(student, x, t), made / SIGMA, noise, s
        )
        total += 2 / jax.lax.stop_gradient(aux["length"].mean()) * twin
    return total


def other_loss(arm, other, student, key):
    """Of the fake score or the critic."""
    keys = jax.random.split(key, 4)
    x0, z = SIGMA * data(keys[0]), SIGMA * jax.random.normal(keys[1], SHAPE)
    made, renoised, t = (
        generate(student, z),
        SIGMA * jax.random.normal(keys[2], SHAPE),
        times(keys[3]),
    )
    if "dmd" in arm:
        return losses.fake_score_loss(as_trigflow(other), made, renoised, t, SIGMA)[0]
    critic = lambda x, t: network(other, x, t, 1)  # noqa: E731
    pair = (x0, renoised, t), (made, renoised, t)
    how = dict(critic=adversarial.relativistic_critic, r1=0.1, r2=0.1)
    return losses.ladd_discriminator_loss(critic, *pair, sigma_d=SIGMA, **how)[0]


def train(arm, seed):
    """Returns the means of 4096 one-step images."""
    keys = jax.random.split(jax.random.key(seed), 4)
    learn = optax.adam(optax.cosine_decay_schedule(1e-3, UPDATES))
    judge = optax.adam(1e-3, b1=0.0)

    def flow(carry, key):
        params, state = carry
        a, b, c = jax.random.split(key, 3)
        t = jax.random.uniform(a, (BATCH,))

        def loss(params):
            run = lambda x, t: network(params, x, t)  # noqa: E731
            return losses.flow_matching_loss(run, data(b), jax.random.normal(c, SHAPE), t)[0]

        updates, state = learn.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    teacher = init(keys[0])
    start = (teacher, learn.init(teacher))
    (teacher, _), _ = jax.lax.scan(flow, start, jax.random.split(keys[1], UPDATES))
    other = init(keys[2], 1) if "critic" in arm else teacher

    def distil(carry, inputs):
        student, state, other, other_state = carry
        step, key = inputs
        slope = jax.grad(lambda p: student_loss(arm, p, other, step, key))(student)
        updates, state = learn.update(slope, state)
        student = optax.apply_updates(student, updates)
        if "dmd" in arm or "critic" in arm:
            for i in range(2):
                slope = jax.grad(
                    lambda p, i=i: other_loss(arm, p, student, jax.random.fold_in(key, i))
                )(other)
                updates, other_state = judge.update(slope, other_state)
                other = optax.apply_updates(other, updates)
        return (student, state, other, other_state), None

    start = teacher, learn.init(teacher), other, judge.init(other)
    inputs = jnp.arange(UPDATES), jax.random.split(keys[3], UPDATES)
    (student, *_), _ = jax.lax.scan(distil, start, inputs)
    z = SIGMA * jax.random.normal(jax.random.key(1), (4096, *SHAPE[1:]))
    return generate(student, z).mean((1, 2, 3)) / SIGMA, z.mean((1, 2, 3)) / SIGMA * SIZE**0.5


def main(argv: list[str]) -> None:
    del argv
    lines = [{"command": "python benchmarks/two_modes.py", "updates": UPDATES, "seeds": SEEDS}]
    figure = Figure((2.6 * len(ARMS), 2.8), layout="constrained")
    panels = figure.subplots(1, len(ARMS), sharey=True)
    for panel, arm in zip(panels, ARMS, strict=True):
        made, noise = jax.jit(jax.vmap(lambda seed, arm=arm: train(arm, seed)))(jnp.arange(SEEDS))
        made, noise = np.asarray(made), np.asarray(noise)
        blends = (np.abs(made) < 0.5).mean(1)
        white = (made > 0).mean(1)
        lines.append(
            {
                "arm": arm,
                "blends": [blends.mean(), blends.std(ddof=1) / SEEDS**0.5],
                "white": [white.mean(), white.std(ddof=1) / SEEDS**0.5],
            }
        )
        lines[-1] = json.loads(json.dumps(lines[-1], default=float))
        print(json.dumps(lines[-1]), flush=True)
        panel.plot(noise[0], made[0], ".", markersize=1)
        panel.set(title=f"{arm}\n{blends.mean():.1%} blends", xlabel="noise along the line")
        panel.axhspan(-0.5, 0.5, color="0.9")
    panels[0].set_ylabel("mean of the one-step image")
    figure.savefig(HERE / "pictures" / "two_modes.png", dpi=90)
    write_lines(HERE / "results" / "two_modes.jsonl", lines)


if __name__ == "__main__":
    main(sys.argv[1:])
