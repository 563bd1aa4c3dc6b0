"""sprint_jax/config.py: files, arguments, typed overrides, the record of what was read."""

import json
import pickle

import pytest
from ml_collections import ConfigDict

from sprint_jax.core.config import Config, diff, load_config, parse_arg
from sprint_jax.core.errors import UserError

VALUES = {
    "steps": 100,
    "rate": 1e-3,
    "resume": True,
    "teacher": "",
    "limit": None,
    "mesh": (1, -1),
    "betas": (0.9, 1),
    "empty": (),
    "model": {"depth": 4, "norm": {"eps": 1e-6}, "kind": "linear"},
}

CONFIG_FILE = '''
"""A config for the tests."""
from ml_collections import ConfigDict
from sprint_jax.config import parse_arg

def get_config(arg=None):
    stage, size = parse_arg(arg, ("teacher", "student"), ("full", "small"))
    return ConfigDict({"stage": stage, "steps": 10 if size == "small" else 1000,
                       "model": {"depth": 2, "mlp": [2, 4]}})
'''


@pytest.fixture
def config() -> Config:
    return Config(VALUES)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "settings" / "tiny.py"
    path.parent.mkdir()
    path.write_text(CONFIG_FILE)
    return path


def refusal(call, *args) -> str:
    """The message of the `UserError` that the call raises, which must be one line of usage."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    return message


def test_access_by_attribute_item_and_unpacking(config):
    assert config.model.norm.eps == config["model"]["norm"]["eps"] == 1e-6
    assert dict(**config.model.norm) == {"eps": 1e-6}
    assert config.mesh == (1, -1)
    assert "depth" in config.model and "depht" not in config.model
    assert sorted(config) == sorted(config.keys()) == sorted(VALUES)


def test_missing_key_names_the_nearest(config):
    with pytest.raises(AttributeError, match=r"'model\.depht', nearest is 'model\.depth'"):
        _ = config.model.depht
    with pytest.raises(KeyError, match="nearest is 'steps'"):
        _ = config["stesp"]
    assert getattr(config, "stesp", None) is None


def test_read_only(config):
    with pytest.raises(AttributeError, match="read-only"):
        config.steps = 3
    assert config.steps == 100


def test_unread_lists_exactly_the_leaves_nobody_read():
    config = Config({"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}})
    assert config.unread() == ["a", "b.c", "b.d.e", "b.d.f"]
    section = config.b
    _ = "c" in section, section.keys(), len(section), config.to_dict(), repr(config), config == 1
    assert config.unread() == ["a", "b.c", "b.d.e", "b.d.f"]
    _ = section.d.e
    assert config.unread() == ["a", "b.c", "b.d.f"]
    assert section.unread() == ["b.c", "b.d.f"]
    _ = dict(**section.d), config["a"]
    assert config.unread() == ["b.c"]


def test_json_round_trip_keeps_values_and_types(config):
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = Config(json.loads(text))
    assert again == config and diff(again, config) == []
    assert again.mesh == (1, -1) and isinstance(again.rate, float) and again.limit is None
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and copy.unread() == config.unread()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "7", 7),
        ("steps", "-7", -7),
        ("rate", "2", 2.0),
        ("rate", "1e-4", 1e-4),
        ("rate", "inf", float("inf")),
        ("resume", "false", False),
        ("resume", "True", True),
        ("teacher", "runs/a=b,c", "runs/a=b,c"),
        ("teacher", "", ""),
        ("limit", "3", 3),
        ("limit", "none", None),
        ("limit", "some words", "some words"),
        ("mesh", "2,4", (2, 4)),
        ("mesh", "(2, 4)", (2, 4)),
        ("mesh", "8,", (8,)),
        ("mesh", "", ()),
        ("betas", "0,1e-2", (0.0, 0.01)),
        ("empty", "1,b", (1, "b")),
        ("model.norm.eps", "1", 1.0),
    ],
)
def test_override_by_text(config, key, text, value):
    changed = config.override([f"--config.{key}={text}"])
    section = changed
    for part in key.split("."):
        section = section[part]
    assert section == value and type(section) is type(value)
    if isinstance(value, tuple):
        assert [type(x) for x in section] == [type(x) for x in value]
    assert diff(config, changed) == ([] if config.to_dict() == changed.to_dict() else [key])
    assert config == Config(VALUES), "the original must not change"


def test_override_by_object(config):
    changed = config.override({"steps": 5, "rate": 1, "mesh": [8, 1], "resume": "false"})
    assert (changed.steps, changed.rate, changed.mesh, changed.resume) == (5, 1.0, (8, 1), False)
    assert isinstance(changed.rate, float)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("steps", "1.5", "an integer"),
        ("steps", "many", "an integer"),
        ("steps", True, "an integer"),
        ("rate", "fast", "a number"),
        ("rate", "nan", "a number"),
        ("resume", "1", "true or false"),
        ("resume", 1, "true or false"),
        ("teacher", 3, "text"),
        ("mesh", "2,x", "comma list"),
        ("mesh", "2.5,4", "comma list"),
        ("mesh", 3, "comma list"),
    ],
)
def test_wrong_type_names_key_value_and_type(config, key, value, wanted):
    message = refusal(config.override, {key: value})
    assert f"--config.{key}={value}" in message and wanted in message


def test_unknown_key_names_the_nearest_real_key(config):
    assert "nearest is 'steps'" in refusal(config.override, ["--config.stpes=1"])
    assert "nearest is 'model.depth'" in refusal(config.override, ["--config.depth=1"])
    assert "nearest is 'model.norm.eps'" in refusal(config.override, ["--config.model.nrom.eps=1"])
    assert "'steps.more'" in refusal(config.override, ["--config.steps.more=1"])
    assert "is a section: set one of" in refusal(config.override, ["--config.model=1"])
    assert "--config.key=value" in refusal(config.override, ["--config.steps"])


@pytest.mark.parametrize(
    "values", [{"a-b": 1}, {"to_dict": 1}, {"_a": 1}, {"a": object()}, {"a": [[1]]}, {1: 2}]
)
def test_refuses_what_json_or_attributes_cannot_hold(values):
    assert "config key" in refusal(Config, values)


def test_load_config_with_argument_and_overrides(config_file):
    full = load_config(str(config_file))
    assert (full.stage, full.steps, full.model.mlp) == ("teacher", 1000, (2, 4))
    words = ["--config.model.depth=9", "--config.model.mlp=1,1"]
    small = load_config(f"{config_file}:small,student", words)
    assert (small.stage, small.steps, small.model.depth) == ("student", 10, 9)
    assert diff(full, small) == ["model.depth", "model.mlp", "stage", "steps"]
    assert diff({"a": 1}, {"b": 1}) == ["a", "b"]


def test_load_config_names_what_is_wrong(config_file, tmp_path):
    missing = refusal(load_config, str(config_file.with_name("tinny.py")))
    assert "tinny.py" in missing and f"nearest is '{config_file}'" in missing
    assert "no config file" in refusal(load_config, str(tmp_path))
    assert "nearest is 'student'" in refusal(load_config, f"{config_file}:studnt")
    assert "choose one of teacher, student" in refusal(
        load_config, f"{config_file}:student,teacher"
    )
    config_file.write_text("import ml_collections\n")
    assert "get_config" in refusal(load_config, str(config_file))
    config_file.write_text("def get_config(arg=None):\n    return {'a': 1}\n")
    assert "ConfigDict" in refusal(load_config, str(config_file))


def test_bug_in_a_config_file_keeps_its_own_exception(config_file):
    config_file.write_text("def get_config(arg=None):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_config(str(config_file))


def test_config_file_may_import_its_neighbours(config_file):
    config_file.with_name("base.py").write_text("STEPS = 12\n")
    config_file.write_text(
        "from ml_collections import ConfigDict\nfrom settings.base import STEPS\n"
        "def get_config(arg=None):\n    return ConfigDict({'steps': STEPS})\n"
    )
    assert load_config(str(config_file)).steps == 12


def test_references_in_a_config_are_resolved(config_file):
    config_file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n"
        "    config = ConfigDict({'a': 2})\n"
        "    config.b = config.get_ref('a') * 3\n"
        "    return config\n"
    )
    assert load_config(str(config_file)).to_dict() == {"a": 2, "b": 6}


def test_parse_arg():
    stages, sizes = ("teacher", "student"), ("full", "small")
    assert parse_arg(None, stages, sizes) == ("teacher", "full")
    assert parse_arg("small", stages, sizes) == ("teacher", "small")
    assert parse_arg(" small , student", stages, sizes) == ("student", "small")


def test_config_dict_is_accepted():
    assert Config(ConfigDict({"a": {"b": (1, 2)}})).a.b == (1, 2)
