"""Workdirs as a training leaves them, with a tiny network of random weights, for several tests."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from helpers.tiny_sana import abstract_params

from configs import default
from sprint_jax.checkpoints.checkpoint import Checkpoints

STEP = 7


def tiny_config(stage: str, world: str = "small", **model):
    """The default config with two blocks of 32 features, and fields of ``model``; as plain nested dicts."""
    c = default.get_config()
    c.stage = stage
    c.data.world = world
    c.log.sample_guidance = 3.0
    c.model.interpolation_scale = 1.0  # as in configs/digits.py
    c.model.num_layers = 2
    c.model.num_attention_heads = 1
    c.model.num_cross_attention_heads = 1
    c.model.guidance_embeds = stage == "distill"
    c.model.update(model)
    return c.to_dict()


def random_params(fields: dict, seed: int):
    """Parameters none of which is zero: fresh ones would give the velocity 0."""
    generator = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(0.2 * generator.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, abstract_params(fields))


def slow_time_params(fields: dict, seed: int):
    """Parameters that listen to the slow part of the time's sinusoid alone, as trained ones mostly do."""
    params = random_params(fields, seed)
    first = params["time_embed"]["timestep_embedder"]["linear_1"]
    first["kernel"] = first["kernel"].at[:88].set(0).at[128:216].set(0)
    return params


def trained_params(fields: dict, seed: int):
    """As a training leaves them: a student has a logvar head, which its config does not mention."""
    params = random_params(fields, seed)
    if fields["guidance_embeds"]:
        params["logvar_linear"] = random_params(fields | {"logvar": True}, seed)["logvar_linear"]
    return params


def make_workdir(folder: Path, stage: str, world: str = "small", **model) -> Path:
    """Writes config.json and a checkpoint of step 7 whose EMA and raw parameters differ."""
    folder.mkdir()
    config = tiny_config(stage, world, **model)
    (folder / "config.json").write_text(json.dumps(config))
    fields = config["model"]
    state = {"ema": trained_params(fields, 1), "params": trained_params(fields, 2)}
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(STEP, state, {"stage": stage})
    return folder
