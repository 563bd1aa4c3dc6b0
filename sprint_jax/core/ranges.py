"""The values that each key of a run's config may take; the keys and their meaning: configs/default.py.

Words that name a choice and are always read, such as ``optimizer.name``, are checked where the choices are.
"""

import math
import re
from typing import Any

from .errors import UserError
from .schema import (
    FLAG,
    PLACE,
    TEXT,
    Kind,
    check,
    either,
    number,
    one_of,
    optional,
    several,
    whole,
)

SEED = whole(0, 2**32 - 1)  # JAX takes no more: 2**32 + 1 would draw what 1 draws
COUNT = whole(1, 2**31 - 1)
SIZE = whole(
    1, 2**20
)  # of one axis of an array: anything above is a slip, and would take the memory
WIDTH = 2**16  # of a network, at most
LAYERS = whole(1, 1000)
SHARE = number(0, 1)
POSITIVE = number(above=0)
NOT_NEGATIVE = number(0)
GUIDANCE = number(0)
SIZES = Kind(
    "HEIGHTxWIDTH", lambda v: re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", str(v)) is not None
)
FOLDER = Kind(f"{PLACE.says}, not empty", lambda v: v != "" and PLACE.holds(v))
MIDPOINT = number(above=0, below=math.pi / 2)

# Fields of models.sana.SanaTransformer; diffusers' transformer/config.json has the same.
MODEL = dict(
    patch_size=whole(1, 64),
    attention_head_dim=whole(1, WIDTH),
    num_attention_heads=whole(1, WIDTH),
    num_cross_attention_heads=whole(1, WIDTH),
    cross_attention_head_dim=whole(1, WIDTH),
    caption_channels=SIZE,
    in_channels=SIZE,
    out_channels=SIZE,
    sample_size=whole(1, 2**16),
    num_layers=LAYERS,
    mlp_ratio=number(0.01, 1000),
    attention_bias=FLAG,
    qk_norm=FLAG,
    guidance_embeds=FLAG,
    flow_map=FLAG,
    control_blocks=whole(0, 999),
    control_wiring=TEXT,
    logvar=FLAG,
    timestep_scale=number(above=0, below=1e6),
    interpolation_scale=optional(number(0, 1e6)),
    dtype=TEXT,
    remat=TEXT,
    scan=FLAG,
)

OPTIMIZER = dict(
    learning_rate=NOT_NEGATIVE,
    warmup_steps=whole(0),
    decay_steps=whole(-1),
    clip_norm=NOT_NEGATIVE,
    weight_decay=NOT_NEGATIVE,
    b1=number(0, below=1),
    b2=number(0, below=1),
)

_DEVICES = either(COUNT, one_of(-1))

# Fields of pipeline.Request.
REQUEST = dict(
    steps=optional(whole(1, 1000)),
    guidance=optional(GUIDANCE),
    seed=SEED,
    height=optional(whole(1, 2**13)),
    width=optional(whole(1, 2**13)),
    images_per_prompt=whole(1, 10**5),
    first=whole(0, 2**31 - 1),
    strength=number(above=0, high=1),
    control_scale=number(-100, 100),
    negative=TEXT,
    binning=FLAG,
    solver=optional(TEXT),
    batch_size=COUNT,
)

