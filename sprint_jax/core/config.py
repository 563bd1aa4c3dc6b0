"""Configs: Python files with ``get_config(arg)``, typed overrides, and a record of what was read.

A config file returns an ``ml_collections.ConfigDict`` whose values are bool, int, float, str, None,
tuples (or lists) of those, or nested ConfigDicts::

    def get_config(arg=None):
        stage, size = parse_arg(arg, ("teacher", "student"), ("full", "small"))
        ...

``configs/digits.py:teacher,small`` calls ``get_config("teacher,small")``. The folder that holds
``configs/`` is importable meanwhile, so a file may start with ``from configs import default``.
"""

import difflib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from .errors import UserError

_SCALARS = (bool, int, float, str, type(None))


class Config:
    """Read-only nested configuration that remembers which leaves were read.

    Keys are attributes or items: ``config.optimizer.name``, ``config["optimizer"]``. A section is a
    mapping, so ``Model(**config.model)`` works and counts as reading its leaves. Sections share the
    record of the config they were taken from.
    """

    def __init__(self, values: Mapping[str, Any]):
        """Builds a config from a nested mapping, such as `to_dict` gives; lists become tuples.

        Raises:
          UserError: for a key that cannot be an attribute, or a value of no supported type.
        """
        if isinstance(values, Config):
            values = values.to_dict()
        self._set(ConfigDict(_checked(values, "")).lock(), "", set())

    def _set(self, values: ConfigDict, prefix: str, read: set[str]) -> None:
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "_read", read)

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            name = self._prefix + key
            nearest = _nearest(name, [self._prefix + leaf for leaf, _ in _leaves(self._values)])
            raise KeyError(f"config has no key {name!r}{nearest}")
        value = self._values[key]
        if isinstance(value, ConfigDict):
            section = object.__new__(Config)
            section._set(value, f"{self._prefix}{key}.", self._read)
            return section
        self._read.add(self._prefix + key)
        return value

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        try:
            return self[key]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"config is read-only: use config.override({{{key!r}: {value!r}}})")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.to_dict() == other.to_dict()

    __hash__ = None

    def __repr__(self) -> str:
        return f"Config({self.to_dict()!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.to_dict(), "prefix": self._prefix, "read": sorted(self._read)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        values = ConfigDict(_checked(state["values"], "")).lock()
        self._set(values, state["prefix"], set(state["read"]))

    def keys(self) -> list[str]:
        """This section's keys; reading the names reads no value."""
        return list(self._values)

    def unread(self) -> list[str]:
        """Dotted names of the leaves that nobody has read yet, sorted."""
        names = {self._prefix + leaf for leaf, _ in _leaves(self._values)}
        return sorted(names - self._read)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold (tuples become lists); does not count as reading."""
        return _plain(self._values)

    def override(self, overrides: Mapping[str, Any] | Sequence[str]) -> "Config":
        """A copy with some leaves replaced, each by a value of the type it had; nothing read yet.

        Args:
          overrides: ``{"a.b": value}`` or ``["--config.a.b=value", ...]``. Text is parsed by the
            type of the old value: true/false, 3, 1e-4, words, 2,4 for a tuple.

        Raises:
          UserError: exit code 2, naming an unknown key and the nearest one, or a wrong value.
        """
        values = ConfigDict(_checked(self.to_dict(), ""))
        for name, value in _pairs(overrides):
            _replace(values, name, value)
        return Config(values.to_dict())


def load_config(spec: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Loads ``path.py`` or ``path.py:arg`` and applies overrides.

    Args:
      spec: the file, and what to pass to its ``get_config`` after a colon (None when absent).
      overrides: as `Config.override` takes them.

    Returns:
      The resolved config.

    Raises:
      UserError: exit code 2 for a missing file, a file without ``get_config``, an ``arg`` that it
        refuses (it raises ValueError), and for wrong overrides.
    """
    name, colon, arg = spec.partition(":")
    get_config = getattr(_run_file(spec), "get_config", None)
    if not callable(get_config):
        raise UserError(f"{name} defines no function get_config(arg)", exit_code=2)
    try:
        values = get_config(arg if colon else None)
    except ValueError as error:
        raise UserError(f"--config={spec}: {error}", exit_code=2) from error
    if not isinstance(values, ConfigDict):
        message = f"{name}: get_config must return an ml_collections.ConfigDict, not {values!r:.80}"
        raise UserError(message, exit_code=2)
    return Config(values.to_dict()).override(overrides)


def load_functions(spec: str, prefix: str) -> dict[str, Callable]:
    """The functions of a config file whose names start with ``prefix``, by the rest of the name.

    Raises:
      UserError: exit code 2 for a missing file.
    """
    members = vars(_run_file(spec)).items()
    return {
        name.removeprefix(prefix): member
        for name, member in members
        if name.startswith(prefix) and callable(member)
    }


def parse_arg(arg: str | None, *groups: Sequence[str]) -> tuple[str, ...]:
    """Reads a config file's ``arg``, a comma list with at most one word of each group.

    Args:
      arg: such as ``"student,small"``, in any order, or None.
      groups: the words to choose from; the first of a group stands when none is given.

    Returns:
      One word per group: ``parse_arg("small", ("teacher", "student"), ("full", "small"))`` is
      ``("teacher", "small")``.

    Raises:
      UserError: for a word of no group, or two of the same group.
    """
    words = [word.strip() for word in (arg or "").split(",") if word.strip()]
    known = [word for group in groups for word in group]
    for word in words:
        if word not in known:
            raise UserError(f"unknown word {word!r}{_nearest(word, known)}", exit_code=2)
    chosen = []
    for group in groups:
        mine = [word for word in words if word in group]
        if len(mine) > 1:
            raise UserError(f"choose one of {', '.join(group)}, not {arg!r}", exit_code=2)
        chosen.append(mine[0] if mine else group[0])
    return tuple(chosen)


