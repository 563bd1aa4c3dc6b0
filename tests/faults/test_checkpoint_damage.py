"""Checkpoints that are damaged in every way: named, and the one before is used."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import META, data_file, flip_bit, make_state, restore
from helpers.compare import assert_same_bits

from sprint_jax.checkpoints.checkpoint import Checkpoints
from sprint_jax.core.errors import UserError


def kernel(state):
    return state.ema["transformer_blocks"]["kernel"]


def flip(checkpoint, state):
    flip_bit(*data_file(checkpoint, kernel(state)))


def truncate(checkpoint, state):
    path, at = data_file(checkpoint, kernel(state))
    path.write_bytes(path.read_bytes()[: at + 100])


def write_meta(text):
    return lambda checkpoint, _: (checkpoint / "meta" / "metadata").write_text(text)


def alter_meta(checkpoint, state):
    """Still JSON, and still a possible value."""
    path = checkpoint / "meta" / "metadata"
    path.write_text(path.read_text().replace('"width": 16', '"width": 17'))


def remove(name):
    return lambda checkpoint, _: shutil.rmtree(checkpoint / name)


def empty(checkpoint, state):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = {
    "bit": flip,
    "truncate": truncate,
    "no data": lambda checkpoint, state: data_file(checkpoint, kernel(state))[0].unlink(),
    "no index": lambda checkpoint, state: (checkpoint / "state" / "manifest.ocdbt").unlink(),
    "no state": remove("state"),
    "no meta": remove("meta"),
    "torn meta": write_meta('{"meta": {"stage": "dist'),
    "altered meta": alter_meta,
    "foreign meta": write_meta('{"a": 1}'),
    "nothing": empty,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_named_and_the_one_before_is_used(copied, capfd, damage):
    workdir, states = copied
    newest = workdir / "checkpoints" / "20"
    DAMAGES[damage](newest, states[20])
    state, meta = restore(workdir)
    assert_same_bits(state, states[10])
    assert meta["step"] == 10
    warning = capfd.readouterr().err
    assert warning.startswith("warning: ") and str(newest) in warning and warning.count("\n") == 1
    # Out of the way but not lost, so that the run can save step 20 again.
    assert not newest.exists() and (newest.parent / "20.damaged").is_dir()


@pytest.mark.parametrize("seed", range(20))
def test_truncated_at_a_random_place(copied, capfd, seed):
    """Whichever file is cut short, the state is a saved one, and the newest unless it is named."""
    workdir, states = copied
    newest = workdir / "checkpoints" / "20"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    random = np.random.default_rng(seed)
    # Half of the seeds choose among bytes, so mostly in array data; the others among files.
    sizes = np.array([path.stat().st_size for path in files], float)
    path: Path = files[random.choice(len(files), p=sizes / sizes.sum() if seed % 2 else None)]
    path.write_bytes(path.read_bytes()[: random.integers(path.stat().st_size)])
    state, meta = restore(workdir)
    warning = capfd.readouterr().err
    assert_same_bits(state, states[meta["step"]])
    # Only a file that is not needed may go unnoticed.
    assert (meta["step"] == 10) == (str(newest) in warning) == (not newest.exists())


@pytest.mark.parametrize("damage", [flip, empty])
def test_no_whole_checkpoint_is_an_error_and_nothing_is_moved(copied, capfd, damage):
    workdir, states = copied
    folder = workdir / "checkpoints"
    for step, state in states.items():
        damage(folder / str(step), state)
    with pytest.raises(UserError, match=r"\[10, 20\]") as error:
        restore(workdir)
    assert str(folder) in str(error.value)
    assert capfd.readouterr().err.count("\n") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]


def test_a_run_goes_on_after_a_damaged_checkpoint(copied, capfd):
    workdir, states = copied
    folder = workdir / "checkpoints"
    for attempt in range(2):
        flip(folder / "20", states[20])
        with Checkpoints(folder, keep=2) as checkpoints:
            state, _ = checkpoints.restore_latest(make_state(), META)
            assert_same_bits(state, states[10])
            assert checkpoints.save(20, states[20], META)
        assert (folder / ("20.damaged" + (".1" if attempt else ""))).is_dir()
    assert_same_bits(restore(workdir)[0], states[20])
