"""Folders of images, with captions in files beside them or in a metadata.jsonl."""

import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ...core.errors import UserError
from .caption_files import captions_beside, parse_json, read_captions
from .images import EXTENSIONS, MAX_PIXELS, decode_image, measure_image
from .records import Caption, Record, Rejected, cannot_read, hash_identity

METADATA = "metadata.jsonl"


class Item(NamedTuple):
    """An image of a folder: its key, the paths below the folder of its file, of its text and JSON, and of
    Sana's files; captions of a metadata.jsonl; or why there is none."""

    key: str
    image: str
    text: str | None = None
    json: str | None = None
    models: tuple[str, ...] = ()
    captions: tuple[Caption, ...] | None = None
    problem: str | None = None


class FolderSource:
    """The images below a folder in the order of their keys; see `open_folder`."""

    def __init__(
        self, folder: Path, items: Sequence[Item], name: str, identity: str, max_pixels: int
    ):
        self.name, self.identity = name, identity
        self._folder, self._items, self._max_pixels = folder, items, max_pixels

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        """The record; raises `Rejected`."""
        item = self._item(index)
        data = self._read(item.image, item.key)
        image = decode_image(data, item.key, max_pixels=self._max_pixels)
        captions = item.captions
        if captions is None:
            captions = captions_beside(
                item.key,
                None if item.text is None else self._read(item.text, item.key),
                None if item.json is None else self._read(item.json, item.key),
                [(Path(path).stem, self._value(path, item.key)) for path in item.models],
                entry=Path(item.image).stem,
            )
        return Record(item.key, image, captions or (Caption(""),))

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        """Key and (height, width), from the headers of the file; raises `Rejected`."""
        item = self._item(index)
        try:
            with (self._folder / item.image).open("rb") as file:
                return item.key, measure_image(file, item.key, max_pixels=self._max_pixels)
        except OSError as error:
            raise cannot_read(item.key, error) from error

    def _item(self, index: int) -> Item:
        item = self._items[index]
        if item.problem is not None:
            raise Rejected(item.key, item.problem)
        return item

    def _value(self, path: str, key: str) -> Any:
        return parse_json(self._read(path, key), key, path)

    def _read(self, path: str, key: str) -> bytes:
        try:
            return (self._folder / path).read_bytes()
        except OSError as error:
            raise cannot_read(key, error, path) from error


