"""Protocols: all that a number about pictures depends on, as values that are printed and stored with it."""

import itertools
from typing import Any, NamedTuple

from ..core.errors import UserError
from ..core.files import differences
from . import preprocess
from .preprocess import View


class Protocol(NamedTuple):
    """The choices of a reference implementation.

    Attributes:
      inception, dinov2, cmmd, clip: how each network sees a picture.
      format: of pictures that `evaluate` draws itself: 'png', or 'jpeg 75' with its quality; None for others.
      openai_text: sentences are cleaned as OpenAI's package does, else as transformers does.
      clip_floor: a mean CLIP score below 0 counts as 0, as in torchmetrics.
      kid_subsets, kid_size: random subsets of KID and their pictures; kid_seed draws them.
      neighbours: k of precision, recall, density and coverage.
    """

    name: str
    inception: View
    format: str | None
    openai_text: bool
    clip_floor: bool
    dinov2: View = preprocess.DINOV2
    cmmd: View = preprocess.CMMD
    clip: View = preprocess.clip_view()
    kid_subsets: int = 100
    kid_size: int = 1000
    kid_seed: int = 2020
    neighbours: int = 3


# SANA's scripts: torchvision saves JPEG of quality 75; pytorch-fid behind a resize to 512; OpenAI's CLIP.
# clean-fid and torch-fidelity have no CLIP score: those of SANA and torchmetrics stand in.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("sana", preprocess.INCEPTION_SANA, "jpeg 75", True, False),
        Protocol("clean-fid", preprocess.INCEPTION_CLEAN, "png", True, False, neighbours=5),
        Protocol(
            "torch-fidelity",
            preprocess.INCEPTION_FIDELITY,
            "png",
            False,
            True,
            clip=preprocess.clip_view(shape="short side, floor"),
        ),
    )
}


def describe(protocol: Protocol, used: set[str], **found: Any) -> dict[str, Any]:
    """Returns a JSON-able protocol with the views of the networks that were used, and what was ``found``.

    Args:
      found: ``weights`` and ``networks`` by network, their fingerprints and fields; ``reference`` and
        ``prompts``, hashes or None; and what else the numbers depend on.
    """
    fields = protocol._asdict()
    views = {name: _plain(fields.pop(name)) for name in ("inception", "dinov2", "cmmd", "clip")}
    return fields | {"views": {name: views[name] for name in sorted(used & set(views))}} | found


def _plain(view: View) -> dict[str, Any]:
    resizes = [step._asdict() for step in view.resizes]
    return {"resizes": resizes, "mean": list(view.mean), "std": list(view.std)}


def check_same(reports: dict[str, dict[str, Any]]) -> None:
    """Refuses reports that no common table can hold.

    A network, reference or prompts that only one of two reports used are no difference.

    Args:
      reports: by name; each has a ``protocol`` of `describe`.

    Raises:
      UserError: naming two reports and the first thing in which their protocols differ.
    """
    # All pairs: what the first lacks, two others may have and differ in.
    for (first, base), (name, report) in itertools.combinations(reports.items(), 2):
        pair = _shared(base["protocol"], report["protocol"])
        for key, one, two in differences(*pair):
            where = f"protocol.{key} is {one!r} there and {two!r} here"
            raise UserError(f"{first} and {name} cannot be compared: {where}")


def _shared(one: dict[str, Any], two: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    one, two = dict(one), dict(two)
    for key in ("reference", "prompts"):
        if None in (one.get(key), two.get(key)):
            one[key] = two[key] = None
    for key in ("views", "weights", "networks"):
        both = one.get(key, {}).keys() & two.get(key, {}).keys()
        one[key], two[key] = ({name: each[key][name] for name in both} for each in (one, two))
    return one, two
