"""Checkpoints: bit-equal resume, refusals, other meshes, partial loads."""

import functools
import resource
import shutil

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from helpers.checkpoints import META, State, data_file, flip_bit, make_state, mesh, restore
from helpers.compare import assert_same_bits
from helpers.refusals import refuse
from jax.sharding import NamedSharding, PartitionSpec

from sprint_jax.checkpoints import checkpoint as checkpoint_module
from sprint_jax.checkpoints.checkpoint import Checkpoints
from sprint_jax.core.errors import UserError

# The saved states are of random bits, NaN among them.
load_params = functools.partial(checkpoint_module.load_params, allow_nonfinite=True)


@pytest.mark.parametrize("async_gb", [4.0, 0.0])
def test_round_trip_is_bit_equal_though_the_arrays_are_donated(tmp_path, async_gb):
    """The arrays are overwritten by an update as soon as save has returned."""
    step = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    state = make_state(5)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(tmp_path, keep=1, async_gb=async_gb) as checkpoints:
        assert checkpoints.restore_latest(target) is None
        assert checkpoints.save(1, state, META)
        state = step(state)
        # meta is compared as JSON
        same = {"model": {"heads": (1, 2), "width": 16.0}}
        restored, meta = checkpoints.restore_latest(target, same)
    assert isinstance(restored, State) and not state.params["flag"].any()
    assert_same_bits(restored, make_state(5))
    assert meta == {**META, "step": 1}


def test_keep_every_force_and_repeats(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, keep=2, every=10) as checkpoints:
        done = [checkpoints.save(step, state, META) for step in (5, 10, 20, 20, 30)]
        assert done == [False, True, True, False, True]
        assert checkpoints.save(33, state, META, force=True)
        assert not checkpoints.save(33, state, META, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["30", "33"]
    with Checkpoints(tmp_path, keep=1, keep_period=15) as checkpoints:
        assert all(checkpoints.save(step, state, META) for step in (45, 46, 47))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["30", "45", "47"]


def test_what_cannot_be(tmp_path):
    for arguments in ({"keep": 0}, {"keep": 1, "every": 0}):
        refuse(lambda a=arguments: Checkpoints(tmp_path, **a), parts=["keep="], exit_code=1)
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "checkpoints"
    refuse(lambda: Checkpoints(folder, keep=1), parts=[str(folder)], exit_code=1)


def test_leftover_of_a_killed_save_is_ignored_and_removed(copied):
    workdir, states = copied
    folder = workdir / "checkpoints"
    torn = folder / "30.orbax-checkpoint-tmp"
    shutil.copytree(folder / "20", torn)
    with Checkpoints(folder, keep=3) as checkpoints:
        state, _ = checkpoints.restore_latest(make_state(), META)
        assert_same_bits(state, states[20])
        assert checkpoints.save(30, states[10], META)
    assert not torn.exists()


@pytest.mark.parametrize("number", ["file", "copy"])
def test_a_number_that_is_no_checkpoint_of_this_step_is_named(copied, capfd, number):
    workdir, states = copied
    false = workdir / "checkpoints" / "30"
    if number == "file":
        false.write_text("")
    else:
        shutil.copytree(workdir / "checkpoints" / "20", false)
    assert_same_bits(load_params(workdir, "raw")[0], states[20].params)
    assert f"checkpoint {false} " in capfd.readouterr().err
    assert_same_bits(restore(workdir)[0], states[20])
    assert f"checkpoint {false} " in capfd.readouterr().err
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        assert checkpoints.save(30, states[10], META)


@pytest.mark.parametrize(
    ("expect", "change", "named"),
    [
        ({"stage": "flow"}, {}, "stage .*distill.*flow"),
        ({"model": {"width": 32, "heads": [1, 2]}}, {}, "model.width .*16.*32"),
        ({"model": {"width": 16, "heads": (1, 3)}}, {}, r"model.heads .*\[1, 2\].*\[1, 3\]"),
        ({"model": {"width": 16}}, {}, r"model.heads .*\[1, 2\]"),
        ({"teacher": "abc"}, {}, "teacher .*abc"),
        (META, {"params": {"flag": jnp.zeros(3, bool)}}, r"params/flag .*bool\[2\].*bool\[3\]"),
        (META, {"disc": {"head": jnp.zeros(3)}}, r"disc/head .*float32\[3\]"),
        (META, {"opt_state": None}, r"opt_state/0/count .*2 more"),
    ],
)
def test_other_meta_or_leaves_are_refused_before_arrays_are_read(copied, expect, change, named):
    checkpoint = copied[0] / "checkpoints" / "20"
    # If the arrays were read first, this would be reported as damage.
    shutil.rmtree(checkpoint / "state")
    state = make_state()
    if "params" in change:
        change = {"params": state.params | change["params"]}
    with pytest.raises(UserError, match=named) as error:
        restore(copied[0], expect, state.replace(**change))
    assert str(checkpoint) in str(error.value) and checkpoint.exists()


@pytest.mark.parametrize("target", [(8,), (2, 2), (1,)])
def test_restore_on_another_mesh(tmp_path, target):
    source, target = mesh(4, 2), mesh(*target)
    state = make_state(3)
    kernel = state.params["transformer_blocks"]["kernel"]
    placed = NamedSharding(source, PartitionSpec(None, "data", "fsdp"))
    split = {"transformer_blocks": {"kernel": jax.device_put(kernel, placed)}}
    state = state.replace(params=state.params | split)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, META)

    def place(x):
        spec = PartitionSpec(None, None, "data") if x.shape == kernel.shape else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(target, spec))

    wanted = jax.tree.map(place, state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        got, _ = checkpoints.restore_latest(wanted, META)
    assert_same_bits(got, state)
    assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(lambda x: x.sharding, wanted)


# Threads of a failed write may report what they left behind, between save and wait.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_failed_write_is_a_user_error_and_keeps_the_old(tmp_path):
    """A limit on file sizes stands in for a full disk; below it lies no file of Orbax's own metadata."""
    state = make_state()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, META)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=str(tmp_path)):
            checkpoints.save(2, state, META)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        checkpoints.close()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert_same_bits(checkpoints.restore_latest(make_state(), META)[0], state)
        assert checkpoints.save(2, state, META)


