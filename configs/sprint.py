"""SANA-Sprint: distils a 0.6B or 1.6B teacher at 1024 pixels into a student of one to four steps.

    python -m sprint_jax.train --config configs/sprint.py:1600m --config.teacher=DIR \\
        --config.data.latents=DIR --workdir DIR
    python -m sprint_jax.plan --config configs/sprint.py:1600m --topology v5e:16x16

Words: ``600m`` or ``1600m``. The values are those of the published YAML files and of the paper; the batch is
theirs of 16 per GPU on 32 GPUs. ``--config.data.latents=DIR`` names what `sprint_jax.encode` wrote;
``--config.data.source=synthetic`` trains on noise, to measure. What a step costs on a TPU slice is in
docs/planning.md. No full training was run.
"""

import ml_collections

from configs import default
from sprint_jax.core.config import parse_arg


def get_config(arg=None):
    (size,) = parse_arg(arg, ("600m", "1600m"))
    c = default.get_config()
    c.stage = "distill"
    c.steps = 15_000
    c.model = default.model_fields(size)
    large_model(c)
    c.data.batch_size = 512
    c.optimizer = came(2e-6, warmup_steps=5000)
    c.ladd.optimizer = came(2e-6, warmup_steps=0)
    del c.ladd.optimizer["name"]
    c.ema_decay = 0.9999
    return c


def large_model(c):
    """What training at full size needs, whatever the stage."""
    c.data.source = "latents"
    c.data.holdout = 1024
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    # 8 divides all widths, and the state of 1.6B fits a chip of 16 GB in 8 parts; `plan` finds better ones.
    c.mesh.data, c.mesh.fsdp = -1, 8


def came(learning_rate, warmup_steps):
    return ml_collections.ConfigDict(
        dict(
            name="came",
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=0,
            clip_norm=0.1,
            weight_decay=0.0,
            b1=0.9,
            b2=0.999,
        )
    )
