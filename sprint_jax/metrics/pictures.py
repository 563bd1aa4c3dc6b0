"""Folders of pictures, in the order of their names, and the sentences that belong to them."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from PIL import Image

from ..core.errors import UserError
from ..core.files import read_text
from ..core.fingerprint import digest
from ..core.storage import AnyPath, absolute, in_bucket, open_file, walk

ENDINGS = ("bmp", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")  # pytorch-fid's
SIZES = 32  # of pictures that a report lists


class Pictures(NamedTuple):
    """Pictures that are read when they are asked for.

    Attributes:
      origin: their folder.
      names: paths below it, sorted.
      read: ``read(i)``, an RGB picture; raises UserError, naming it, if it is damaged.
      identity: a hash of names and sizes of files.
      stamp: the same, and of their folder and times of change.
      formats: how many files have each ending.
    """

    origin: str
    names: list[str]
    read: Callable[[int], Image.Image]
    identity: str
    stamp: str
    formats: dict[str, int]


def open_pictures(folder: AnyPath, count: int | None = None) -> Pictures:
    """Opens a folder of pictures, at any depth; the first ``count`` of them, if it is given.

    Raises:
      UserError: it is missing, or has no pictures, or fewer.
    """
    if in_bucket(folder):
        stamps = {name: (entry.size, entry.mark) for name, entry in walk(folder).items()}
    elif folder.is_dir():
        paths = (path for path in folder.rglob("*") if path.is_file())
        stats = {path.relative_to(folder).as_posix(): path.stat() for path in paths}
        stamps = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    else:
        raise UserError(f"{folder} is not a folder of pictures")
    names = sorted(name for name in stamps if is_picture(name))
    if not names or len(names) < (count or 0):
        asked = f"{count} are asked for" if names else "expected files such as .png or .jpg"
        raise UserError(f"{folder} has {len(names)} pictures: {asked}")
    names = names[:count]
    formats = Counter(_ending(name).replace("jpeg", "jpg") for name in names)

    def read(i):
        return _read(folder / names[i], lambda image: image.convert("RGB"))

    identity = digest([(name, stamps[name][0]) for name in names])
    stamp = digest([str(absolute(folder)), *((name, *stamps[name]) for name in names)])
    return Pictures(str(folder), names, read, identity, stamp, dict(sorted(formats.items())))


def _read(path: AnyPath, take: Callable[[Image.Image], Any]) -> Any:
    """Returns what ``take`` finds in the picture of a file; raises UserError, naming it, if it is damaged."""
    try:
        with open_file(path) as file, Image.open(file) as image:
            return take(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}") from error


def read_sizes(folder: AnyPath, pictures: Pictures, threads: int = 8) -> list[str]:
    """Returns the sizes that pictures have, ``HEIGHTxWIDTH``, each once; reads the beginning of all files.

    Of more than `SIZES` it is their number and a hash of them.

    Raises:
      UserError: one cannot be read.
    """

    def one(name):
        return _read(folder / name, lambda image: f"{image.height}x{image.width}")

    with ThreadPoolExecutor(threads) as pool:
        found = sorted(set(pool.map(one, pictures.names)))
    return found if len(found) <= SIZES else [f"{len(found)} sizes", digest(found)]


def hash_contents(folder: AnyPath, pictures: Pictures, threads: int = 8) -> str:
    """Returns a hash of the bytes of pictures, whatever their names, order and folder are; reads them all.

    Raises:
      UserError: one cannot be read.
    """

    def one(name):
        try:
            with open_file(folder / name) as file:
                return hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from error

    with ThreadPoolExecutor(threads) as pool:
        return digest(sorted(pool.map(one, pictures.names)))


def is_picture(name: str) -> bool:
    """Whether the name of a file ends as that of a picture does."""
    return _ending(name) in ENDINGS


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def _parent(name: str) -> str:
    return name.rpartition("/")[0].rpartition("/")[2]


def read_prompts(path: AnyPath) -> dict[str, str] | list[str]:
    """Reads sentences: MJHQ's ``meta_data.json``, by the stems of pictures, or a text file, one in each line.

    Raises:
      UserError: the file is missing or holds something else; or a key that is no name of a file.
    """
    try:
        text = read_text(path)
        if path.suffix == ".json":
            rows = sorted(json.loads(text).items())
            found = {key: row["prompt"] if isinstance(row, dict) else str(row) for key, row in rows}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        wanted = (
            'an object of {KEY: {"prompt": ...}}' if path.suffix == ".json" else "lines of text"
        )
        raise UserError(f"--prompts {path} is not {wanted}: {error!r}") from error
    if path.suffix == ".json":
        # They become names of files and folders.
        for key in found:
            if key in ("", ".", "..") or set(key) & set("/\\\0"):
                raise UserError(
                    f"--prompts {path}: the key {key!r} cannot be the name of a picture"
                )
        return found
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {path} has no prompt: write one in each line")
    return prompts


def first_prompts(prompts: dict[str, str] | list[str], count: int | None):
    """Returns the first ``count`` prompts, or all."""
    return dict(list(prompts.items())[:count]) if isinstance(prompts, dict) else prompts[:count]


def prompts_of(pictures: Pictures, prompts: dict[str, str] | list[str]) -> list[str]:
    """Returns the sentence of each picture.

    Those with keys belong to all pictures in a folder KEY, or to the picture KEY.png. A list is in the order
    of the pictures, each sentence for equally many that follow each other.

    Raises:
      UserError: a picture has none, or their numbers do not fit.
    """
    if isinstance(prompts, dict):
        # The folder counts first: what lies in it has numbers for names, which may be keys as well.
        parents = [_parent(name) for name in pictures.names]
        keys = [
            parent if parent in prompts else _stem(name)
            for name, parent in zip(pictures.names, parents, strict=True)
        ]
        for name, key in zip(pictures.names, keys, strict=True):
            if key not in prompts:
                raise UserError(f"--prompts has no key {_stem(name)!r} for {name}")
        return [prompts[key] for key in keys]
    each, rest = divmod(len(pictures.names), len(prompts))
    if rest or not each:
        raise UserError(f"--prompts has {len(prompts)} lines for {len(pictures.names)} pictures")
    return [prompt for prompt in prompts for _ in range(each)]
