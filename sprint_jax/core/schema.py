"""Kinds of values, and the one check of values by a table of kinds: configs, requests, other programs' JSON."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from .errors import UserError

LARGE = 2**1000


class Kind(NamedTuple):
    """A kind of value: ``says`` completes "must be ...", ``holds`` tells whether a value is of it."""

    says: str
    holds: Callable[[Any], bool]


def whole(low: int | None = None, high: int | None = None) -> Kind:
    """A whole number from ``low`` to ``high``, both included, NumPy's too; True and 1.0 are none."""
    inside = _range(low, high)
    return Kind(f"a whole number{inside.says}", lambda v: _is(v, Integral) and inside.holds(v))


def number(
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Kind:
    """A finite number from ``low`` to ``high``, or strictly ``above`` and ``below``."""
    inside = _range(low, high, above, below)

    def holds(value):
        # A whole number of a JSON file may be too large for a float.
        small = _is(value, Real) and (not isinstance(value, int) or abs(value) < LARGE)
        return small and math.isfinite(value) and inside.holds(value)

    return Kind(f"a number{inside.says}" if inside.says else "a finite number", holds)


def one_of(*values: Any) -> Kind:
    """One of the values; True is not 1."""
    says = ", ".join(map(repr, values))
    return Kind(
        f"one of {says}" if len(values) > 1 else says,
        lambda v: any(type(v) is type(each) and v == each for each in values),
    )


def several(kind: Kind, least: int = 0, most: int | None = None) -> Kind:
    """A list or tuple of so many values of one kind."""
    size = "" if most is None and not least else f"{least} to {most} of "
    size = f"{least} of " if least and least == most else size
    size = f"{least} or more of " if least and most is None else size

    def holds(value):
        if not isinstance(value, list | tuple) or len(value) < least:
            return False
        return (most is None or len(value) <= most) and all(map(kind.holds, value))

    return Kind(f"a list of {size}{kind.says}", holds)


def either(*kinds: Kind) -> Kind:
    """A value of one of the kinds."""
    return Kind(", or ".join(k.says for k in kinds), lambda v: any(kind.holds(v) for kind in kinds))


def optional(kind: Kind) -> Kind:
    """A value of a kind, or None."""
    return Kind(f"{kind.says}, or null", lambda v: v is None or kind.holds(v))


def check(
    values: Mapping[str, Any], kinds: Mapping[str, Kind], origin: str, exit_code: int = 1
) -> None:
    """Refuses the first value that is not of its kind; keys without a kind, and kinds without a key, pass.

    Args:
      origin: what stands before the key in the message, such as ``config.`` or ``FILE: ``.

    Raises:
      UserError: naming the key and its value.
    """
    for key, value in values.items():
        if key in kinds and not kinds[key].holds(value):
            message = f"{origin}{key}={_shown(value)} must be {kinds[key].says}"
            raise UserError(message, exit_code)


def with_floats(kind: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a dataclass, whole numbers that JAX cannot take, from 2^31 on, made floats where it has floats.

    Smaller ones stay, since other programs that read them back may want them whole.
    """
    real = {each.name for each in dataclasses.fields(kind) if each.type in (float, float | None)}
    return {
        name: float(value)
        if name in real and _is(value, int) and 2**31 <= abs(value) < LARGE
        else value
        for name, value in fields.items()
    }


def _shown(value: Any) -> str:
    """A value for a message; of a long one its first 80 letters, and no more of it is looked at."""
    text = ""
    for part in _parts(value):
        text += part
        if len(text) > 80:
            return f"{text[:80]}..."
    return text


def _parts(value: Any) -> Iterator[str]:
    """What Python prints for a value, part by part; it prints no whole numbers of some thousand digits."""
    if isinstance(value, int) and abs(value) >= LARGE:
        yield f"{'-' if value < 0 else ''}2^{value.bit_length()}"
    elif isinstance(value, str):
        yield repr(value[:100])
    elif isinstance(value, list | tuple | dict):
        begin, end = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
        yield begin
        for number, each in enumerate(value):
            yield ", " if number else ""
            yield from _parts(each)
            if isinstance(value, dict):
                yield ": "
                yield from _parts(value[each])
        yield end
    else:
        yield str(value)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _range(low=None, high=None, above=None, below=None) -> Kind:
    words = [f"of at least {low:g}" if high is None and low is not None else ""]
    words += [f"of at most {high:.10g}" if low is None and high is not None else ""]
    words += [f"from {low:g} to {high:.10g}" if None not in (low, high) else ""]
    words += [f"above {above:g}" if above is not None else ""]
    words += [f"below {below:g}" if below is not None else ""]
    says = " and ".join(word for word in words if word)

    def holds(value):
        inside = (low is None or value >= low) and (high is None or value <= high)
        return inside and (above is None or value > above) and (below is None or value < below)

    return Kind(says and f" {says}", holds)


TEXT = Kind("text", lambda v: type(v) is str)
FLAG = Kind("true or false", lambda v: type(v) is bool)
_SCHEME = r"[A-Za-z][\w+.-]*:/"
# A path on this machine or a hub id; another scheme would name a folder called "https:".
LOCAL = Kind(
    "a path on this machine",
    lambda v: type(v) is str and "\0" not in v and not re.match(_SCHEME, v),
)
PLACE = Kind(
    "a path on this machine, gs://BUCKET/PATH or s3://BUCKET/PATH",
    lambda v: type(v) is str and (LOCAL.holds(v) or re.match(r"(gs|s3)://[\w.-]+(/[^\0]*)?$", v)),
)
