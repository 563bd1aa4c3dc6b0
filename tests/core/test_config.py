"""sprint_jax/core/config.py: config files, their arguments, and typed overrides."""

import json
import pickle

import pytest
from helpers.refusals import refuse
from ml_collections import ConfigDict

from sprint_jax.core.config import Config, diff, flatten, load_config

VALUES = {
    "steps": 100,
    "rate": 1e-3,
    "resume": True,
    "teacher": "",
    "limit": None,
    "offset": 3,
    "mesh": (1, -1),
    "betas": (0.9, 1),
    "empty": (),
    "model": {"depth": 4, "norm": {"eps": 1e-6}, "kind": "linear"},
}
CONFIG = Config(VALUES)

CONFIG_FILE = '''
"""A config for the tests."""
from ml_collections import ConfigDict
from settings.base import STEPS
from sprint_jax.core.config import parse_arg

def get_config(arg=None):
    stage, size = parse_arg(arg, ("teacher", "student"), ("full", "small"))
    c = ConfigDict({"stage": stage, "steps": 10 if size == "small" else STEPS,
                    "model": {"depth": 2, "mlp": [2, 4]}})
    c.log = c.get_ref("steps") // 5
    return c
'''


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "settings" / "tiny.py"
    path.parent.mkdir()
    path.with_name("base.py").write_text("STEPS = 1000\n")
    path.write_text(CONFIG_FILE)
    return path


def test_reads_like_a_mapping_cannot_be_changed_and_survives_json_and_pickle():
    assert CONFIG.model.norm.eps == CONFIG["model"]["norm"]["eps"] == 1e-6
    assert dict(**CONFIG.model.norm) == {"eps": 1e-6}
    assert "depth" in CONFIG.model and sorted(CONFIG) == sorted(VALUES)
    with pytest.raises(AttributeError, match='"depth"'):
        _ = CONFIG.model.depht
    with pytest.raises(AttributeError):
        CONFIG.steps = 3
    for again in (json.loads(json.dumps(CONFIG.to_dict())), ConfigDict(VALUES)):
        assert Config(again) == CONFIG and diff(again, CONFIG) == []
        assert Config(again).mesh == (1, -1)
    assert pickle.loads(pickle.dumps(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("offset", "-7", -7),
        ("rate", "2", 2.0),
        ("rate", "1e-4", 1e-4),
        ("rate", "inf", float("inf")),
        ("rate", 1, 1.0),
        ("resume", "False", False),
        ("teacher", "runs/a=b,c", "runs/a=b,c"),
        ("limit", "3", 3),
        ("limit", "none", None),
        ("limit", "some words", "some words"),
        ("mesh", "2,4", (2, 4)),
        ("mesh", "(2, 4)", (2, 4)),
        ("mesh", "8,", (8,)),
        ("mesh", "", ()),
        ("mesh", [8, 1], (8, 1)),
        ("betas", "0,1e-2", (0.0, 0.01)),
        ("empty", "1,b", (1, "b")),
        ("model.norm.eps", "1", 1.0),
    ],
)
def test_override_takes_the_type_of_the_old_value(key, text, value):
    changed = CONFIG.override([f"--config.{key}={text}"] if isinstance(text, str) else {key: text})
    found = flatten(changed)[key]
    # repr tells 1 from 1.0, in tuples too.
    assert repr(found) == repr(value)
    assert diff(CONFIG, changed) == ([key] if flatten(CONFIG)[key] != value else [])
    assert Config(VALUES) == CONFIG, "the original must not change"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("steps", ["1.5", "many", 1.5, True, None]),
        ("rate", ["fast", "nan", True]),
        ("resume", ["1", 1]),
        ("teacher", [3, None]),
        ("mesh", ["2,x", "2.5,4", 3]),
    ],
)
def test_override_refuses_another_type(key, values):
    for value in values:
        old = repr(flatten(CONFIG)[key])
        refuse(CONFIG.override, {key: value}, parts=[f"--config.{key}={value}", old])


def test_override_names_an_unknown_key_and_the_nearest():
    for word, *parts in (
        ("stpes=1", "'stpes'", "'steps'"),
        ("depth=1", "'depth'", "'model.depth'"),
        ("model.nrom.eps=1", "'model.nrom.eps'", "'model.norm.eps'"),
        ("steps.more=1", "'steps.more'"),
        ("model=1", "'model'", "model.depth", "model.norm.eps"),
        ("steps", "--config.steps"),
    ):
        refuse(CONFIG.override, [f"--config.{word}"], parts=parts)


def test_refuses_what_json_cannot_hold():
    for value in (object(), [[1]], {1}):
        refuse(Config, {"a": {"b": value}}, parts=["'a.b'"])


def test_load_config(config_file):
    full = load_config(str(config_file))
    assert (full.stage, full.steps, full.log, full.model.mlp) == ("teacher", 1000, 200, (2, 4))
    words = ["--config.model.depth=9", "--config.model.mlp=1,1"]
    small = load_config(f"{config_file}: small , student", words)
    assert (small.stage, small.steps, small.model.depth) == ("student", 10, 9)
    assert diff(full, small) == ["log", "model.depth", "model.mlp", "stage", "steps"]
    assert diff({"a": 1}, {"b": 1}) == ["a", "b"]


def test_shipped_configs_load_from_anywhere_and_a_users_own_build_on_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/digits.py:teacher").stage == "flow"
    (tmp_path / "configs").mkdir()
    mine = "from configs import digits\ndef get_config(arg): return digits.get_config('student')"
    (tmp_path / "configs" / "digits2.py").write_text(mine)
    assert load_config("configs/digits2.py").stage == "distill"


def test_load_config_names_what_is_wrong(config_file, tmp_path):
    missing = str(config_file.with_name("tinny.py"))
    refuse(load_config, missing, parts=[missing, str(config_file)])
    refuse(load_config, str(tmp_path), parts=[str(tmp_path)])
    refuse(load_config, f"{config_file}:studnt", parts=["'studnt'", "'student'"])
    refuse(load_config, f"{config_file}:student,teacher", parts=["student,teacher"])
    for body, part in (("", "get_config"), ("def get_config(arg): return {}", "ConfigDict")):
        config_file.write_text(body)
        refuse(load_config, str(config_file), parts=[str(config_file), part])


@pytest.mark.parametrize(
    ("body", "line", "part"),
    [
        ("\ndef get_config(arg)\n    return 1", 2, "SyntaxError"),
        ("import nowhere_to_be_found", 1, "nowhere_to_be_found"),
        ("def get_config(arg):\n    return 1 / 0", 2, "ZeroDivisionError"),
        ("def get_config(arg):\n    return int('x')", 2, "'x'"),
        ("raise SystemExit(3)", 1, "SystemExit"),
        # Raised in a library: its own line would not help.
        (CONFIG_FILE.replace("return c", "c.stpes = c.stpes + 1"), 12, "stpes"),
        (CONFIG_FILE.replace("STEPS,", "STEPS / 0,"), 9, "ZeroDivisionError"),
    ],
)
def test_an_error_in_a_config_file_names_its_line(config_file, body, line, part):
    config_file.write_text(body)
    refuse(load_config, str(config_file), parts=[str(config_file), f"line {line})", part])
