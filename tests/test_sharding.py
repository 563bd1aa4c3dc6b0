"""Where arrays lie: the mesh, the one rule for state, and the rows of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from sana_derivation import abstract_params

from sprint_jax.errors import UserError
from sprint_jax.models.sana import SIZES
from sprint_jax.training import sharding
from sprint_jax.training.optim import make_optimizer

DIGITS = SIZES["digits"] | dict(guidance_embeds=True, logvar=True)


@pytest.mark.parametrize(
    ("data", "fsdp", "expected"),
    [
        (8, 1, (8, 1)),
        (2, 4, (2, 4)),
        (-1, 1, (8, 1)),
        (1, -1, (1, 8)),
        (-1, 4, (2, 4)),
        (4, -1, (4, 2)),
    ],
)
def test_mesh_sizes(data, fsdp, expected):
    mesh = sharding.make_mesh(data, fsdp)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == expected
    # Linen's Dense raises under Explicit axes, JAX's default.
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]


def test_mesh_over_some_devices():
    mesh = sharding.make_mesh(1, -1, devices=jax.devices()[2:4])
    assert [d.id for d in mesh.devices.flat] == [2, 3]


@pytest.mark.parametrize(
    ("data", "fsdp"),
    [(4, 1), (3, -1), (-1, -1), (0, -1), (0, 8), (16, 1), (-2, -4), (-1, 16), (-1, 0), (-8, -1)],
)
def test_wrong_mesh(data, fsdp):
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(data, fsdp)
    message = str(caught.value)
    assert message == (f"mesh data={data} x fsdp={fsdp} does not cover 8 devices; use -1 for one")


def specs(tree, fsdp=4):
    mesh = sharding.make_mesh(-1, fsdp)
    found = sharding.state_shardings(mesh, tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }


def test_kernels_are_split_and_the_rest_is_replicated():
    params = abstract_params(DIGITS)
    found = specs(params)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert found.keys() == leaves.keys()
    split = [name for name in found if name.endswith("/kernel")]
    assert len(split) > 20
    for name, spec in found.items():
        if name not in split:
            assert spec == PartitionSpec(), name  # norms, biases, modulation tables
            continue
        axis = spec.index("fsdp")
        shape = leaves[name].shape
        assert [part for part in spec if part] == ["fsdp"], name
        assert axis >= len(shape) - 2, name  # never the layers' axis, nor a kernel's window
        assert shape[axis] % 4 == 0, name
        other = 2 * len(shape) - 3 - axis
        assert shape[axis] >= shape[other] or shape[other] % 4, name


def shape(*sizes):
    return {"kernel": jax.ShapeDtypeStruct(sizes, jnp.float32)}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 12), (None, "fsdp")),
        ((12, 8), ("fsdp", None)),
        ((6, 8, 8), (None, None, "fsdp")),
        ((8, 10), ("fsdp", None)),  # 4 does not divide the larger
        ((8, 3, 3, 20), (None, None, None, "fsdp")),
        ((9, 12, 1), (None, "fsdp", None)),
        ((6, 10), ()),
        ((8,), ()),
        ((8, 3, 3), ()),
    ],
)
def test_the_rule(sizes, expected):
    assert specs(shape(*sizes)) == {"kernel": PartitionSpec(*expected)}
    assert specs(shape(*sizes), fsdp=1) == {"kernel": PartitionSpec()}


def test_only_the_name_kernel_is_split():
    leaf = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    tree = {"scale_shift_table": leaf, "weight": leaf, "kernel": {"row": leaf}, "step": leaf}
    assert set(specs(tree).values()) == {PartitionSpec()}
    assert specs(jax.ShapeDtypeStruct((), jnp.int32)) == {"": PartitionSpec()}
    assert specs(None) == {}


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_optimizer_state_lies_like_the_params(name):
    params = abstract_params(DIGITS)
    optimizer = make_optimizer(name, 1e-3, warmup_steps=1, clip_norm=1.0)
    found = specs(jax.eval_shape(optimizer.init, params))
    expected = specs(params)
    trees = ("mu", "nu") if name == "adamw" else ("momentum",)
    matched = set()
    for tree in trees:
        for path, spec in found.items():
            _, separator, tail = path.partition(f"{tree}/")
            if separator:
                assert spec == expected[tail], path
                matched.add(path)
    assert len(matched) == len(trees) * len(expected)
    # Factored moments and counters.
    assert {spec for path, spec in found.items() if path not in matched} == {PartitionSpec()}


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
    shards = placed["dense"]["kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(4, 8)}
    assert {shard.data.shape for shard in placed["dense"]["bias"].addressable_shards} == {(8,)}
    expected, actual = gradient(params, batch), gradient(placed, sharding.to_devices(mesh, batch))
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_batches_are_split_over_all_devices(fsdp):
    mesh = sharding.make_mesh(-1, fsdp)
    rows = {
        "latents": np.arange(16 * 6, dtype=np.float32).reshape(16, 2, 3),
        "mask": np.arange(16, dtype=np.int32)[:, None],
    }
    batch = sharding.to_devices(mesh, rows)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, rows[name])
        assert array.dtype == rows[name].dtype
        assert array.sharding == sharding.batch_sharding(mesh)
        starts = sorted(shard.index[0].start or 0 for shard in array.addressable_shards)
        assert starts == list(range(0, 16, 2))


def test_replicated_is_whole_everywhere():
    array = jax.device_put(jnp.arange(5), sharding.replicated(sharding.make_mesh(2, 4)))
    assert [shard.data.shape for shard in array.addressable_shards] == [(5,)] * 8