@pytest.mark.parametrize(("which", "field"), [("ema", "ema"), ("raw", "params")])
def test_load_params(saved, which, field):
    workdir, states = saved
    params, meta = load_params(workdir, which)
    assert_same_bits(params, getattr(states[20], field))
    assert meta == {**META, "step": 20}
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(params))


def test_load_params_refuses_what_is_not_finite(saved):
    checkpoint = saved[0] / "checkpoints" / "20"
    named = [str(checkpoint), "ema/transformer_blocks/kernel"]
    refuse(checkpoint_module.load_params, saved[0], parts=named, exit_code=1)


def test_load_params_reads_nothing_else(copied, capfd):
    """Damage in the optimizer state does not matter to it; damage in the params does."""
    workdir, states = copied
    newest = workdir / "checkpoints" / "20"
    flip_bit(*data_file(newest, states[20].opt_state[0].mu["kernel"]))
    assert_same_bits(load_params(workdir, "raw")[0], states[20].params)
    assert capfd.readouterr().err == ""
    flip_bit(*data_file(newest, states[20].params["transformer_blocks"]["kernel"]))
    assert_same_bits(load_params(workdir, "raw")[0], states[10].params)
    assert "params/transformer_blocks/kernel" in capfd.readouterr().err
    assert newest.exists(), "a reader moves nothing"


def test_load_params_shardings(saved):
    workdir, states = saved
    everywhere = NamedSharding(mesh(8), PartitionSpec())
    split = NamedSharding(mesh(8), PartitionSpec(None, "data"))
    by_rank = lambda tree: jax.tree.map(lambda x: split if len(x.shape) == 3 else everywhere, tree)  # noqa: E731
    for shardings in (everywhere, by_rank):
        params, _ = load_params(workdir, shardings=shardings)
        assert_same_bits(params, states[20].ema)
    assert params["transformer_blocks"]["kernel"].sharding == split
    assert params["out"]["kernel"].sharding == everywhere


def test_load_params_that_are_not_there(tmp_path, saved, capfd):
    def refused(*arguments, named, code=1, **options):
        refuse(lambda: load_params(*arguments, **options), parts=[named], exit_code=code)

    folder = tmp_path / "checkpoints"
    refused(tmp_path / "nowhere", named=str(tmp_path / "nowhere"))
    refused(tmp_path, named=str(tmp_path))
    folder.mkdir()
    refused(tmp_path, named=str(folder))
    assert list(folder.iterdir()) == []
    refused(saved[0], "best", named="'best'", code=2)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, make_state().replace(ema=None), META)
    refused(tmp_path, named="ema")
    assert_same_bits(load_params(tmp_path, "raw")[0], make_state().params)
    shutil.rmtree(folder)
    with ocp.CheckpointManager(folder) as foreign:
        foreign.save(1, args=ocp.args.StandardSave({"params": {"x": jnp.ones(3)}}))
    refused(tmp_path, named="[1]")
