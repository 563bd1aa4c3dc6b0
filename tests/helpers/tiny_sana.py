"""A SanaTransformer of three small blocks with random parameters and inputs, for several tests."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.interop.sana import example_inputs
from sprint_jax.models.sana import SanaTransformer, from_fields

# Tests compile more than they compute; this halves the time of a compilation.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

STUDENT = dict(in_channels=3, out_channels=5, caption_channels=10, num_layers=3)
STUDENT |= dict(num_attention_heads=3, attention_head_dim=8)
STUDENT |= dict(num_cross_attention_heads=2, cross_attention_head_dim=12)
STUDENT |= dict(qk_norm=True, guidance_embeds=True, timestep_scale=0.001, logvar=True)


def draw_params(model, inputs, seed=0):
    """Float64 params far from 0 and 1: kernels keep the scale of activations, the rest is O(1)."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key != "kernel":
            return random.uniform(0.4, 1.6, leaf.shape) * random.choice([-1, 1], leaf.shape)
        fan_in = 9 if "conv_depth" in jax.tree_util.keystr(path) else leaf.shape[-2]
        return random.standard_normal(leaf.shape) / math.sqrt(fan_in)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def draw_inputs(fields, size, batch=2, length=4, seed=1):
    random = np.random.default_rng(seed)
    x = random.standard_normal((batch, *size, fields["in_channels"]))
    text = random.standard_normal((batch, length, fields["caption_channels"]))
    t = random.uniform(0.1, 0.9, batch)
    mask = (np.arange(length) < np.array([length, length - 2])[:, None]).astype(np.int32)
    guidance = random.uniform(0.4, 0.5, batch) if fields["guidance_embeds"] else None
    return x, t, text, mask, guidance


def cast(tree, dtype):
    def one(a):
        return jnp.asarray(a, dtype) if a.dtype == np.float64 else jnp.asarray(a)

    return jax.tree.map(one, tree)


@functools.cache
def setup(size=(3, 5)):
    """Fields, parameters and inputs of a student, float64."""
    inputs = draw_inputs(STUDENT, size)
    return STUDENT, draw_params(SanaTransformer(**STUDENT), inputs), inputs


def abstract_params(fields):
    model = from_fields(fields)
    return jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model))["params"]


def apply(fields, params, inputs, **options):
    model = SanaTransformer(**fields)
    run = fast_jit(functools.partial(model.apply, **options))
    return np.asarray(run({"params": cast(params, jnp.float32)}, *cast(inputs, jnp.float32)))
