"""Every key of the shipped configs is read by the stages and commands that they are for."""

import signal

import numpy as np
import pytest
from helpers.encoding import SMALL
from helpers.recording import Recording
from helpers.runs import ROOT, overrides, quick_compilation, tiny, write_digits
from PIL import Image

from configs import default
from sprint_jax import encode, train
from sprint_jax.core.config import flatten, load_config
from sprint_jax.data import feed
from sprint_jax.training import setup

# Trainings by config file: a teacher, then its student.
STAGES = ("configs/digits.py:teacher,small", "configs/digits.py:student,small")
STAGES += ("configs/teacher.py:600m", "configs/sprint.py:600m")
NOISE = {"data.source": "synthetic", "data.latent_size": (4, 4), "data.text_length": 8}
NOISE |= {"model.attention_head_dim": 8, "model.cross_attention_head_dim": 8, "ladd.taps": (1,)}


@pytest.mark.parametrize("spec", [*STAGES, "configs/teacher.py:4800m", "configs/encode.py:1024"])
def test_configs_have_all_keys_and_no_others(spec):
    keys = flatten(default.get_config()).keys()
    assert flatten(load_config(str(ROOT / spec))).keys() == keys and len(keys) > 60


def no_compilation(lowered):
    """Stands in for `compile_updates`; that the updates were traced has read all that they read."""

    def update(state, batch, frozen):
        return state.replace(step=state.step + 1), {"health/in_a_row": np.zeros(())}

    return [[update for _ in updates] for updates in lowered]


def write_images(folder):
    folder.mkdir()
    for number in range(24):
        Image.new("RGB", (16, 8), (10 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red 3")
    return folder


def test_every_key_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "compile_updates", no_compilation)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    data, read = write_digits(tmp_path / "data"), set()

    def recording(config):
        return Recording(config, read)

    with quick_compilation():
        teacher = ""
        for number, spec in enumerate(STAGES):
            values = overrides(spec, data, steps=1, teacher=teacher)
            values |= {} if "digits" in spec else NOISE
            train.train(recording(load_config(str(ROOT / spec), values)), tmp_path / str(number))
            teacher = "" if teacher else str(tmp_path / str(number))
        images = {"data.images": (str(write_images(tmp_path / "images")),)}
        latents = {"data.latents": (str(tmp_path / "latents"),), "data.holdout": 2}
        c = recording(load_config(str(ROOT / "configs/encode.py:digits"), SMALL | images))
        encode.run(c, encode.open_source(c), tmp_path / "latents")
        for source, changes in (("images", SMALL | images), ("latents", latents)):
            c = tiny(STAGES[0], data).override(changes | {"data.source": source})
            feed.open_data(recording(c), setup.mesh_from(c))
    assert read == flatten(default.get_config()).keys()