def diff(a: Config | Mapping[str, Any], b: Config | Mapping[str, Any]) -> list[str]:
    """Dotted names of the leaves that differ or stand in only one of the two, sorted."""
    old, new = (dict(_leaves(Config(config)._values)) for config in (a, b))
    absent = object()
    names = old.keys() | new.keys()
    return sorted(name for name in names if old.get(name, absent) != new.get(name, absent))


def _run_file(spec: str) -> ModuleType:
    """Runs the file of ``FILE.py:WORDS`` and gives it as a module."""
    name = spec.partition(":")[0]
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        found = sorted(str(other) for other in path.parent.glob("*.py"))
        nearest = _nearest(name, found)
        raise UserError(f"--config={spec}: there is no config file {name}{nearest}", exit_code=2)
    module_spec = importlib.util.spec_from_file_location(f"sprint_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    parent = str(path.resolve().parent.parent)
    sys.path.insert(0, parent)
    try:
        module_spec.loader.exec_module(module)
    finally:
        sys.path.remove(parent)
    return module


def _checked(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested plain dicts with tuples for lists, refusing what JSON or attributes cannot hold."""
    result = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or not key.isidentifier() or key.startswith("_"):
            raise UserError(f"config key {name!r} must be a name", exit_code=2)
        if hasattr(Config, key):
            raise UserError(f"config key {name!r} is a method of Config: rename it", exit_code=2)
        if isinstance(value, Mapping | ConfigDict):
            value = _checked(value, f"{name}.")
        elif isinstance(value, tuple | list):
            value = tuple(value)
        elements = value if isinstance(value, tuple) else (value,)
        if not isinstance(value, dict) and not all(type(x) in _SCALARS for x in elements):
            message = (
                f"config key {name!r} must be a bool, int, float, str, None or a tuple of them"
            )
            raise UserError(f"{message}, not {value!r:.80}", exit_code=2)
        result[key] = value
    return result


def _leaves(values: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _nearest(word: str, known: Sequence[str]) -> str:
    """``", nearest is 'x'"`` for an error message; empty if there is nothing to choose from."""
    # A right last part under a wrong section is nearer than any misspelling.
    same = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    found = difflib.get_close_matches(word, same or known, n=1, cutoff=0.0)
    return f", nearest is {found[0]!r}" if found else ""


def _pairs(overrides: Mapping[str, Any] | Sequence[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for word in overrides:
        flag, equals, value = word.partition("=")
        if not equals or not flag.startswith("--config."):
            raise UserError(f"{word} must have the form --config.key=value", exit_code=2)
        yield flag.removeprefix("--config."), value


def _replace(values: ConfigDict, name: str, value: Any) -> None:
    """Sets the leaf with the dotted ``name``, in place."""
    *sections, last = name.split(".")
    section = values
    for key in sections:
        section = section.get(key) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or last not in section:
        nearest = _nearest(name, [leaf for leaf, _ in _leaves(values)])
        raise UserError(f"config has no key {name!r}{nearest}", exit_code=2)
    old = section[last]
    if isinstance(old, ConfigDict):
        message = f"config key {name!r} is a section: set one of {', '.join(old)} in it"
        raise UserError(message, exit_code=2)
    try:
        new = _convert(value, old)
    except ValueError:
        message = f"--config.{name}={value} must be {_type_name(old)}, as {old!r} is"
        raise UserError(message, exit_code=2) from None
    with section.ignore_type():  # only for a leaf that was None
        section[last] = new


def _convert(value: Any, old: Any) -> Any:
    """``value`` (text, or already an object) with the type of ``old``; ValueError if it has not."""
    if old is None:
        return _parse_any(value) if isinstance(value, str) else value
    if isinstance(old, tuple):
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("()[] ").split(",")]
            value = value[:-1] if value[-1] == "" else value
        if not isinstance(value, tuple | list):
            raise ValueError
        if not old:
            return tuple(_parse_any(x) if isinstance(x, str) else x for x in value)
        # (1, 0.5) holds floats, whatever stands first.
        like = next((x for x in old if isinstance(x, float)), old[0])
        return tuple(_convert(x, like) for x in value)
    if isinstance(value, str) and not isinstance(old, str):
        return _parse(value, type(old))
    if type(value) is int and isinstance(old, float):
        return float(value)
    if type(value) is not type(old):
        raise ValueError
    return value


def _parse(text: str, wanted: type) -> Any:
    if wanted is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    number = wanted(text)
    if math.isnan(number):
        raise ValueError
    return number


def _parse_any(text: str) -> Any:
    """Text for a leaf whose default is None or an empty tuple: the narrowest type that fits."""
    if text.lower() in ("none", "null"):
        return None
    for wanted in (bool, int, float):
        try:
            return _parse(text, wanted)
        except ValueError:
            continue
    return text


def _type_name(value: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if isinstance(value, tuple):
        return "a comma list such as 2,4"
    return names[type(value)]
