"""Control branches (ControlNet): a teacher that follows sketches, and its distillation to few steps.

    python -m sprint_jax.train --config configs/controlnet.py:digits --config.trunk=runs/teacher \\
        --workdir runs/control-teacher
    python -m sprint_jax.train --config configs/controlnet.py:digits,student \\
        --config.teacher=runs/control-teacher --workdir runs/control-student
    python -m sprint_jax.train --config configs/controlnet.py:digits,student \\
        --config.teacher=runs/control-teacher --config.trunk=runs/student \\
        --config.scm.guidance=2.5,3,3.5 --config.log.sample_guidance=3 --workdir runs/control-branch
    python -m sprint_jax.train --config configs/controlnet.py:600m --config.trunk=PIPELINE \\
        --config.data.latents=DIR --workdir DIR

Words: ``digits``, ``600m`` or ``1600m``; ``teacher`` or ``student``. A teacher's branch learns by flow matching
on the frozen network in ``config.trunk``. A student is distilled from such a teacher: trunk and branch
together, or, with an existing student as ``config.trunk``, the branch alone, at the scales of guidance that
this student was trained with. The digits worlds are those of configs/digits.py, ``full`` or ``small``. Of the
published sizes, ``sana`` is the trunk of the published branches, and ``dense`` the one that can be distilled:
with QK norm and dense time embedding.

Learning rate, warm-up, clipping, caption dropout, flow shift and number of copied blocks of ``600m`` and
``1600m`` are those of the published YAML files, which have 16 images per GPU and do not say how many GPUs; 128
in all is our choice. Nothing is published about the distillation: its values are those of configs/sprint.py
and configs/digits.py. No full training was run.
"""

from configs import default, digits, sprint
from sprint_jax.core.config import parse_arg


def get_config(arg=None):
    size, stage, world, trunk = parse_arg(
        arg,
        ("digits", "600m", "1600m"),
        ("teacher", "student"),
        ("full", "small"),
        ("sana", "dense"),
    )
    if size == "digits":
        c = digits.get_config(f"{stage},{world}")
        c.model.control_blocks = 4  # of six
        c.data.control = "strokes"
        # More guidance by the text pulls away from the sketch where they disagree.
        c.log.sample_guidance = 1.5
        if stage == "student":
            c.scm.guidance = (1.0, 1.5, 2.0)
            c.steps //= 4  # a sketch leaves less open than a prompt
        return c
    c = teacher(size, trunk) if stage == "teacher" else sprint.get_config(size)
    c.model.control_blocks = 7
    c.data.control = "scribble"
    return c


def teacher(size, trunk):
    c = default.get_config()
    c.stage = "flow"
    c.steps = 20_000
    c.model = default.model_fields(f"sana-{size}" if trunk == "sana" else f"{size}-teacher")
    sprint.large_model(c)
    c.data.batch_size = 128
    c.optimizer = sprint.came(1e-4, warmup_steps=30)
    c.flow.shift = 4.0 if size == "600m" else 3.0
    c.flow.truncate_times = trunk == "sana"
    c.ema_decay = 0.9999
    return c
