"""Pictures that a model draws for many prompts: each once, shared by processes, gone on with after any stop."""

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from ..core.errors import UserError
from ..core.files import differences, read_json, write_atomic, write_json_atomic
from ..core.fingerprint import digest
from ..core.progress import Progress
from ..core.storage import AnyPath, in_bucket, make_folder, walk
from .geneval_prompts import Request
from .pictures import is_picture

RECORD = "drawn.json"


class Plan(NamedTuple):
    """Pictures to draw: their ``names`` without an ending, and their ``prompts``, one for each."""

    names: list[str]
    prompts: list[str]


def plan_prompts(prompts: dict[str, str] | list[str], each: int = 1) -> Plan:
    """Plans ``each`` pictures of each prompt: 00000 ..., or KEY for prompts that have keys (MJHQ's layout)."""
    if isinstance(prompts, list):
        return Plan(
            _numbers(len(prompts) * each), [prompt for prompt in prompts for _ in range(each)]
        )
    pairs = sorted(prompts.items())
    if each == 1:
        return Plan([key for key, _ in pairs], [prompt for _, prompt in pairs])
    names = [f"{key}/{number}" for key, _ in pairs for number in _numbers(each)]
    return Plan(names, [prompt for _, prompt in pairs for _ in range(each)])


def _numbers(count: int) -> list[str]:
    """Returns 00000 ... in digits enough that their order is that of the numbers."""
    width = max(5, len(str(count - 1)))
    return [f"{number:0{width}d}" for number in range(count)]


def plan_geneval(requests: Sequence[Request], each: int = 4) -> Plan:
    """Plans GenEval's pictures where its own scripts look for them: 00000/samples/00000 ..."""
    samples = _numbers(each)
    names = [f"{n}/samples/{k}" for n in _numbers(len(requests)) for k in samples]
    return Plan(names, [request["prompt"] for request in requests for _ in range(each)])


def write_geneval_metadata(folder: AnyPath, requests: Sequence[Request]) -> None:
    """Writes the metadata.jsonl that GenEval's scripts want beside each folder of samples."""
    for number, request in enumerate(requests):
        make_folder(folder / f"{number:05d}")
        write_atomic(folder / f"{number:05d}" / "metadata.jsonl", json.dumps(request).encode())


def options(base: Any) -> dict[str, Any]:
    """Returns the fields of a `pipeline.Request` that pictures depend on."""
    others = ("image", "first", "batch_size")
    return {key: value for key, value in vars(base).items() if key not in others}


def draw(
    plan: Plan, folder: AnyPath, pipe: Any, base: Any, format: str, about: dict, peers: Any = None
) -> None:
    """Draws the pictures of a plan that are not there yet.

    Picture i depends on (seed, i) and its prompt alone, so that any number of processes, and any stops,
    make the same pictures. Batch n is that of process ``n % processes``. Every process must call it.

    Args:
      folder: of the pictures; seen by all processes.
      pipe: a `pipeline.SprintPipeline`.
      base: a `pipeline.Request` with all options; ``batch_size`` pictures are drawn at once.
      format: 'png', or 'jpeg QUALITY'.
      about: JSON-able, the model and all that pictures of it depend on; with the request it is kept in
        `RECORD`.

    Raises:
      UserError: the folder holds pictures of another model, request or prompts, or of unknown origin.
    """
    kind, _, quality = format.partition(" ")
    ending, how = ("jpg", {"quality": int(quality)}) if kind == "jpeg" else ("png", {})
    record = about | {"request": options(base), "format": format, "prompts": digest(list(plan))}
    make_folder(folder)
    names = [f"{name}.{ending}" for name in plan.names]
    there = _files(folder)
    _check_record(folder, record)
    _check_files(folder, there, set(names))
    if peers is not None:
        peers.meet("drawing/checked")
    write_json_atomic(folder / RECORD, record)
    if peers is not None:
        peers.meet("drawing/recorded")  # no picture is there before the record
    starts = range(0, len(names), base.batch_size)[jax.process_index() :: jax.process_count()]
    rows = [range(start, min(start + base.batch_size, len(names))) for start in starts]
    todo = [each for each in rows if not {names[i] for i in each} <= there]
    total, done = sum(map(len, rows)), sum(map(len, rows)) - sum(map(len, todo))
    with Progress(total, done, unit="picture") as progress:
        for each in todo:
            request = dataclasses.replace(base, first=each[0])
            prompts = [plan.prompts[i] for i in each]
            pictures = (picture for batch in pipe.draw(prompts, request) for picture in batch)
            for i, picture in zip(each, pictures, strict=True):
                path = folder / names[i]
                make_folder(path.parent)
                write_atomic(path, _encode(picture, kind, how))
                done += 1
                progress.update(done)
            if peers is not None:
                peers.at_step(done)
    if peers is not None:
        peers.meet("drawing/drawn")


def _encode(picture: np.ndarray, kind: str, how: dict[str, int]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, kind, **how)
    return content.getvalue()


def _files(folder: AnyPath) -> set[str]:
    if in_bucket(folder):
        return set(walk(folder))
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}


def _check_record(folder: AnyPath, record: dict[str, Any]) -> None:
    if not (folder / RECORD).exists():
        return
    # As JSON keeps it.
    for key, old, new in differences(read_json(folder / RECORD), json.loads(json.dumps(record))):
        what = f"{folder} holds pictures drawn with {key}={old!r}, not {new!r}"
        raise UserError(f"{what}: choose another --cache, or remove it")


def _check_files(folder: AnyPath, there: set[str], names: set[str]) -> None:
    """Refuses pictures of which no record tells what drew them, and others than those that are drawn."""
    found = sorted(name for name in there if is_picture(name))
    if found and RECORD not in there:
        what = f"{folder} holds pictures such as {found[0]}, and no {RECORD} tells what drew them"
        raise UserError(f"{what}: choose another --cache, or remove it")
    for name in found:
        if name not in names:
            what = f"{folder / name} is none of the pictures to be drawn, and would be measured"
            raise UserError(f"{what}: move it away")
