"""Folders of images, with captions in files beside them or in a metadata.jsonl."""

import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

from ...core.errors import UserError
from ...core.storage import AnyPath, as_path, in_bucket, walk
from .caption_files import parse_json, read_captions
from .files import FileSource, Item, Span, length, make_printable, open_regular
from .images import EXTENSIONS, MAX_PIXELS
from .records import Caption, Rejected, hash_identity

METADATA = "metadata.jsonl"


def open_folder(folder: str | os.PathLike, name: str | None = None) -> FileSource:
    """Opens a folder of images, at any depth, with their captions.

    Images are known by the extensions in `images.EXTENSIONS`; hidden files and folders are left out. A key
    is the path below the folder without its extension, with ``/``; images that differ in the extension
    alone keep it. Captions stand beside the image in ``KEY.txt`` or ``KEY.json`` and Sana's files
    (`caption_files`). Or they stand in a metadata.jsonl of the folder or one below, as Hugging Face's
    ImageFolder has it: lines of JSON objects with ``file_name``, relative to that file, and a caption, its
    keys as in `caption_files`. Several lines about one image are several captions. An image below a
    metadata.jsonl that is in none of its lines needs captions beside it.

    The source is called ``name``, by default the folder's path. Raises UserError for a folder that is missing
    or cannot be read, no image in it, or two images of one key.
    """
    folder = as_path(folder).expanduser()
    name = name or str(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of images")
    found = tqdm(_walk(folder), f"scan {name}", delay=5, mininterval=5, leave=False, unit="file")
    files = dict(sorted(found))
    items = _find_images(files)
    metadata = [path for path in files if posixpath.basename(path) == METADATA]
    for path in metadata:
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
    parts = [(path, files[path]) for path in metadata]
    for item in keyed:
        own = [None if span is None else span.path for span in (item.image, item.text, item.json)]
        parts.append([(path, files.get(path)) for path in (*own, *item.models)])
    identity = hash_identity("folder", [MAX_PIXELS, *parts])
    return FileSource(keyed, name=name, identity=identity, root=folder)


def _walk(folder: AnyPath) -> Iterator[tuple[str, int]]:
    """Paths below a folder, with ``/``, and sizes in bytes (-1 of what is no regular file); no hidden ones."""
    if in_bucket(folder):
        for path, entry in walk(folder).items():
            if not any(part.startswith(".") for part in path.split("/")):
                yield path, entry.size
        return
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
                    kind, size = _look_at(entry)
                    if kind == stat.S_IFDIR:
                        waiting.append(path)
                    else:
                        yield path, size if kind == stat.S_IFREG else -1
        except OSError as error:
            raise UserError(f"cannot read {folder / below}: {error.strerror}") from error


def _look_at(entry: os.DirEntry) -> tuple[int, int]:
    """Kind and size of a file; 0 for a link that leads nowhere, or to itself."""
    try:
        status = entry.stat()
    except OSError:
        if not entry.is_symlink():
            raise
        return 0, 0
    return stat.S_IFMT(status.st_mode), status.st_size


def is_image(path: str) -> bool:
    """Whether a path has the extension of an image."""
    return posixpath.splitext(path)[1][1:].lower() in EXTENSIONS


def _find_images(files: dict[str, int]) -> dict[str, Item]:
    """The images among files with the captions beside them, by path; keys are still without extension."""
    images = {path: posixpath.splitext(path)[0] for path in files if is_image(path)}
    stems = set(images.values())
    models: dict[str, list[str]] = {}
    for path in files:
        stem, extension = posixpath.splitext(path)
        if extension == ".json" and stem not in stems:
            owner = stem
            while owner not in stems and "_" in posixpath.basename(owner):
                owner = owner.rpartition("_")[0]
            models.setdefault(owner, []).append(path)

    def beside(path: str) -> Span | None:
        return Span(path) if path in files else None

    return {
        path: Item(
            stem,
            Span(path),
            beside(f"{stem}.txt"),
            beside(f"{stem}.json"),
            tuple(models.get(stem, ())),
            posixpath.basename(stem),
        )
        for path, stem in images.items()
    }


def _apply_metadata(
    folder: AnyPath, path: str, files: dict[str, int], items: dict[str, Item]
) -> None:
    """Puts the captions of a metadata.jsonl into ``items``, and a problem for every line that is wrong."""
    below = posixpath.dirname(path)
    try:
        with open_regular(folder / path) as file:
            lines = file.read(length(file)).splitlines()
    except OSError as error:
        raise UserError(f"cannot read {folder / path}: {error.strerror or error}") from error
    listed: dict[str, tuple[Caption, ...]] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            target, captions = _read_line(line, where, below)
            listed[target] = listed.get(target, ()) + captions
        except Rejected as rejected:
            items[where] = Item(where, Span(where), problem=rejected.reason)
    for target, captions in listed.items():
        stem = posixpath.splitext(target)[0]
        problem = None if target in files else f"no such file: {target} of {path}"
        items[target] = Item(stem, Span(target), captions=captions, problem=problem)
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
    stems = Counter(item.key for item in items.values())
    keyed = {}
    for item in items.values():
        key, problem = make_printable(item.image.path if stems[item.key] > 1 else item.key)
        if key in keyed:
            both = f"{item.image.path} and {keyed[key].image.path}"
            raise UserError(f"{name}: {both} have the same key: rename one")
        keyed[key] = item._replace(key=key, problem=problem or item.problem)
    return [keyed[key] for key in sorted(keyed)]
