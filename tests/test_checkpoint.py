"""Checkpoints: bit-equal resume, damage of every kind, other meshes, partial loads, hashes."""

import hashlib
import json
import logging
import resource
import shutil
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sprint_jax.errors import UserError
from sprint_jax.training.checkpoint import Checkpoints, load_params
from sprint_jax.training.fingerprint import fingerprint, leaf_table

META = {"stage": "distill", "model": {"width": 16, "heads": [1, 2]}, "optimizer": "came"}


@flax.struct.dataclass
class State:
    """As the train state: nested dicts, an optax state, absent parts, several dtypes."""

    step: Any
    params: Any
    ema: Any
    opt_state: Any
    disc: Any = None


def random_bits(seed, shape):
    """float32 of random bits (NaN and infinities among them): incompressible, so stored as is."""
    words = np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)
    return jnp.asarray(words.view(np.float32))


def make_state(seed=0):
    params = {
        "transformer_blocks": {"kernel": random_bits(seed, (2, 16, 24))},
        "out": {"kernel": random_bits(seed + 1, (16, 8)).astype(jnp.bfloat16)},
        "flag": jnp.array([True, False]),
    }
    ema = {**params, "transformer_blocks": {"kernel": random_bits(seed + 2, (2, 16, 24))}}
    floats = {"kernel": random_bits(seed + 3, (32, 16))}
    opt_state = optax.adamw(1e-3).init(floats)
    opt_state = jax.tree.map(
        lambda x: random_bits(seed + 4, x.shape) if x.ndim else x + seed, opt_state
    )
    return State(jnp.int32(seed), params, ema, opt_state)


def bits(tree):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert bits(got) == bits(want)


def save_steps(folder, steps, keep=3):
    """One checkpoint per step; returns {step: state}."""
    states = {step: make_state(step) for step in steps}
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step, state in states.items():
            assert checkpoints.save(step, state, META)
    return states


def data_file(checkpoint: Path, content) -> tuple[Path, int]:
    """The file of a checkpoint that holds the bytes of an array, and where."""
    content = np.asarray(content).tobytes()
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and (at := path.read_bytes().find(content)) >= 0:
            return path, at
    raise AssertionError("the array is not stored as is")


