"""Files: written whole or not at all, and JSON read with one clear error."""

import errno
import fcntl
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from .errors import UserError
from .storage import AnyPath, answers_as_os_errors, as_path, in_bucket

PROBE = ".sprint_jax-can-write"  # an object that is written and removed again


def write_atomic(path: AnyPath, content: bytes) -> None:
    """Writes a file, on a disk or in a bucket; a reader finds the old one or the new one, whole.

    Raises:
      UserError: naming the file, when it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        if in_bucket(path):  # where an object appears when it is whole
            with answers_as_os_errors(path):
                path.write_bytes(content)
            return
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def append(path: AnyPath, text: str) -> None:
    """Adds text to a file, made if missing; an object of a bucket is written anew with it. Raises OSError."""
    if not in_bucket(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        return
    with answers_as_os_errors(path):
        path.write_text((path.read_text() if path.is_file() else "") + text)


def read_text(path: AnyPath, most: int = 1 << 28) -> str:
    """The text of a file, UTF-8.

    Raises:
      OSError: it cannot be read, or has more than ``most`` bytes, as what is no file may have without an end.
      UnicodeDecodeError: it is something else.
    """
    with answers_as_os_errors(path), path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 20} MiB", os.fspath(path))
    return data.decode()


def check_writable(folder: AnyPath, flag: str = "--out") -> None:
    """Refuses a folder that cannot be made or written to, before what goes there is computed; leaves nothing.

    Raises:
      UserError: naming the flag and the folder.
    """
    try:
        if in_bucket(folder):
            with answers_as_os_errors(folder):
                (folder / PROBE).write_bytes(b"")
                (folder / PROBE).unlink()
            return
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror or error}") from error


def write_json_atomic(path: str | AnyPath, value: Any) -> None:
    """Writes ``value`` as indented JSON by `write_atomic`, on process 0 only.

    Raises:
      UserError: naming the file, when it cannot be written.
      ValueError, TypeError: when ``value`` has non-finite numbers or is not JSON.
    """
    if jax.process_index() == 0:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
        write_atomic(as_path(path), text.encode())


def try_lock(file: Any) -> bool:
    """Locks an open file or folder until it is closed, or says False: another process holds it.

    On disks without locks it says True; there nobody is held off.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def read_json(path: AnyPath) -> dict[str, Any]:
    """Reads a JSON file that holds a dict.

    Raises:
      UserError: naming the file, when it is missing, cannot be read or holds something else.
    """
    try:
        text = read_text(path, 1 << 30)
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a letter, unless its other half follows
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); is it damaged?") from error
    except RecursionError:
        raise UserError(f"{path} cannot be read: its lists or dicts are too deep") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a dict")
    return value


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields dotted name, old value and new value of what differs between nested dicts; 'absent' for none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            pair = old.get(key, "absent"), new.get(key, "absent")
            yield from differences(*pair, f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def without_nan(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON cannot hold, by None in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
