"""Requests of clients: what the server offers, the one check of a request's values, and refusals."""

import dataclasses
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.ranges import SEED
from ..core.schema import Kind, check, number, one_of, whole
from .engine import Job

PROMPT = 1000  # characters
IDS = whole(0, 2**53 - 1)  # what a browser counts exactly

# Styles by name; a prompt takes the place of the braces. Those with words that the text encoder of a model
# does not know are not offered for it.
STYLES = {
    "none": "{}",
    "photo": "{}, a photograph, natural light, sharp focus, 35mm",
    "painting": "{}, an oil painting, visible brush strokes, rich colours",
    "watercolour": "{}, a watercolour on rough paper, soft edges",
    "ink": "{}, an ink drawing, fine lines, white paper",
    "comic": "{}, a comic book panel, bold outlines, flat colours",
    "clay": "{}, a clay figure, studio light, soft shadows",
    "pixels": "{}, pixel art, few colours",
    "on red": "{} on red",
    "on blue": "{} on blue",
    "on yellow": "{} on yellow",
}

# What stands in the field of a new visitor: the first that the text encoder knows.
EXAMPLES = ("a tiny astronaut hatching from an egg on the moon", "a red 3 on blue")


class Refused(Exception):
    """A request that is not answered, and why.

    Attributes:
      code: a word for programs: frame, value, image, prompt, rate, busy, closing, host, origin, token, ...
      status: of HTTP.
    """

    def __init__(self, code: str, message: str, status: int = 400):
        super().__init__(message)
        self.code, self.status = code, status


@dataclasses.dataclass(frozen=True)
class Offer:
    """What can be asked of a server, all of it compiled.

    Attributes:
      sizes: (height, width) in pixels, the usual one first.
      steps: numbers of steps, the usual one first.
      guidance: CFG scale where none is asked for.
      styles: names in `STYLES`.
      prompt: an example.
      control: whether a control image can be given; photos: whether it may be a photo.
      brush: width of lines that control images should have, as a share of theirs.
    """

    sizes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    guidance: float
    styles: tuple[str, ...]
    prompt: str
    control: bool = False
    photos: bool = False
    brush: float = 0.0

    def describe(self) -> dict[str, Any]:
        """The same for clients, as JSON; sizes are WIDTHxHEIGHT there."""
        return dataclasses.asdict(self) | {"sizes": [name_size(size) for size in self.sizes]}

    def kinds(self) -> dict[str, Kind]:
        """Keys of a request, and what their values must be."""
        text = Kind(
            f"text of at most {PROMPT} characters in one line",
            lambda v: type(v) is str and len(v) <= PROMPT and not any(map(_is_odd, v)),
        )
        kinds = {
            "prompt": text,
            "style": one_of(*self.styles),
            "seed": SEED,
            "steps": one_of(*self.steps),
            "guidance": number(0, 30),
            "size": one_of(*map(name_size, self.sizes)),
        }
        if self.control:
            photo = ("photo",) if self.photos else ()
            kinds |= {"control_kind": one_of("sketch", *photo), "control_scale": number(0, 2)}
        return kinds

    def size(self, values: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) of a request's pictures."""
        sizes = {name_size(size): size for size in self.sizes}
        return sizes[values.get("size", next(iter(sizes)))]

    def job(
        self, values: Mapping[str, Any], index: int = 0, control: np.ndarray | None = None
    ) -> Job:
        """Picture number ``index`` of a request that `check_request` let through."""
        style = STYLES[values.get("style", "none")]
        return Job(
            prompt=style.replace("{}", values.get("prompt", "").strip()),
            seed=values.get("seed", 0),
            index=index,
            steps=values.get("steps", self.steps[0]),
            guidance=float(values.get("guidance", self.guidance)),
            size=self.size(values),
            control=control,
            control_kind=values.get("control_kind", "sketch"),
            control_scale=float(values.get("control_scale", 1.0)),
        )


def _is_odd(character: str) -> bool:
    """Whether it is a control character, or half of one that UTF-16 writes as two."""
    return unicodedata.category(character) in ("Cc", "Cs")


def name_size(size: tuple[int, int]) -> str:
    """Returns (height, width) as WIDTHxHEIGHT, the order of the images API."""
    return f"{size[1]}x{size[0]}"


def check_request(values: Any, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Refuses a request that is no JSON object, has an unknown key, or a value out of its range."""
    if not isinstance(values, dict):
        raise Refused("value", "a request is a JSON object")
    unknown = next((key for key in values if key not in kinds), None)
    if unknown is not None:
        known = ", ".join(kinds)
        raise Refused("value", f"unknown key {unknown[:40]!r}; known are {known}")
    try:
        check(values, kinds, "")
    except UserError as error:
        raise Refused("value", str(error)) from error
    return values
