"""Every key of the shipped configs is read by the stages and commands that they are for."""

import contextlib

import numpy as np
import pytest
from helpers.encoding import SMALL
from helpers.encoding import words as encoding_words
from helpers.recording import Recording
from helpers.runs import ROOT, quick_compilation, words, write_digits
from PIL import Image

from configs import default
from sprint_jax import encode, train
from sprint_jax.core import cli
from sprint_jax.core.config import flatten, load_config

# Trainings by config file: a teacher, then its student.
STAGES = ("configs/digits.py:teacher,small", "configs/digits.py:student,small")
STAGES += ("configs/teacher.py:600m", "configs/sprint.py:600m")
NOISE = {"data.source": "synthetic", "data.latent_size": (4, 4), "data.text_length": 8}
NOISE |= {"model.attention_head_dim": 8, "model.cross_attention_head_dim": 8, "ladd.taps": (1,)}


@pytest.mark.parametrize("spec", [*STAGES, "configs/teacher.py:4800m", "configs/encode.py:1024"])
def test_configs_have_all_keys_and_no_others(spec):
    keys = flatten(default.get_config()).keys()
    assert flatten(load_config(str(ROOT / spec))).keys() == keys and len(keys) > 60


@contextlib.contextmanager
def no_compilation(first, lower, shapes):
    """Stands in for `compile_updates`; that the updates were traced has read all that they read."""

    def update(state, batch, frozen):
        return state.replace(step=state.step + 1), {"health/in_a_row": np.zeros(())}

    for batch in shapes[1:]:
        lower(batch)
    yield lambda batch, wait=True: [update for _ in first]


def write_images(folder):
    folder.mkdir()
    for number in range(24):
        Image.new("RGB", (16, 8), (10 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red 3")
    return folder


@pytest.mark.slow
def test_every_key_is_read(tmp_path, monkeypatch):
    read = set()
    monkeypatch.setattr(cli, "load_config", lambda *how: Recording(load_config(*how), read))
    monkeypatch.setattr(train, "compile_updates", no_compilation)
    data = write_digits(tmp_path / "data")

    def run(name, spec, changes):
        changes = {key.replace(".", "__"): value for key, value in changes.items()}
        train.main(words(spec, data, tmp_path / name, steps=1, **changes))

    with quick_compilation():
        for number, spec in enumerate(STAGES):
            teacher = {"teacher": str(tmp_path / str(number - 1))} if number % 2 else {}
            run(str(number), spec, teacher | ({} if "digits" in spec else NOISE))
        for recipe in ("rcm", "twinflow"):
            run(
                recipe, f"configs/sprint.py:600m,{recipe}", {"teacher": str(tmp_path / "2")} | NOISE
            )
        maps = {"meanflow.weight": 1.0, "model.flow_map": True, "trajectory.weight": 1.0}
        run("maps", STAGES[1], {"teacher": str(tmp_path / "0")} | maps)
        images = {"data.images": (str(write_images(tmp_path / "pictures")),)}
        encode.main(encoding_words(tmp_path / "latents", **{"data__images": images["data.images"]}))
        latents = {"data.latents": (str(tmp_path / "latents"),), "data.holdout": 2}
        run("images", STAGES[0], SMALL | images | {"data.source": "images"})
        run("cached", STAGES[0], latents | {"data.source": "latents"})
    assert read == flatten(default.get_config()).keys()