def flip_bit(path: Path, at: int, bit: int = 2):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def mesh(*sizes):
    return jax.make_mesh(
        sizes, ("data", "fsdp")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 10 and 20, and the states; copy it, do not change it."""
    workdir = tmp_path_factory.mktemp("saved")
    return workdir, save_steps(workdir / "checkpoints", (10, 20))


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run", saved[1]


def restore(workdir, expect=META, abstract=None):
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        return checkpoints.restore_latest(abstract or make_state(), expect)


def test_no_checkpoint_is_none(tmp_path):
    assert restore(tmp_path) is None


def test_round_trip_is_bit_equal(saved):
    workdir, states = saved
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state())
    state, meta = restore(workdir, abstract=abstract)
    assert isinstance(state, State)
    assert_same(state, states[20])
    assert meta == {**META, "step": 20}
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_restore_at_once_after_async_save_and_donation(tmp_path):
    """The arrays are overwritten by a donated update as soon as save has returned."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 1, tree), donate_argnums=0)
    state = {"params": {"kernel": jnp.arange(2.0**20).reshape(1024, 1024)}}
    want = bits(state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        state = step(state)
        restored, _ = checkpoints.restore_latest(state)
    assert bits(restored) == want
    assert bits(state) != want


def test_keep_every_force_and_repeats(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, keep=2, every=10) as checkpoints:
        done = [checkpoints.save(step, state, META) for step in (5, 10, 20, 20, 30)]
        assert done == [False, True, True, False, True]
        assert checkpoints.save(33, state, META, force=True)
        assert not checkpoints.save(33, state, META, force=True)
        checkpoints.wait()
        assert checkpoints.steps() == [30, 33]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["30", "33"]


@pytest.mark.parametrize("arguments", [{"keep": 0}, {"keep": 1, "every": 0}])
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(tmp_path, **arguments)


def test_leftover_of_a_killed_save_is_ignored_and_removed(copied):
    workdir, states = copied
    folder = workdir / "checkpoints"
    torn = folder / "30.orbax-checkpoint-tmp"
    shutil.copytree(folder / "20", torn)
    with Checkpoints(folder, keep=3) as checkpoints:
        state, _ = checkpoints.restore_latest(make_state(), META)
        assert_same(state, states[20])
        assert checkpoints.save(30, states[10], META)
    assert not torn.exists()


def damage_bit(checkpoint, state):
    flip_bit(*data_file(checkpoint, state.ema["transformer_blocks"]["kernel"]))


def damage_sign_bits(checkpoint, state):
    """Two sign bits: they would cancel in any sum of words times odd weights."""
    path, at = data_file(checkpoint, state.opt_state[0].mu["kernel"])
    flip_bit(path, at + 3, 7)
    flip_bit(path, at + 7, 7)


def damage_swap(checkpoint, state):
    """Two neighbouring words change places."""
    path, at = data_file(checkpoint, state.params["transformer_blocks"]["kernel"])
    content = path.read_bytes()
    path.write_bytes(
        content[:at] + content[at + 4 : at + 8] + content[at : at + 4] + content[at + 8 :]
    )


def damage_truncate(checkpoint, state):
    path, at = data_file(checkpoint, state.ema["transformer_blocks"]["kernel"])
    path.write_bytes(path.read_bytes()[: at + 100])


def damage_missing_data(checkpoint, state):
    data_file(checkpoint, state.ema["transformer_blocks"]["kernel"])[0].unlink()


def damage_missing_index(checkpoint, state):
    (checkpoint / "state" / "manifest.ocdbt").unlink()


def damage_missing_state(checkpoint, state):
    shutil.rmtree(checkpoint / "state")


def damage_tree_metadata(checkpoint, state):
    path = checkpoint / "state" / "_METADATA"
    path.write_bytes(path.read_bytes()[:100])


def damage_missing_meta(checkpoint, state):
    shutil.rmtree(checkpoint / "meta")


def damage_truncated_meta(checkpoint, state):
    path = checkpoint / "meta" / "metadata"
    path.write_bytes(path.read_bytes()[:-20])


def damage_altered_meta(checkpoint, state):
    """Still JSON, and still a possible value."""
    path = checkpoint / "meta" / "metadata"
    text = path.read_text()
    assert '"width": 16' in text
    path.write_text(text.replace('"width": 16', '"width": 17'))


def damage_foreign_meta(checkpoint, state):
    (checkpoint / "meta" / "metadata").write_text('{"a": 1}')


def damage_everything(checkpoint, state):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__[7:])
def test_damaged_newest_is_named_and_the_one_before_is_used(copied, capfd, damage):
    workdir, states = copied
    newest = workdir / "checkpoints" / "20"
    damage(newest, states[20])
    state, meta = restore(workdir)
    assert_same(state, states[10])
    assert meta["step"] == 10
    warning = capfd.readouterr().err
    assert warning.startswith(f"warning: checkpoint {newest} is damaged")
    assert warning.count("\n") == 1, "one line, without the debris of Orbax"
    # Out of the way but not lost, so that the run can save step 20 again.
    assert not newest.exists()
    assert (newest.parent / "20.damaged").is_dir()


@pytest.mark.parametrize("damage", [damage_bit, damage_truncate, damage_everything])
def test_no_whole_checkpoint_is_an_error_and_nothing_is_moved(copied, capfd, damage):
    workdir, states = copied
    for step, state in states.items():
        damage(workdir / "checkpoints" / str(step), state)
    before = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    with pytest.raises(
        UserError, match=r"checkpoints: none of the checkpoints \[10, 20\]"
    ) as error:
        restore(workdir)
    assert str(workdir) in str(error.value)
    assert capfd.readouterr().err.count("\n") == 2
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == before


def test_a_run_goes_on_after_a_damaged_checkpoint(copied, capfd):
    workdir, states = copied
    folder = workdir / "checkpoints"
    for attempt in range(2):
        flip_bit(*data_file(folder / "20", states[20].params["transformer_blocks"]["kernel"]))
        with Checkpoints(folder, keep=2) as checkpoints:
            state, _ = checkpoints.restore_latest(make_state(), META)
            assert_same(state, states[10])
            assert checkpoints.steps() == [10]
            assert checkpoints.save(20, states[20], META)
        assert (folder / ("20.damaged" + (".1" if attempt else ""))).is_dir()
    assert_same(restore(workdir)[0], states[20])


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"stage": "flow"}, "stage is 'distill' in the checkpoint but 'flow' in this run"),
        ({"model": {"width": 32, "heads": [1, 2]}}, "model.width is 16 .* but 32"),
        ({"model": {"width": 16, "heads": (1, 3)}}, r"model.heads is \[1, 2\] .* but \[1, 3\]"),
        ({"model": {"width": 16}}, r"model.heads is \[1, 2\] .* but 'absent'"),
        ({"teacher": "abc"}, "teacher is 'absent' .* but 'abc'"),
    ],
)
def test_other_meta_is_refused_before_arrays_are_read(copied, expect, message):
    workdir, _ = copied
    # If the arrays were read first, this would be reported as damage.
    shutil.rmtree(workdir / "checkpoints" / "20" / "state")
    with pytest.raises(UserError, match=message) as error:
        restore(workdir, expect)
    assert str(workdir / "checkpoints" / "20") in str(error.value)
    assert (workdir / "checkpoints" / "20").exists()