SECTIONS = {
    "": dict(
        stage=TEXT,
        seed=SEED,
        steps=COUNT,
        teacher=PLACE,
        trunk=PLACE,
        init=PLACE,
        sigma_d=POSITIVE,
        ema_decay=SHARE,
        accumulate=COUNT,
        max_nonfinite=COUNT,
    ),
    "model": MODEL,
    "data": dict(
        source=TEXT,
        world=TEXT,
        dir=FOLDER,
        latent_size=several(SIZE, 2, 2),
        text_length=SIZE,
        latents=several(PLACE),
        images=several(PLACE),
        weights=several(POSITIVE),
        encoders=PLACE,
        control=TEXT,
        control_maps=several(PLACE),
        control_weights=PLACE,
        control_thickness=whole(-1, 24),
        control_variants=whole(1, 1000),
        resolution=whole(1, 2**16),
        sizes=several(SIZES),
        most_sizes=whole(0),
        loaded_sizes=either(one_of(0), whole(2)),
        prompt_style=one_of("diffusers", "nvlabs"),
        null_mask=one_of("own", "caption"),
        image_feature=TEXT,
        caption_feature=TEXT,
        caption_temperature=NOT_NEGATIVE,
        max_rejected=SHARE,
        holdout=whole(0),
        batch_size=COUNT,
        prefetch=COUNT,
    ),
    "encode": dict(
        dtype=one_of("bfloat16", "float32"),
        batch_size=COUNT,
        text_batch_size=COUNT,
        unit=COUNT,
        threads=whole(1, 4096),
    ),
    "optimizer": OPTIMIZER | dict(name=TEXT),
    "flow": dict(
        time_mean=number(),
        time_std=NOT_NEGATIVE,
        shift=POSITIVE,
        truncate_times=FLAG,
        caption_dropout=SHARE,
    ),
    "scm": dict(
        weight=NOT_NEGATIVE,
        time_mean=number(),
        time_std=NOT_NEGATIVE,
        guidance=several(GUIDANCE),
        show_guidance=FLAG,
        tangent_warmup=whole(0),
        tangent_constant=POSITIVE,
        mean_norm=FLAG,
        jvp_dtype=TEXT,
        shared_primal=FLAG,
    ),
    "images": dict(max_time_probability=SHARE, rollout=whole(0, 1000), balance=FLAG, reuse=FLAG),
    "dmd": dict(
        weight=NOT_NEGATIVE, warmup=whole(0), fake_updates=COUNT, shift=POSITIVE, decoupled=FLAG
    ),
    "dmd.optimizer": OPTIMIZER,
    "twinflow": dict(
        weight=NOT_NEGATIVE, twin_weight=NOT_NEGATIVE, warmup=whole(0), shift=POSITIVE
    ),
    "trajectory": dict(
        weight=NOT_NEGATIVE, steps=whole(1, 1000), spread=number(1), power=NOT_NEGATIVE
    ),
    "meanflow": dict(
        weight=NOT_NEGATIVE,
        time_mean=number(),
        time_std=NOT_NEGATIVE,
        same_time=SHARE,
        power=NOT_NEGATIVE,
    ),
    "ladd": dict(
        weight=NOT_NEGATIVE,
        features=TEXT,
        init=PLACE,
        taps=several(whole(0, 1000)),
        loss=TEXT,
        paired=FLAG,
        pooled=FLAG,
        clean=FLAG,
        kernel=whole(1, 1000),
        updates=COUNT,
        time_mean=number(),
        time_std=NOT_NEGATIVE,
        token_norm=FLAG,
        misaligned=FLAG,
        r1=NOT_NEGATIVE,
        r2=NOT_NEGATIVE,
        penalty_noise=NOT_NEGATIVE,
    ),
    "ladd.optimizer": OPTIMIZER,
    "sampler": dict(midpoint=MIDPOINT),
    "mesh": dict.fromkeys(
        ("data", "fsdp", "tensor", "dcn_data", "dcn_fsdp", "dcn_tensor"), _DEVICES
    ),
    "log": dict(
        every=COUNT,
        sample_every=COUNT,
        exam=whole(0),
        sample_guidance=GUIDANCE,
        diagnostics_every=COUNT,
        checkpoint_every=COUNT,
        keep=COUNT,
        keep_period=whole(0),
        profile_start=whole(0),
        profile_steps=COUNT,
        profile_hosts=several(whole(0)),
    ),
}

RANGES: dict[str, Kind] = {
    f"{section}.{key}" if section else key: kind
    for section, kinds in SECTIONS.items()
    for key, kind in kinds.items()
}


def check_ranges(leaves: dict[str, Any]) -> None:
    """Refuses a value out of its range; other keys than a run's pass.

    Args:
      leaves: of a config, by their dotted names.

    Raises:
      UserError: exit code 2, naming the key, the value and the range.
    """
    check(leaves, RANGES, "config.", exit_code=2)
    for name in leaves:
        parent = name.rpartition(".")[0]
        if parent in RANGES:
            raise UserError(f"config.{parent} must be {RANGES[parent].says}, not a section", 2)
