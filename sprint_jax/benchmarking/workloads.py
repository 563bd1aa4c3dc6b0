"""The workloads of benchmarks: a network called in four ways, on inputs of random numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..core.errors import UserError
from ..losses import scm_loss
from ..models.sana import SIZES, SanaTransformer
from ..trigflow import expand

FACTOR = 32  # pixels per latent, each way
TEXT_TOKENS = 300
NETWORK = ("forward", "jvp", "backward", "scm")

# Narrow and shallow students for CPUs, beside the published ones.
STUDENTS = {
    "tiny": SIZES["600m"]
    | dict(
        num_attention_heads=8,
        num_layers=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=64,
    ),
    "mid": SIZES["600m"] | dict(num_layers=7),
    "600m": SIZES["600m"],
    "1600m": SIZES["1600m"],
}


def network_inputs(fields: dict, batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Returns random inputs of a student; float32, the mask int32.

    Args:
      fields: of SanaTransformer, with ``guidance_embeds``.
      height, width: of the picture, in pixels.

    Returns:
      'x', 'dx', 'target' [B, h, w, C], 't', 'dt', 'guidance' [B], 'text' [B, L, caption_channels] and
      'mask' [B, L], which hides the last tenth.

    Raises:
      UserError: a side is not a multiple of 32.
    """
    if height % FACTOR or width % FACTOR or min(height, width) < FACTOR:
        raise UserError(f"--image {height}x{width}: sides must be multiples of {FACTOR}", 2)
    model, random = SanaTransformer(**fields), np.random.default_rng(0)
    latent = (batch, height // FACTOR, width // FACTOR, model.in_channels)
    arrays = {name: random.normal(size=latent) for name in ("x", "dx", "target")}
    arrays |= {"t": np.linspace(0.4, 1.1, batch), "dt": np.linspace(0.5, 0.3, batch)}
    arrays["guidance"] = np.full(batch, 0.45)
    arrays["text"] = random.normal(size=(batch, TEXT_TOKENS, model.caption_channels))
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    mask = np.ones((batch, TEXT_TOKENS), np.int32)
    mask[:, -TEXT_TOKENS // 10 :] = 0
    return arrays | {"mask": mask}


def network_calls(model: SanaTransformer) -> dict[str, Callable]:
    """Returns {workload: function of (params, inputs)}, not compiled.

    'forward' is the velocity; 'jvp' the velocity and its derivative along ``dx, dt``; 'backward' the
    mean squared distance to ``target`` and its gradient; 'scm' the loss and the gradient of `scm_loss` for a
    log variance of 0 and ``dx`` as the teacher's velocity, with the network itself in TrigFlow's place.
    """

    def velocity(params, inputs, x, t):
        text, mask, guidance = (inputs[key] for key in ("text", "mask", "guidance"))
        return model.apply({"params": params}, x, t, text, mask, guidance)

    def forward(params, inputs):
        return velocity(params, inputs, inputs["x"], inputs["t"])

    def jvp(params, inputs):
        def call(x, t):
            return velocity(params, inputs, x, t)

        return jax.jvp(call, (inputs["x"], inputs["t"]), (inputs["dx"], inputs["dt"]))

    def distance(params, inputs):
        return jnp.square(forward(params, inputs) - inputs["target"]).mean()

    def consistency(params, inputs):
        def student(params, x, t):
            return velocity(params, inputs, x, t), jnp.zeros_like(t)

        x, t = inputs["x"], inputs["t"]
        # Of this data and noise, x is the noisy sample at t.
        data, noise = jnp.cos(expand(t, x)) * x, jnp.sin(expand(t, x)) * x
        return scm_loss(
            student, lambda *_: inputs["dx"], params, data, noise, t, sigma_d=1.0, warmup=1.0
        )[0]

    backward, scm = jax.value_and_grad(distance), jax.value_and_grad(consistency)
    return dict(zip(NETWORK, (forward, jvp, backward, scm), strict=True))


def random_params(model: SanaTransformer, inputs: dict) -> dict:
    """Draws parameters that are nowhere zero, as those of layers that start at zero would be."""
    arrays = (inputs[key] for key in ("x", "t", "text", "mask", "guidance"))
    keys = jax.random.split(jax.random.key(0))
    params = jax.jit(model.init)(keys[0], *arrays)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(keys[1], len(leaves))
    noise = [0.02 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.map(jnp.add, params, jax.tree.unflatten(tree, noise))