def test_meta_is_compared_as_json(saved):
    same = {"model": {"heads": (1, 2), "width": 16.0}}
    assert restore(saved[0], same)[1]["step"] == 20


def change(state, **fields):
    return state.replace(**fields)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda s: change(s, params={**s.params, "flag": jnp.zeros(3, bool)}),
            r"leaf params/flag is bool\[2\] in the checkpoint but bool\[3\] in this run",
        ),
        (
            lambda s: change(s, params={**s.params, "out": {"kernel": jnp.zeros((16, 8))}}),
            r"leaf params/out/kernel is bfloat16\[16, 8\] .* but float32\[16, 8\]",
        ),
        (
            lambda s: change(s, disc={"head": jnp.zeros(3)}),
            "leaf disc/head is missing in the checkpoint",
        ),
        (
            lambda s: change(s, opt_state=None),
            r"leaf opt_state/0/count is in the checkpoint but not .* \(and 2 more\)",
        ),
    ],
)
def test_other_tree_is_refused_with_the_leaf(saved, other, message):
    with pytest.raises(UserError, match=message):
        restore(saved[0], abstract=other(make_state()))


@pytest.mark.parametrize("target", [(8,), (2, 2), (1,)])
def test_restore_on_another_mesh(tmp_path, target):
    source, target = mesh(4, 2), mesh(*target)
    state = make_state(3)
    kernel = state.params["transformer_blocks"]["kernel"]
    split = {
        "kernel": jax.device_put(kernel, NamedSharding(source, PartitionSpec(None, "data", "fsdp")))
    }
    state = state.replace(params={**state.params, "transformer_blocks": split})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, META)

    placed = NamedSharding(target, PartitionSpec(None, None, "data"))
    replicated = NamedSharding(target, PartitionSpec())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=placed if x.shape == kernel.shape else replicated
        ),
        state,
    )
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        got, _ = checkpoints.restore_latest(abstract, META)
    assert_same(got, state)
    for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding


# What a failed write leaves behind may be reported by its threads between save and wait.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_failed_write_is_a_user_error_and_keeps_the_old(tmp_path, capfd):
    """A limit on file sizes stands in for a full disk."""
    state = make_state()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, META)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(
            UserError, match=f"{tmp_path} could not be written .*too large.*disk full"
        ):
            checkpoints.save(2, state, META)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        checkpoints.close()
    assert capfd.readouterr().err == ""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert_same(checkpoints.restore_latest(make_state(), META)[0], state)
        assert checkpoints.save(2, state, META)


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoint directory"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)


def test_log_filters_are_taken_back(tmp_path):
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [list(logger.filters) for logger in loggers]
    save_steps(tmp_path / "checkpoints", (1,))
    restore(tmp_path)
    load_params(tmp_path)
    assert [list(logger.filters) for logger in loggers] == before


@pytest.mark.parametrize(("which", "field"), [("ema", "ema"), ("raw", "params")])
def test_load_params(saved, which, field):
    workdir, states = saved
    params, meta = load_params(workdir, which)
    assert_same(params, getattr(states[20], field))
    assert meta == {**META, "step": 20}
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(params))
    params, meta = load_params(workdir, which, step=10)
    assert_same(params, getattr(states[10], field))
    assert meta["step"] == 10


def test_load_params_reads_nothing_else(copied, capfd):
    """Damage in the optimizer state does not matter to it; damage in the params does."""
    workdir, states = copied
    newest = workdir / "checkpoints" / "20"
    path, at = data_file(newest, states[20].opt_state[0].mu["kernel"])
    flip_bit(path, at)
    assert_same(load_params(workdir, "raw")[0], states[20].params)
    assert capfd.readouterr().err == ""
    flip_bit(*data_file(newest, states[20].params["transformer_blocks"]["kernel"]))
    assert_same(load_params(workdir, "raw")[0], states[10].params)
    assert (
        "differ from their hash, first params/transformer_blocks/kernel" in capfd.readouterr().err
    )
    assert newest.exists(), "a reader moves nothing"
    with pytest.raises(UserError, match=r"none of the checkpoints \[20\] is whole"):
        load_params(workdir, "raw", step=20)


