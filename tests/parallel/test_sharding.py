"""Places of arrays: the mesh, the one rule for state, and the rows of a batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import ROOT
from helpers.tiny_sana import abstract_params
from jax.sharding import AxisType, PartitionSpec

from sprint_jax.core.config import load_config
from sprint_jax.core.errors import UserError
from sprint_jax.core.fingerprint import leaf_name
from sprint_jax.models.sana import SIZES
from sprint_jax.parallel import sharding
from sprint_jax.training import setup
from sprint_jax.training.optim import make_optimizer


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((), (8, 1, 1)),
        ((2, 4), (2, 4, 1)),
        ((1, -1), (1, 8, 1)),
        ((4, -1), (4, 2, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 2, 4), (1, 2, 4)),
    ],
)
def test_mesh_sizes(sizes, expected):
    mesh = sharding.make_mesh(*sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == expected
    # Linen's Dense raises under Explicit axes, JAX's default.
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]


class Chip:
    """One of eight devices in two slices, as a multi-slice runtime describes it."""

    platform = device_kind = "test"

    def __init__(self, number):
        self.id = number
        self.slice_index = self.process_index = number // 4


CHIPS = [Chip(number) for number in range(8)]


@pytest.mark.parametrize(
    ("sizes", "shape", "within"),
    [
        (dict(data=1, fsdp=-1), (2, 4, 1), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (dict(data=2, fsdp=2, dcn_data=1, dcn_fsdp=2), (2, 4, 1), [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (dict(data=1, tensor=4, dcn_data=-1), (2, 1, 4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_slices_are_joined_along_the_axes_that_say_so(sizes, shape, within):
    """Neighbours of one slice lie together, the DCN part of an axis outside."""
    mesh = sharding.make_mesh(**sizes, devices=CHIPS)
    assert mesh.devices.shape == shape
    assert [[chip.id for chip in row.flat] for row in mesh.devices] == within


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        (dict(data=4, fsdp=1), "data=4 x fsdp=1 x tensor=1 .* 8 devices: .*data=-1"),
        (dict(data=3, fsdp=-1), "data=3 x fsdp=-1 x tensor=1 .* 8 devices: data "),
        (dict(data=2, fsdp=3, tensor=-1), " 8 devices: fsdp "),
        (dict(data=2, fsdp=2, tensor=3), " 8 devices: tensor "),
        (dict(data=-1, fsdp=-1), "data and fsdp"),
        (dict(data=-2, fsdp=-4), ": data "),
        (dict(data=-1, fsdp=0), ": fsdp "),
        (dict(data=1, fsdp=-1, dcn_fsdp=3), "dcn_fsdp=3 .* 2 slices: dcn_fsdp"),
    ],
)
def test_wrong_mesh(sizes, named):
    with pytest.raises(UserError, match=named) as caught:
        sharding.make_mesh(**sizes, devices=CHIPS if "dcn_fsdp" in sizes else None)
    assert caught.value.exit_code == 2


def named_leaves(tree):
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def specs(tree, fsdp=4, tensor=1):
    found = sharding.state_shardings(sharding.make_mesh(-1, fsdp, tensor), tree)
    return {name: leaf.spec for name, leaf in named_leaves(found).items()}


def share(tree):
    """The part of a tree's numbers that one device holds."""
    leaves = jax.tree.leaves(tree)
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return held / sum(np.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize("fsdp, tensor", [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("size", ["600m", "1600m", "digits"])
def test_a_device_holds_its_share_of_the_params(size, fsdp, tensor):
    params = abstract_params(SIZES[size] | dict(guidance_embeds=True, logvar=True))
    mesh = sharding.make_mesh(-1, fsdp, tensor)
    placed = sharding.place_shapes(params, sharding.state_shardings(mesh, params))
    # A half of a percent is left to vectors that 8 does not divide, and those that tensor leaves alone.
    assert share(placed) < (0.13 if fsdp == 8 else 1.05 / fsdp)
    for name, spec in specs(params, fsdp, tensor).items():
        assert "transformer_blocks" not in name or not spec or spec[0] is None  # the layers' axis


@pytest.mark.parametrize("optimizer", ["came", "adamw"])
@pytest.mark.parametrize("size", ["600m", "1600m"])
def test_every_part_of_a_state_is_split(size, optimizer):
    """Params, average, both optimizers and heads: 0.13 of the bytes per device."""
    changes = {"data.batch_size": 8, "optimizer.name": optimizer}
    c = load_config(str(ROOT / f"configs/sprint.py:{size}"), changes)
    _, state, _, frozen = setup.abstract_run(c, sharding.make_mesh(1, 8))
    names = ("params", "ema", "opt_state", "disc", "disc_opt_state")
    for name, tree in [(name, getattr(state, name)) for name in names] + [("teacher", frozen)]:
        assert share(tree["teacher"] if tree is frozen else tree) <= 0.13, name


@pytest.mark.parametrize(
    ("layer", "sizes", "fsdp", "tensor", "expected"),
    [
        ("x", (8, 12), 4, 1, (None, "fsdp")),
        ("x", (12, 8), 4, 1, ("fsdp", None)),
        ("x", (8, 10), 4, 1, ("fsdp", None)),  # 4 does not divide the larger
        ("x", (8, 3, 3, 20), 4, 1, (None, None, None, "fsdp")),
        ("x", (9, 12, 1), 4, 1, (None, "fsdp", None)),
        ("x", (6, 10), 4, 1, ()),
        ("x", (8,), 4, 1, ()),  # too few to be worth it
        ("x", (16,), 4, 1, ("fsdp",)),
        ("x", (16,), 1, 1, ()),
        ("transformer_blocks", (8, 16), 4, 1, (None, "fsdp")),
        ("to_q", (8, 8), 2, 2, ("fsdp", "tensor")),
        ("to_out_0", (8, 8), 2, 2, ("tensor", "fsdp")),
        ("conv_point", (12, 8), 2, 2, ("tensor", "fsdp")),
        # [values | gates]: not where work is split
        ("conv_inverted", (8, 16), 2, 2, ("tensor", "fsdp")),
        ("linear_1", (8, 16), 2, 2, ("tensor", "fsdp")),
        ("to_q", (8, 9), 2, 2, ("fsdp", None)),
    ],
)
def test_the_rule(layer, sizes, fsdp, tensor, expected):
    tree = {layer: {"kernel": jax.ShapeDtypeStruct(sizes, jnp.float32)}}
    assert specs(tree, fsdp, tensor) == {f"{layer}/kernel": PartitionSpec(*expected)}


@pytest.mark.parametrize(("name", "trees"), [("adamw", ("mu", "nu")), ("came", ("momentum",))])
def test_optimizer_state_lies_like_the_params(name, trees):
    params = abstract_params(SIZES["digits"] | dict(guidance_embeds=True, logvar=True))
    optimizer = make_optimizer(name, 1e-3, warmup_steps=1, clip_norm=1.0)
    found, expected = specs(jax.eval_shape(optimizer.init, params)), specs(params)
    for tree in trees:
        parts = {path.partition(f"{tree}/")[2]: spec for path, spec in found.items()}
        assert {path: parts[path] for path in expected} == expected


def test_sharded_arrays_compute_the_same():
    mesh = sharding.make_mesh(2, 4)
    random = np.random.default_rng(0)
    draw = lambda *s: np.asarray(random.standard_normal(s), np.float32)  # noqa: E731
    params = {"dense": {"kernel": draw(16, 8), "bias": draw(8)}, "out": {"kernel": draw(8, 3)}}
    batch = {"x": draw(16, 16)}

    @jax.jit
    def gradient(params, batch):
        def loss(p):
            hidden = jnp.tanh(batch["x"] @ p["dense"]["kernel"] + p["dense"]["bias"][None])
            return jnp.square(hidden @ p["out"]["kernel"]).mean()

        return jax.grad(loss)(params)

    placed = jax.device_put(params, sharding.state_shardings(mesh, params))
    shards = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, placed)
    assert shards == {"dense": {"kernel": (4, 8), "bias": (8,)}, "out": {"kernel": (2, 3)}}
    split = gradient(placed, sharding.to_devices(mesh, batch))
    chex.assert_trees_all_close(split, gradient(params, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_batches_are_split_over_all_devices(fsdp):
    mesh = sharding.make_mesh(-1, fsdp)
    rows = {
        "latents": np.arange(16 * 6, dtype=np.float32).reshape(16, 2, 3),
        "mask": np.arange(16, dtype=np.int32)[:, None],
    }
    batch = sharding.to_devices(mesh, rows)
    chex.assert_trees_all_equal(batch, rows, strict=True)
    for array in batch.values():
        assert array.sharding == sharding.batch_sharding(mesh)
        starts = sorted(shard.index[0].start or 0 for shard in array.addressable_shards)
        assert starts == list(range(0, 16, 2))