def open_folder(
    folder: str | os.PathLike, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> FolderSource:
    """Opens a folder of images, at any depth, with their captions.

    Images are known by the extensions in `images.EXTENSIONS`; hidden files and folders are left out. A key
    is the path below the folder without its extension, with ``/``; images that differ in the extension
    alone keep it. Captions stand beside the image in ``KEY.txt`` or ``KEY.json`` and Sana's files
    (`caption_files`). Or they stand in a metadata.jsonl of the folder or one below, as Hugging Face's
    ImageFolder has it: lines of JSON objects with ``file_name``, relative to that file, and a caption, its
    keys as in `caption_files`. Several lines about one image are several captions. What lies below a
    metadata.jsonl and is in none of its lines needs captions beside it.

    Args:
      folder: what to open.
      name: of the source in messages; the folder's path if left out.
      max_pixels: see `images.decode_image`.

    Raises:
      UserError: no such folder, one that cannot be read, no image in it, or two images of one key.
    """
    folder = Path(folder).expanduser()
    name = str(folder) if name is None else name
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of images")
    files = dict(
        sorted(
            tqdm(_walk(folder), f"scan {name}", delay=5, mininterval=5, leave=False, unit="file")
        )
    )
    items = _beside(files)
    for path in [path for path in files if posixpath.basename(path) == METADATA]:
        _apply_metadata(folder, path, files, items)
    for other in ("metadata.csv", "metadata.parquet"):
        if other in files and METADATA not in files:
            raise UserError(f"{folder / other} is not read: write its rows to a {METADATA} instead")
    if not items:
        raise UserError(
            f"{folder} has no image: expected files such as .jpg or .png, *.tar or *.array_record"
        )
    keyed = _with_keys(items, name)
    # Not of every file: others may come to lie there, such as what is made from the images.
    said = [(path, size) for path, size in files.items() if posixpath.basename(path) == METADATA]
    sizes = [
        [(path, files.get(path)) for path in (item.image, item.text, item.json, *item.models)]
        for item in keyed
    ]
    identity = hash_identity("folder", [max_pixels, *said, *sizes])
    return FolderSource(folder, keyed, name, identity, max_pixels)


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """Paths below a folder, with ``/``, and sizes in bytes (-1 of a dangling link); hidden ones left out."""
    seen, waiting = set(), [""]
    while waiting:
        below = waiting.pop()
        try:
            status = (folder / below).stat()
            if (status.st_dev, status.st_ino) in seen:  # links may lead round in a circle
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    path = posixpath.join(below, entry.name)
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        waiting.append(path)
                    elif entry.is_file():
                        yield path, entry.stat().st_size
                    elif entry.is_symlink():
                        yield path, -1
        except OSError as error:
            raise UserError(f"cannot read {folder / below}: {error.strerror}") from error


def _beside(files: dict[str, int]) -> dict[str, Item]:
    """The images among files and what lies beside them: path -> item, whose key is still without extension."""
    images = [path for path in files if is_image(path)]
    stems = {posixpath.splitext(path)[0] for path in images}
    models: dict[str, list[str]] = {}
    for path in files:
        stem, extension = posixpath.splitext(path)
        if extension == ".json" and stem not in stems:
            owner = stem
            while owner not in stems and "_" in posixpath.basename(owner):
                owner = owner.rpartition("_")[0]
            models.setdefault(owner, []).append(path)
    items = {}
    for path in images:
        stem = posixpath.splitext(path)[0]
        items[path] = Item(
            stem,
            path,
            text=f"{stem}.txt" if f"{stem}.txt" in files else None,
            json=f"{stem}.json" if f"{stem}.json" in files else None,
            models=tuple(models.get(stem, ())),
        )
    return items


def is_image(path: str) -> bool:
    """Whether a path has the extension of an image."""
    return posixpath.splitext(path)[1][1:].lower() in EXTENSIONS


def _apply_metadata(folder: Path, path: str, files: dict[str, int], items: dict[str, Item]) -> None:
    """Puts the captions of a metadata.jsonl into ``items``, and what is wrong with it."""
    below = posixpath.dirname(path)
    try:
        lines = (folder / path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {folder / path}: {error.strerror}") from error
    listed: dict[str, tuple[Caption, ...]] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            target, captions = _read_line(line, where, below)
            listed[target] = listed.get(target, ()) + captions
        except Rejected as rejected:
            items[where] = Item(where, where, problem=rejected.reason)
    for target, captions in listed.items():
        stem = posixpath.splitext(target)[0]
        problem = None if target in files else f"no such file: {target} of {path}"
        items[target] = Item(stem, target, captions=captions, problem=problem)
    prefix = f"{below}/" if below else ""
    for target, item in items.items():
        bare = item.captions is None and not (item.text or item.json or item.models)
        if bare and item.problem is None and target.startswith(prefix):
            items[target] = item._replace(problem=f"no caption: not in {path}, and none beside it")


def _read_line(line: bytes, where: str, below: str) -> tuple[str, tuple[Caption, ...]]:
    """Path below the source's folder, and captions, of a line of metadata.jsonl; raises `Rejected`."""
    value = parse_json(line, where, "line")
    file_name = value.get("file_name") if isinstance(value, dict) else None
    if not isinstance(file_name, str):
        raise Rejected(where, "bad JSON: no object with a text file_name")
    target = posixpath.normpath(posixpath.join(below, file_name))
    if target.startswith(("../", "/")):
        raise Rejected(where, f"no such file: {file_name} is outside the folder")
    return target, read_captions(value, where)


def _with_keys(items: dict[str, Item], name: str) -> list[Item]:
    """The items in the order of their keys, each of which is there once."""
    stems: dict[str, int] = {}
    for item in items.values():
        stems[item.key] = stems.get(item.key, 0) + 1
    keyed = {}
    for item in items.values():
        key = item.image if stems[item.key] > 1 else item.key
        printable = key.encode(
            errors="backslashreplace"
        ).decode()  # names of files need not be UTF-8
        if printable != key:
            item = item._replace(problem="bad file name: not UTF-8")
        if printable in keyed:
            raise UserError(
                f"{name}: {item.image} and {keyed[printable].image} have the same key: rename one"
            )
        keyed[printable] = item._replace(key=printable)
    return [keyed[key] for key in sorted(keyed)]