def test_load_params_shardings(saved):
    workdir, states = saved
    on = mesh(8)
    everywhere = NamedSharding(on, PartitionSpec())
    split = NamedSharding(on, PartitionSpec(None, "data"))

    def by_rank(tree):
        assert jax.tree.structure(tree) == jax.tree.structure(states[20].ema)
        return jax.tree.map(lambda x: split if len(x.shape) == 3 else everywhere, tree)

    for shardings in (everywhere, by_rank):
        params, _ = load_params(workdir, shardings=shardings)
        assert_same(params, states[20].ema)
    assert params["transformer_blocks"]["kernel"].sharding == split
    assert params["out"]["kernel"].sharding == everywhere


def test_load_params_of_a_wrong_place(tmp_path, saved):
    with pytest.raises(UserError, match="is not a training workdir"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a training workdir"):
        load_params(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        load_params(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of step 15; it has \[10, 20\]"):
        load_params(saved[0], step=15)
    with pytest.raises(UserError, match="'best' is not known; choose 'ema' or 'raw'"):
        load_params(saved[0], "best")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_load_params_that_are_not_there(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, make_state().replace(ema=None), META)
    with pytest.raises(UserError, match="has no ema parameters"):
        load_params(tmp_path)
    assert_same(load_params(tmp_path, "raw")[0], make_state().params)


def test_load_params_of_a_foreign_checkpoint(tmp_path, capfd):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(1, args=ocp.args.StandardSave({"params": {"x": jnp.ones(3)}}))
    capfd.readouterr()
    with pytest.raises(UserError, match=r"none of the checkpoints \[1\] is whole"):
        load_params(tmp_path)
    assert capfd.readouterr().err.count("\n") == 1


def test_fingerprint_does_not_depend_on_placement_or_container():
    tree = make_state(1).params
    want = fingerprint(tree)
    on = mesh(4, 2)
    assert want == fingerprint(jax.device_get(tree))
    assert want == fingerprint(jax.device_put(tree, NamedSharding(on, PartitionSpec())))
    split = dict(
        tree,
        transformer_blocks=jax.device_put(
            tree["transformer_blocks"], NamedSharding(on, PartitionSpec("fsdp", "data"))
        ),
    )
    assert want == fingerprint(split)
    assert want == fingerprint(flax.core.freeze(tree))
    assert want == fingerprint(dict(reversed(tree.items())))


def test_fingerprint_formula_never_changes():
    """Written out in numpy: another formula would make all checkpoints on disk look damaged."""

    def mix(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    array = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    words, position = array.view(np.uint32).ravel(), np.arange(12, dtype=np.uint32)
    first = mix(words + mix(position + np.uint32(0x9E3779B9))).sum(dtype=np.uint32)
    second = mix(words ^ mix(position ^ np.uint32(0x7F4A7C15))).sum(dtype=np.uint32)
    table = {"a/b": {"shape": [3, 4], "dtype": "float32", "bits": f"{first:08x}{second:08x}"}}
    assert leaf_table({"a": {"b": array}}) == table
    text = json.dumps(table, sort_keys=True, separators=(",", ":"))
    assert fingerprint({"a": {"b": array}}) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float64", "int64"]
)
def test_fingerprint_sees_every_bit(dtype):
    array = np.zeros((3, 5), jnp.dtype(dtype))
    seen = {fingerprint({"x": array})}
    size = array.dtype.itemsize
    for at in range(0, array.nbytes, max(1, size // 2)):
        content = bytearray(array.tobytes())
        content[at] ^= 1
        seen.add(fingerprint({"x": np.frombuffer(content, array.dtype).reshape(3, 5)}))
    assert len(seen) == 1 + len(range(0, array.nbytes, max(1, size // 2)))


def test_fingerprint_sees_names_shapes_dtypes_and_order():
    base = jnp.arange(6, dtype=jnp.int32)
    trees = [
        {"x": base},
        {"y": base},
        {"x": base.reshape(2, 3)},
        {"x": base.reshape(3, 2)},
        {"x": base.astype(jnp.uint32)},
        {"x": base[::-1]},
        {"x": -base},
        {"x": {"x": base}},
        {"x": base, "y": base},
        {"x": jnp.zeros(6, jnp.int32)},
        {"x": jnp.zeros(5, jnp.int32)},
        {"x": jnp.zeros(6), "nan": jnp.nan},
        {"x": -jnp.zeros(6), "nan": jnp.nan},
        {},
    ]
    trees[-2:-2] = [{"x": jnp.float32([1, -1])}, {"x": jnp.float32([-1, 1])}]
    prints = [fingerprint(jax.tree.map(jnp.asarray, tree)) for tree in trees]
    assert len(set(prints)) == len(prints)
