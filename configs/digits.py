"""The embedded digits world: the true losses, model code and loop at the size of two CPU cores.

    python -m sprint_jax.train --config configs/digits.py:teacher --workdir runs/teacher
    python -m sprint_jax.train --config configs/digits.py:student --config.teacher=runs/teacher \\
        --workdir runs/student

Words: ``teacher`` or ``student``; ``full`` (8x16 pixels, one or two digits, GenEval's categories),
``small`` (8x8 pixels, one digit; the quickstart), or ``large`` (16x16 pixels, one or two digits). ``sprint``
keeps the student's losses those of SANA-Sprint, sCM and LADD, as in ``large``, where others were found better.

The full world took 46 minutes for the teacher and 131 for the student, each on one of two CPU cores. On 1,000
held-out prompts the teacher was right for 96.4 % in 20 steps, the student for 79.0, 89.0, 93.4 and 94.8 % in
1, 2, 3 and 4. In the small world it was 5 minutes and 6.5, both cores: 93.0 %, and 72.0, 88.2, 92.0 and 95.0 %,
on 400 prompts.
"""

from configs import default
from sprint_jax.core.config import parse_arg
from sprint_jax.sweeps import chain, product, sweep


def get_config(arg=None):
    stage, world, losses = parse_arg(
        arg, ("teacher", "student"), ("full", "small", "large"), ("best", "sprint")
    )
    c = default.get_config()
    c.data.world = world
    c.model = default.model_fields("digits")
    # Six small layers: unrolled they compile in seconds and run 1.6 times faster on CPU.
    c.model.scan = False
    c.model.patch_size = 1
    # Positions, as the 2K models have them: left and right are learned sooner.
    c.model.interpolation_scale = 1.0
    c.log.sample_guidance = 3.0
    c.sampler.midpoint = 0.8  # of so small a picture hardly anything is left at 1.3
    c.ema_decay = 0.998
    teacher(c, world) if stage == "teacher" else student(c, world)
    if stage == "student" and world != "large" and losses == "best":
        best(c, world)
    return c


def teacher(c, world):
    c.stage = "flow"
    c.steps = 1800 if world == "small" else 4000
    c.optimizer.learning_rate = 1.5e-3
    c.optimizer.decay_steps = -1


def student(c, world):
    c.stage = "distill"
    c.steps = 300 if world == "small" else 1600
    c.model.guidance_embeds = True
    # More of it gains one step and loses several; a longer run can afford more.
    c.optimizer.learning_rate = 3e-4 if world == "small" else 5e-4
    c.optimizer.decay_steps = -1
    c.optimizer.b2 = 0.99
    c.scm.guidance = (2.5, 3.0, 3.5)
    # Less noise than the published 0.2: pictures of 384 numbers are decided at smaller angles.
    c.scm.time_mean = -0.2
    c.scm.tangent_warmup = 100
    c.ladd.weight = 1.0
    c.ladd.taps = (1, 3, 5)
    # With 16 or 32 tokens a picture, batch norm leaves the heads nothing to tell; and what is wrong
    # with one step is seen in single pixels, at little noise.
    c.ladd.token_norm = True
    c.ladd.time_mean = -2.0
    c.ladd.optimizer.learning_rate = 1e-3
    c.ladd.optimizer.b1 = 0.0
    # What a fake score learns from changes with every update of the student: no momentum.
    c.dmd.optimizer.learning_rate = 5e-4
    c.dmd.optimizer.warmup_steps = 20
    c.dmd.optimizer.b1, c.dmd.optimizer.b2 = 0.0, 0.99


def best(c, world):
    """What was found best of many: sCM, the teacher's own trajectories, and TwinFlow for one step."""
    c.steps = 720 if world == "small" else 3500
    c.data.batch_size = 16
    c.optimizer.learning_rate = 1e-3
    c.ladd.weight = 0.0
    c.trajectory.weight = 1.0
    c.trajectory.steps = 5 if world == "small" else 8
    c.twinflow.weight = c.twinflow.twin_weight = 0.5
    c.images.balance = True
    c.images.max_time_probability = 1.0


def sweep_lr():
    """Which learning rate, for teachers and students; two seeds say how much of it is luck."""
    return product(
        sweep("optimizer.learning_rate", [3e-4, 5e-4, 1e-3, 1.5e-3]), sweep("seed", [0, 1])
    )


def sweep_losses():
    """Students, ``sprint``: does sCM with LADD beat either alone? `evaluate` judges: totals do not compare."""
    return chain([{}], sweep("ladd.weight", [0.0]), sweep("scm.weight", [0.0]))


def sweep_ladd():
    """The same: how strong the heads should be, and at how much noise they should look."""
    return product(sweep("ladd.weight", [0.5, 1.0, 2.0]), sweep("ladd.time_mean", [-2.0, -0.6]))
