"""Files: written whole or not at all, and JSON read with one clear error."""

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from .errors import UserError


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file; a reader finds the old one or the new one, whole.

    Raises:
      UserError: naming the file, when it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON by `write_atomic`, on process 0 only.

    Raises:
      UserError: naming the file, when it cannot be written.
      ValueError, TypeError: when ``value`` has non-finite numbers or is not JSON.
    """
    if jax.process_index() == 0:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
        write_atomic(Path(path), text.encode())


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


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds a dict.

    Raises:
      UserError: naming the file, when it is missing, cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); is it damaged?") from error
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
