"""The parts of the door: rates, names, tokens."""

import pytest
from starlette.requests import HTTPConnection

from sprint_jax.serving.counters import Counters
from sprint_jax.serving.guard import Bucket, Guard, split_host
from sprint_jax.serving.requests import Refused


def test_a_bucket_gives_its_burst_and_then_its_rate():
    now = [0.0]
    bucket = Bucket(2.0, 3.0, lambda: now[0])
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("header", "name"),
    [("A.b:80", "a.b"), ("a.b", "a.b"), ("[::1]:80", "::1"), ("[::1]", "::1"), (":80", ":80")],
)
def test_names_of_hosts(header, name):
    assert split_host(header) == name


def test_a_token_of_bytes_that_are_not_ascii_is_refused():
    asked = {"type": "websocket", "path": "/draw", "headers": [(b"host", b"localhost")]}
    door = Guard(None, (), "a" * 20, Counters())
    for text in ("token.\udcff", "token.\xff"):  # how versions of websockets show such a byte
        with pytest.raises(Refused) as refused:
            door.check(HTTPConnection(asked | {"subprotocols": [text]}))
        assert refused.value.code == "token"
