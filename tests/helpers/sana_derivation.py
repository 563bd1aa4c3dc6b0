"""A float64 derivation of SanaTransformer's forward pass in numpy, and what tests of it share.

The derivation is written from the published layout (1x1 convolutions as matrices, explicit loops
over patches, heads and taps), not from the layers under test.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.models.sana import SanaTransformer, from_fields

# Tests compile more than they compute; this halves the time of a compilation.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

STUDENT = dict(
    in_channels=3,
    out_channels=5,
    num_attention_heads=3,
    attention_head_dim=8,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    caption_channels=10,
    qk_norm=True,
    guidance_embeds=True,
    timestep_scale=0.001,
    logvar=True,
)
PATCHED = STUDENT | dict(
    patch_size=2,
    interpolation_scale=2.0,
    sample_size=8,
    attention_bias=True,
    qk_norm=False,
    guidance_embeds=False,
    timestep_scale=1.0,
    logvar=False,
)
CASES = {"student": (STUDENT, (3, 5)), "patched": (PATCHED, (4, 6))}


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
def setup(case):
    fields, size = CASES[case]
    inputs = draw_inputs(fields, size)
    return fields, draw_params(SanaTransformer(**fields), inputs), inputs


def abstract_params(fields):
    model = from_fields(fields)
    shapes = (1, 2, 2, model.in_channels), (1,), (1, 3, model.caption_channels), (1, 3)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if model.guidance_embeds:
        arguments.append(jax.ShapeDtypeStruct((1,), jnp.float32))
    return jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]


def apply(fields, params, inputs, **options):
    model = SanaTransformer(**fields)
    run = fast_jit(functools.partial(model.apply, **options))
    return np.asarray(run({"params": cast(params, jnp.float32)}, *cast(inputs, jnp.float32)))


def equations(jaxpr):
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


# --- The independent derivation


def silu(x):
    return x / (1 + np.exp(-x))


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def scalar_embedding(p, s):
    frequencies = np.array([math.exp(-math.log(10000) * i / 128) for i in range(128)])
    angles = np.outer(s, frequencies)
    embedding = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    return dense(p["linear_2"], silu(dense(p["linear_1"], embedding)))


def rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def normalized(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def linear_attention(p, x, heads):
    q, k, v = (dense(p[name], x) for name in ("to_q", "to_k", "to_v"))
    if "norm_q" in p:
        q, k = rms(q, p["norm_q"]["weight"]), rms(k, p["norm_k"]["weight"])
    q, k = np.maximum(q, 0), np.maximum(k, 0)
    out, c = np.zeros_like(v), x.shape[-1] // heads
    for b in range(len(x)):
        for h in range(heads):
            part = slice(h * c, (h + 1) * c)
            ones = np.ones((1, x.shape[1]))
            state = np.concatenate([v[b, :, part].T, ones]) @ k[b, :, part]  # (c + 1) x c
            o = state @ q[b, :, part].T
            out[b, :, part] = (o[:c] / (o[c] + 1e-15)).T
    return dense(p["to_out_0"], out)


def cross_attention(p, x, text, mask, heads):
    q, k, v = dense(p["to_q"], x), dense(p["to_k"], text), dense(p["to_v"], text)
    if "norm_q" in p:
        q, k = rms(q, p["norm_q"]["weight"]), rms(k, p["norm_k"]["weight"])
    out, c = np.zeros_like(q), x.shape[-1] // heads
    for b in range(len(x)):
        for h in range(heads):
            part = slice(h * c, (h + 1) * c)
            scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(c) + (1 - mask[b]) * -10000
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[b, :, part] = weights @ v[b, :, part]
    return dense(p["to_out_0"], out)


def gated_convolution(p, x, height, width):
    x = silu(dense(p["conv_inverted"], x)).reshape(len(x), height, width, -1)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros_like(x) + p["conv_depth"]["bias"]
    for i in range(3):
        for j in range(3):
            tap = p["conv_depth"]["kernel"][i, j]
            y += padded[:, i : i + height, j : j + width] * tap
    y = y.reshape(len(x), height * width, -1)
    hidden = y.shape[-1] // 2
    return (y[..., :hidden] * silu(y[..., hidden:])) @ p["conv_point"]["kernel"]


def positions(height, width, d, base, interpolation):
    table = np.zeros((height * width, d))
    for row in range(height):
        for column in range(width):
            for part, (index, count) in enumerate([(column, width), (row, height)]):
                position = index * base / count / interpolation
                for i in range(d // 4):
                    angle = position / 10000 ** (i / (d // 4))
                    table[row * width + column, part * d // 2 + i] = math.sin(angle)
                    table[row * width + column, part * d // 2 + d // 4 + i] = math.cos(angle)
    return table.astype(np.float32)  # a float32 buffer, whatever the model computes in


def derive(fields, params, x, t, text, mask, guidance):
    """(velocity, logvar or None, outputs of all blocks [B, h, w, d])."""
    p = fields.get("patch_size", 1)
    height, width, d = x.shape[1] // p, x.shape[2] // p, fields["num_attention_heads"] * 8
    tokens = np.zeros((len(x), height * width, d))
    for i in range(height):
        for j in range(width):
            patch = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(len(x), -1)
            tokens[:, i * width + j] = dense(params["patch_embed"]["proj"], patch)
    if fields.get("interpolation_scale"):
        base = fields["sample_size"] // p
        tokens += positions(height, width, d, base, fields["interpolation_scale"])
    time = params["time_embed"]
    e = scalar_embedding(time["timestep_embedder"], 1000 * fields["timestep_scale"] * t)
    if guidance is not None:
        e = e + scalar_embedding(time["guidance_embedder"], guidance)
    t6 = dense(time["linear"], silu(e)).reshape(len(x), 6, d)
    projection = params["caption_projection"]
    hidden = dense(projection["linear_1"], text)
    cubic = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    hidden = dense(projection["linear_2"], 0.5 * hidden * (1 + np.tanh(cubic)))
    text = rms(hidden, params["caption_norm"]["weight"])
    outputs = []
    for n in range(fields["num_layers"]):
        block = jax.tree.map(lambda leaf, n=n: leaf[n], params["transformer_blocks"])
        rows = (block["scale_shift_table"] + t6)[:, :, None]
        attended = normalized(tokens) * (1 + rows[:, 1]) + rows[:, 0]
        attended = linear_attention(block["attn1"], attended, fields["num_attention_heads"])
        tokens = tokens + rows[:, 2] * attended
        heads = fields["num_cross_attention_heads"]
        tokens = tokens + cross_attention(block["attn2"], tokens, text, mask, heads)
        mixed = normalized(tokens) * (1 + rows[:, 4]) + rows[:, 3]
        tokens = tokens + rows[:, 5] * gated_convolution(block["ff"], mixed, height, width)
        outputs.append(tokens.reshape(len(x), height, width, d))
    rows = (params["scale_shift_table"] + e[:, None])[:, :, None]
    out = dense(params["proj_out"], normalized(tokens) * (1 + rows[:, 1]) + rows[:, 0])
    velocity = np.zeros((len(x), height * p, width * p, fields["out_channels"]))
    for i in range(height):
        for j in range(width):
            patch = out[:, i * width + j].reshape(len(x), p, p, -1)
            velocity[:, i * p : (i + 1) * p, j * p : (j + 1) * p] = patch
    logvar = dense(params["logvar_linear"], e)[:, 0] if fields["logvar"] else None
    return velocity, logvar, outputs


def assert_close(actual, expected, tolerance):
    """Largest error relative to the largest entry, leaf by leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()
