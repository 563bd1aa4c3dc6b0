"""The Inception-v3 of the Frechet Inception distance, with all of its pools.

It is TensorFlow's network of December 2015, as pytorch-fid and torch-fidelity keep it in torch: the names are
torchvision's; the average pools of blocks A, C and the first E do not count padding; the last block has a
maximum pool in the place of an average; there are 1008 classes. Source: mseitzer/pytorch-fid, Szegedy et al.,
arXiv 1512.00567.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..core.errors import UserError
from ..interop.files import Tensors, load_params, open_safetensors, open_torch
from ..interop.tables import CONV, LINEAR, SAME, Entry, make_table

Array = jax.Array
SIDE = 299  # pixels
POOLS = ("64", "192", "768", "2048")  # by their channels, as torch-fidelity names them
# Counters of training, and the auxiliary head of torchvision's network, which no feature comes from.
UNUSED = r"(.*\.num_batches_tracked|AuxLogits\..*)"


class Conv(nn.Module):
    """A convolution without bias, batch norm by stored statistics, and ReLU; torchvision's BasicConv2d."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    pad: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        strides, padding = (self.stride, self.stride), tuple((n, n) for n in self.pad)
        how = dict(strides=strides, padding=padding, use_bias=False, name="conv")
        x = nn.Conv(self.features, self.kernel, **how)(x)
        return nn.relu(BatchNorm(name="bn")(x))


