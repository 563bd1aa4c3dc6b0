"""Checkpoints that are damaged in every way: named, and the one before is used."""

import shutil

import numpy as np
import pytest
from helpers.checkpoints import (
    META,
    assert_same,
    copied,
    data_file,
    flip_bit,
    make_state,
    restore,
    saved,
)

from sprint_jax.checkpoints.checkpoint import Checkpoints
from sprint_jax.core.errors import UserError


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


@pytest.mark.parametrize("seed", range(20))
def test_truncated_at_a_random_place(copied, capfd, seed):
    """Whichever file is cut short, the state is a saved one, and the newest unless it is named."""
    workdir, states = copied
    newest = workdir / "checkpoints" / "20"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    random = np.random.default_rng(seed)
    # Half of the seeds choose among bytes, so mostly in array data; the others among files.
    sizes = np.array([path.stat().st_size for path in files], float)
    path = files[random.choice(len(files), p=sizes / sizes.sum() if seed % 2 else None)]
    path.write_bytes(path.read_bytes()[: random.integers(path.stat().st_size)])
    state, meta = restore(workdir)
    warning = capfd.readouterr().err
    assert_same(state, states[meta["step"]])
    if meta["step"] == 10:
        assert warning.startswith(f"warning: checkpoint {newest} is damaged")
        assert (newest.parent / "20.damaged").is_dir()
    else:
        assert meta["step"] == 20 and not warning, "only a file that is not needed may go unnoticed"


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
