"""Binary frames of the page's WebSocket: a length, a JSON header, and bytes of a picture.

    4 bytes      length of the header, unsigned, little-endian
    the header   a JSON object in UTF-8
    the rest     bytes of a picture, or none

From the page: ``id``, which grows, and the keys of `requests.Offer.kinds`. To the page: the same ``id`` and
one of ``picture``, the media type of the bytes, with ``seed`` and ``ms`` (milliseconds by phase); ``dropped``,
where a newer request took its place; ``error`` with ``code`` and ``message``; ``waiting``, every 10 seconds
until one of the others comes.
"""

import json
import struct
from typing import Any

from .requests import Refused

HEADER = 16 * 1024  # bytes of a header, at most
FRAME = 2**22  # bytes of a frame
COMMAS = 4096  # in a client's JSON; a prompt may hold 1000


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """A frame of a header and bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<I", len(text)) + text + body


def unpack(frame: bytes) -> tuple[Any, bytes]:
    """Header and bytes of a frame.

    Raises:
      Refused: it is too short or too long, as its header may be, or that is no JSON.
    """
    if len(frame) > FRAME:
        raise Refused("large", f"a frame of {len(frame)} bytes: at most {FRAME}", 413)
    if len(frame) < 4:
        raise Refused("frame", f"a frame of {len(frame)} bytes: it begins with 4 of a length")
    (length,) = struct.unpack_from("<I", frame)
    if length > HEADER or length > len(frame) - 4:
        most = min(HEADER, len(frame) - 4)
        raise Refused("frame", f"a header of {length} bytes: here are at most {most}")
    return parse_json(frame[4 : 4 + length]), frame[4 + length :]


def parse_json(text: bytes) -> Any:
    """A JSON value of a client.

    While Python reads it, nobody else is served, even by other threads. Long text is read in milliseconds,
    many values are not, and each but the first has a comma or a bracket.

    Raises:
      Refused: it is none, has too many values, or is nested too deeply.
    """
    if text.count(b",") > COMMAS:
        raise Refused("large", f"JSON of more than {COMMAS} commas", 413)
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise Refused("json", "this is no JSON object in UTF-8") from error