class BatchNorm(nn.Module):
    """The normalization by stored means and variances, which are parameters like the others."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        zeros, ones, shape = nn.initializers.zeros, nn.initializers.ones, x.shape[-1:]
        scale, bias = self.param("weight", ones, shape), self.param("bias", zeros, shape)
        mean, var = (
            self.param("running_mean", zeros, shape),
            self.param("running_var", ones, shape),
        )
        factor = scale * jax.lax.rsqrt(var + 1e-3)
        return x * factor[None, None, None] + (bias - mean * factor)[None, None, None]


class Mixed(nn.Module):
    """A block: branches side by side, each a chain of convolutions, their results joined along channels.

    Attributes:
      branches: rows of `Conv` arguments with their names; a row of rows at the end of a branch forks, and its
        results are joined.
      pool: 'average' or 'maximum', of 3x3, before the last branch, or as it (with stride 2) if it is empty.
    """

    branches: tuple
    pool: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pooled = _average(x) if self.pool == "average" else nn.max_pool(x, (3, 3), **_ONE)
        parts = []
        for number, branch in enumerate(self.branches):
            last = number == len(self.branches) - 1
            if last and not branch:
                parts.append(nn.max_pool(x, (3, 3), (2, 2)))
                continue
            y = pooled if last else x
            for step in branch:
                if isinstance(step[0], str):
                    y = Conv(*step[1:], name=step[0])(y)
                else:
                    parts += [Conv(*fork[1:], name=fork[0])(y) for fork in step]
                    y = None
            parts += [] if y is None else [y]
        return jnp.concatenate(parts, axis=-1)


_ONE = dict(strides=(1, 1), padding=((1, 1), (1, 1)))


def _average(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), **_ONE, count_include_pad=False)


def _a(pool: int) -> tuple[tuple, str]:
    three = (3, 3), 1, (1, 1)
    branches = (
        (("branch1x1", 64),),
        (("branch5x5_1", 48), ("branch5x5_2", 64, (5, 5), 1, (2, 2))),
        (("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, *three), ("branch3x3dbl_3", 96, *three)),
        (("branch_pool", pool),),
    )
    return branches, "average"


def _b() -> tuple[tuple, str]:
    double = (("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, (3, 3), 1, (1, 1)))
    branches = (
        (("branch3x3", 384, (3, 3), 2),),
        (*double, ("branch3x3dbl_3", 96, (3, 3), 2)),
        (),
    )
    return branches, "maximum"


_WIDE, _TALL = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))


def _c(width: int) -> tuple[tuple, str]:
    branches = (
        (("branch1x1", 192),),
        (
            ("branch7x7_1", width),
            ("branch7x7_2", width, *_WIDE),
            ("branch7x7_3", 192, *_TALL),
        ),
        (
            ("branch7x7dbl_1", width),
            ("branch7x7dbl_2", width, *_TALL),
            ("branch7x7dbl_3", width, *_WIDE),
            ("branch7x7dbl_4", width, *_TALL),
            ("branch7x7dbl_5", 192, *_WIDE),
        ),
        (("branch_pool", 192),),
    )
    return branches, "average"


def _d() -> tuple[tuple, str]:
    branches = (
        (("branch3x3_1", 192), ("branch3x3_2", 320, (3, 3), 2)),
        (
            ("branch7x7x3_1", 192),
            ("branch7x7x3_2", 192, *_WIDE),
            ("branch7x7x3_3", 192, *_TALL),
            ("branch7x7x3_4", 192, (3, 3), 2),
        ),
        (),
    )
    return branches, "maximum"


def _e(pool: str) -> tuple[tuple, str]:
    def fork(name, first, second):
        wide, tall = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        return ((f"{name}_{first}", 384, *wide), (f"{name}_{second}", 384, *tall))

    branches = (
        (("branch1x1", 320),),
        (("branch3x3_1", 384), fork("branch3x3", "2a", "2b")),
        (
            ("branch3x3dbl_1", 448),
            ("branch3x3dbl_2", 384, (3, 3), 1, (1, 1)),
            fork("branch3x3dbl", "3a", "3b"),
        ),
        (("branch_pool", 192),),
    )
    return branches, pool


class Inception(nn.Module):
    """The network: pictures [B, 299, 299, 3] in [-1, 1] to a dict of features [B, n].

    Keys: `POOLS`, averages over the picture; 'logits_unbiased' [B, classes], without the last bias, of which
    the Inception score is made; and 'logits'. What is not used of the dict is not computed under `jax.jit`.
    """

    classes: int = 1008

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        found = {}
        x = Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = Conv(64, (3, 3), 1, (1, 1), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        found["64"] = x.mean((1, 2))
        x = Conv(80, name="Conv2d_3b_1x1")(x)
        x = Conv(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        found["192"] = x.mean((1, 2))
        blocks = (("5b", _a(32)), ("5c", _a(64)), ("5d", _a(64)), ("6a", _b()))
        blocks += (("6b", _c(128)), ("6c", _c(160)), ("6d", _c(160)), ("6e", _c(192)))
        for name, block in blocks:
            x = Mixed(*block, name=f"Mixed_{name}")(x)
        found["768"] = x.mean((1, 2))
        for name, block in (("7a", _d()), ("7b", _e("average")), ("7c", _e("maximum"))):
            x = Mixed(*block, name=f"Mixed_{name}")(x)
        found["2048"] = x.mean((1, 2))
        kernel = self.param("fc_weight", nn.initializers.lecun_normal(), (2048, self.classes))
        bias = self.param("fc_bias", nn.initializers.zeros, (self.classes,))
        found["logits_unbiased"] = found["2048"] @ kernel
        found["logits"] = found["logits_unbiased"] + bias[None]
        return found


def inception_table(classes: int = 1008) -> dict[str, Entry]:
    """Returns the table from pytorch-fid's names, which are torchvision's, to our parameters."""
    shapes = jax.eval_shape(
        Inception(classes).init, jax.random.key(0), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), "f4")
    )
    return make_table(
        shapes["params"],
        lambda path: ".".join(path).replace("kernel", "weight").replace("fc_", "fc."),
        lambda path, _: {"kernel": CONV, "fc_weight": LINEAR}.get(path[-1], SAME),
    )


def load_inception(path: str | Path, shardings: Any = None) -> tuple[Inception, Any]:
    """Loads the network and its float32 parameters.

    Args:
      path: ``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid, the same of torch-fidelity, or either as
        safetensors.
      shardings: see `interop.files.load_params`.

    Raises:
      UserError: the file is missing or damaged, or holds another network.
    """
    tensors = open_weights(Path(path), UNUSED)
    classes = tensors.shapes.get("fc.weight", (1008,))[0]
    return Inception(classes), load_params(inception_table(classes), tensors, "float32", shardings)


def open_weights(path: Path, ignore: str) -> Tensors:
    """Opens a file of weights, ``.pth``, ``.pt``, ``.bin`` or ``.safetensors``, or a folder that holds one.

    Raises:
      UserError: it is missing, damaged, or of another ending.
    """
    if path.suffix in (".pth", ".pt", ".bin"):
        return open_torch(path, ignore=ignore)
    if path.suffix == ".safetensors" or path.is_dir():
        return open_safetensors(path, ignore=ignore)
    raise UserError(f"{path}: weights are a .safetensors, .pth, .pt or .bin file, or a folder")
