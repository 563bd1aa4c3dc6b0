"""Preparation of a teacher from SANA or SANA-1.5 at 1024 pixels: QK norm, dense time embedding, fine-tuning.

    python -m sprint_jax.prepare_teacher --config configs/teacher.py:1600m --model PATH \\
        --config.data.latents=DIR --workdir DIR
    python -m sprint_jax.teacher_check --model DIR --before PATH --out REPORT_DIR
    python -m sprint_jax.plan --config configs/teacher.py:4800m --topology v5p:4x4x4

PATH: a diffusers folder, a hub id or a .pth file; ``--before`` takes no .pth file: leave it out there. From
4.8B to 1.6B: ``:1600m`` and ``--prune 20``.

Words: ``600m``, ``1600m`` or ``4800m``. Learning rate, warm-up, clipping and caption dropout are those of
the published fine-tuning of SANA-1.5. No full training was run.
"""

from configs import default, sprint
from sprint_jax.core.config import parse_arg


def get_config(arg=None):
    (size,) = parse_arg(arg, ("600m", "1600m", "4800m"))
    c = default.get_config()
    c.stage = "flow"
    c.steps = 5000
    c.model = default.model_fields(size if size == "4800m" else f"{size}-teacher")
    c.model.timestep_scale = 0.001  # dense time embedding: the network sees times in [0, 1]
    sprint.large_model(c)
    c.data.batch_size = 512
    c.optimizer = sprint.came(2e-5, warmup_steps=2000)
    c.flow.shift = 3.0
    c.ema_decay = 0.9999
    return c
