"""Configs: Python files with ``get_config(arg)``, and typed overrides of their keys.

A config file returns an ``ml_collections.ConfigDict`` whose values are bool, int, float, str, None,
tuples (or lists) of those, or nested ConfigDicts::

    def get_config(arg=None):
        stage, size = parse_arg(arg, ("teacher", "student"), ("full", "small"))
        ...

``configs/digits.py:teacher,small`` calls ``get_config("teacher,small")``. The folder that holds
``configs/`` is importable meanwhile, so a file may start with ``from configs import default``.
"""

import contextlib
import difflib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from .errors import UserError
from .ranges import check_ranges

KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple: "a comma list such as 2,4",
}


class Config(FrozenConfigDict):
    """A read-only config that JSON can hold: ``Config(json.loads(text))`` gives it back.

    Keys are attributes or items, ``config.optimizer.name`` or ``config["optimizer"]``, and a section
    unpacks: ``Model(**config.model)``. Lists become tuples.

    Raises:
      UserError: for a value of no supported type, or out of its range in `core.ranges`.
    """

    def __init__(self, values: Mapping[str, Any] | ConfigDict):
        values = _checked(values, "")
        check_ranges(flatten(values))
        super().__init__(values)

    def override(self, overrides: Mapping[str, Any] | Sequence[str]) -> "Config":
        """Returns a copy with some leaves replaced, each by a value of the type it had.

        Args:
          overrides: ``{"a.b": value}`` or ``["--config.a.b=value", ...]``. Text is parsed by the type of
            the old value: true/false, 3, 1e-4, words, 2,4 for a tuple.

        Raises:
          UserError: exit code 2, naming an unknown key and the nearest one, or a wrong value.
        """
        if not isinstance(overrides, Mapping):
            overrides = dict(map(_split_word, overrides))
        leaves, values = flatten(self), ConfigDict(self.to_dict())
        for name, value in overrides.items():
            if name not in leaves:
                inside = [leaf for leaf in leaves if leaf.startswith(f"{name}.")]
                hint = f" is a section: set one of {', '.join(inside)}" if inside else ""
                hint = hint or f" is not in the config{_nearest(name, leaves)}"
                raise UserError(f"config key {name!r}{hint}", exit_code=2)
            old = leaves[name]
            try:
                new = _parse(value, old) if isinstance(value, str) else value
                # ml_collections takes a bool for an int, and None for anything.
                if isinstance(new, bool | None) and not isinstance(old, type(new) | None):
                    raise TypeError
                values.update_from_flattened_dict({name: new})
            except (TypeError, ValueError, OverflowError):
                kind = KINDS[type(old)]
                message = f"--config.{name}={value} must be {kind}, as {old!r} is"
                raise UserError(message, exit_code=2) from None
        return Config(values)


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a nested config by their dotted names."""
    leaves = {}
    for key, value in config.items():
        section = isinstance(value, Mapping | ConfigDict)
        leaves |= flatten(value, f"{prefix}{key}.") if section else {f"{prefix}{key}": value}
    return leaves


def diff(a: Mapping[str, Any] | ConfigDict, b: Mapping[str, Any] | ConfigDict) -> list[str]:
    """Returns the dotted names of the leaves that differ or stand in only one of the two, sorted."""
    old, new = flatten(Config(a)), flatten(Config(b))
    both = old.keys() & new.keys()
    return sorted((old.keys() ^ new.keys()) | {name for name in both if old[name] != new[name]})


def load_config(spec: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Loads ``path.py`` or ``path.py:arg`` and applies overrides; ``configs/X.py`` also from elsewhere.

    Args:
      spec: the file, and what to pass to its ``get_config`` after a colon (None when absent).
      overrides: as `Config.override` takes them.

    Raises:
      UserError: exit code 2 for a missing file, one that fails (naming its line), a file without
        ``get_config``, an ``arg`` that it refuses (it raises ValueError), and for wrong overrides.
    """
    name, colon, arg = spec.partition(":")
    get_config = getattr(_run_file(spec), "get_config", None)
    if not callable(get_config):
        raise UserError(f"{name} defines no function get_config(arg)", exit_code=2)
    with _errors_of(spec):
        values = get_config(arg if colon else None)
    if not isinstance(values, ConfigDict):
        message = f"{name}: get_config must return an ml_collections.ConfigDict, not {values!r:.80}"
        raise UserError(message, exit_code=2)
    return Config(values).override(overrides)


