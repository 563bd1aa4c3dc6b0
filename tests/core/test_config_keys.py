"""Every key of the shipped configs is read by the stages and commands that they are for."""

import contextlib

import numpy as np
import pytest
from helpers.encoding import SMALL
from helpers.encoding import words as encoding_words
from helpers.recording import Recording
from helpers.refusals import refuse
from helpers.runs import ROOT, quick_compilation, words, write_digits
from PIL import Image

from configs import default
from sprint_jax import encode, train
from sprint_jax.core import cli
from sprint_jax.core.config import Config, flatten, load_config
from sprint_jax.core.ranges import RANGES

# Trainings by config file: a teacher, then its student.
STAGES = ("configs/digits.py:teacher,small", "configs/digits.py:student,small")
STAGES += ("configs/teacher.py:600m", "configs/sprint.py:600m")
NOISE = {"data.source": "synthetic", "data.latent_size": (4, 4), "data.text_length": 8}
NOISE |= {"model.attention_head_dim": 8, "model.cross_attention_head_dim": 8, "ladd.taps": (1,)}


@pytest.mark.parametrize("spec", [*STAGES, "configs/teacher.py:4800m", "configs/encode.py:1024"])
def test_configs_have_all_keys_and_no_others(spec):
    keys = flatten(default.get_config()).keys()
    assert flatten(load_config(str(ROOT / spec))).keys() == keys and len(keys) > 60


DEFAULT = default.get_config()
DEFAULTS, DEFAULT_FILE = flatten(DEFAULT), ROOT / "configs/default.py"
WRONG = {
    "optimizer.learning_rate": [-1e-3],
    "ema_decay": [1.1, -0.1],
    "flow.caption_dropout": [7.0],
}
WRONG |= {"sigma_d": [0.0, -0.5], "scm.time_std": [-1.0], "scm.tangent_warmup": [-1]}
WRONG |= {"optimizer.warmup_steps": [-1], "optimizer.clip_norm": [-0.1], "optimizer.b2": [1.0]}
WRONG |= {"model.num_layers": [0, -1, 10**6], "model.patch_size": [0, 10**9], "seed": [-1, 2**32]}
WRONG |= {"data.latents": ["az://bucket/latents"], "data.latent_size": ["8", "8,0"], "steps": [0]}
WRONG |= {"teacher": ["ftp://host/run"], "scm.guidance": ["4,-1", "inf,"], "mesh.fsdp": [0, -2]}
WRONG |= {"data.dir": ["", "az://bucket/x"], "data.sizes": ["8by8,"], "data.loaded_sizes": [1, -1]}
WRONG |= {"data.prompt_style": ["loud"], "encode.dtype": ["int8"]}
WRONG |= {"sampler.midpoint": [0.0, 1.6], "trajectory.spread": [0.5], "log.profile_hosts": ["-1,"]}


def test_every_key_has_a_range_and_its_default_is_inside():
    assert RANGES.keys() == DEFAULTS.keys() | {"model.logvar"}  # not a run's to choose
    for key, value in DEFAULTS.items():
        assert RANGES[key].holds(value), key
        assert not RANGES[key].holds([[value]]) and not RANGES[key].holds({}), key


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if type(value) is float])
def test_numbers_are_finite(key):
    config = Config(DEFAULT)
    for bad in ("inf", "-inf", float("nan"), 10**400):
        refuse(config.override, {key: bad}, parts=[f"config.{key}="])


@pytest.mark.parametrize("key", WRONG)
def test_values_out_of_range_are_refused_when_a_config_is_read(key):
    for bad in WRONG[key]:
        word = [f"--config.{key}={bad}"]
        refuse(load_config, str(DEFAULT_FILE), word, parts=[f"config.{key}="])


def test_published_rates_follow_the_batch():
    c = load_config(str(ROOT / "configs/sprint.py:600m"))
    assert c.data.batch_size == 512
    for section in (c.optimizer, c.ladd.optimizer):
        assert section.learning_rate == pytest.approx(2e-6 * 2**0.5)


@contextlib.contextmanager
def no_compilation(first, lower, shapes, most):
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
