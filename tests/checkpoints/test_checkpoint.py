"""Checkpoints: bit-equal resume, refusals, other meshes, partial loads."""

import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import pytest
from helpers.checkpoints import (
    META,
    State,
    assert_same,
    bits,
    copied,
    data_file,
    flip_bit,
    make_state,
    mesh,
    restore,
    save_steps,
    saved,
)
from jax.sharding import NamedSharding, PartitionSpec

from sprint_jax.checkpoints.checkpoint import Checkpoints, load_params
from sprint_jax.core.errors import UserError


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


@pytest.mark.parametrize("async_gb", [4.0, 0.0])
def test_restore_at_once_after_save_and_donation(tmp_path, async_gb):
    """The arrays are overwritten by a donated update as soon as save has returned."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 1, tree), donate_argnums=0)
    state = {"params": {"kernel": jnp.arange(2.0**20).reshape(1024, 1024)}}
    want = bits(state)
    with Checkpoints(tmp_path, keep=1, async_gb=async_gb) as checkpoints:
        checkpoints.save(1, state, {})
        state = step(state)
        restored, _ = checkpoints.restore_latest(state)
    assert bits(restored) == want
    assert bits(state) != want


def test_streamed_state_is_the_same_checkpoint(tmp_path):
    state = make_state(5)
    with Checkpoints(tmp_path, keep=1, async_gb=0) as checkpoints:
        assert checkpoints.save(1, state, META)
        assert checkpoints.steps() == [1]
        got, _ = checkpoints.restore_latest(make_state(), META)
    assert_same(got, state)


def test_donated_target_is_freed_only_for_a_checkpoint_that_fits(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        fresh = make_state()
        assert checkpoints.restore_latest(fresh, META, donate=True) is None
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(fresh))
        checkpoints.save(1, make_state(5), META)
        with pytest.raises(UserError, match="stage"):
            checkpoints.restore_latest(fresh, {"stage": "flow"}, donate=True)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(fresh))
        got, _ = checkpoints.restore_latest(fresh, META, donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(fresh))
    assert_same(got, make_state(5))


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