def load_functions(spec: str, prefix: str) -> dict[str, Callable]:
    """Returns the functions of a config file whose names start with ``prefix``, by the rest of the name."""
    members = vars(_run_file(spec))
    found = [name for name in members if name.startswith(prefix) and callable(members[name])]
    return {name.removeprefix(prefix): members[name] for name in found}


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
    chosen = [[word for word in words if word in group] or [group[0]] for group in groups]
    for group, mine in zip(groups, chosen, strict=True):
        if len(mine) > 1:
            raise UserError(f"choose one of {', '.join(group)}, not {arg!r}", exit_code=2)
    return tuple(mine[0] for mine in chosen)


def _run_file(spec: str) -> ModuleType:
    """Runs the file of ``FILE.py:WORDS`` and returns it as a module."""
    if "://" in spec:
        raise UserError(f"--config={spec}: config files are run: copy it to this machine first", 2)
    name = spec.partition(":")[0]
    path = Path(name)
    shipped = Path(__file__).parents[2] / path
    if path.parts[:1] == ("configs",) and not path.is_file() and shipped.is_file():
        path = shipped  # of the checkout or the installed package, wherever the command runs
    if path.suffix != ".py" or not path.is_file():
        nearest = _nearest(name, map(str, path.parent.glob("*.py")))
        raise UserError(f"--config={spec}: there is no config file {name}{nearest}", exit_code=2)
    module_spec = importlib.util.spec_from_file_location(f"sprint_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    parent = str(path.resolve().parent.parent)
    sys.path.insert(0, parent)
    try:
        with _errors_of(spec):
            module_spec.loader.exec_module(module)
    finally:
        sys.path.remove(parent)
    return module


@contextlib.contextmanager
def _errors_of(spec: str) -> Iterator[None]:
    """Turns whatever a config file raises into one line that names the file's line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of a file that anybody may have written
        path = spec.partition(":")[0]
        if isinstance(error, SyntaxError):
            file, line = error.filename or path, error.lineno
        else:
            # The last line of the file or of its neighbours, not of a library that it called.
            folder, frames = Path(path).resolve().parent, traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if Path(f.filename).resolve().is_relative_to(folder)]
            file, line = (own or frames)[-1].filename, (own or frames)[-1].lineno
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "  # a refusal
        message = " ".join(f"--config={spec}: {kind}{error} ({file}, line {line})".split())
        raise UserError(message, exit_code=2) from error


def _checked(values: Mapping[str, Any] | ConfigDict, prefix: str) -> dict[str, Any]:
    """Returns nested dicts with tuples for lists; UserError for a value that JSON cannot hold."""
    result = {}
    for key, value in values.items():
        if isinstance(value, Mapping | ConfigDict):
            result[key] = _checked(value, f"{prefix}{key}.")
            continue
        result[key] = tuple(value) if isinstance(value, list) else value
        for element in result[key] if isinstance(result[key], tuple) else [value]:
            if type(element) not in (bool, int, float, str, type(None)):
                message = "must be a bool, int, float, str, None or a tuple of them"
                raise UserError(f"config key '{prefix}{key}' {message}, not {value!r:.80}", 2)
    return result


def _split_word(word: str) -> tuple[str, str]:
    flag, equals, value = word.partition("=")
    if not equals or not flag.startswith("--config."):
        raise UserError(f"{word} must have the form --config.key=value", exit_code=2)
    return flag.removeprefix("--config."), value


def _parse(text: str, old: Any) -> Any:
    """Returns what ``text`` says, of the type of ``old``; ValueError if it says nothing of that type."""
    if isinstance(old, str):
        return text
    if isinstance(old, tuple):
        # (1, 0.5) holds floats, whatever stands first.
        like = next((x for x in old if isinstance(x, float)), old[0] if old else None)
        parts = [part.strip() for part in text.strip("()[] ").split(",")]
        return tuple(_parse(part, like) for part in (parts if parts[-1] else parts[:-1]))
    if isinstance(old, bool):
        return ("false", "true").index(text.lower()) == 1
    if old is not None:
        number = type(old)(text)
        if math.isnan(number):
            raise ValueError
        return number
    for kind in (int, float):  # a key without a type: the narrowest that fits
        try:
            return kind(text)
        except ValueError:
            continue
    return None if text == "none" else text


def _nearest(word: str, known: Iterable[str]) -> str:
    """Returns ``", nearest is 'x'"`` for an error message; empty if there is nothing to choose from."""
    known = list(known)
    # A right last part under a wrong section is nearer than any misspelling.
    same = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    found = difflib.get_close_matches(word, same or known, n=1, cutoff=0.0)
    return f", nearest is {found[0]!r}" if found else ""
