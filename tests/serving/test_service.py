"""A server with a small model: what a page and a client of the images API send and get."""

import base64
import contextlib
import io
import json
import re
import socket
import threading
import time

import numpy as np
import pytest
from helpers.serving import OFFER, SKETCHES, Held, draw, get, picture, post, receive, running, send
from PIL import Image
from websockets.exceptions import InvalidStatus

from sprint_jax.serving import app, frames, session
from sprint_jax.serving import server as serving
from sprint_jax.serving.counters import Histogram
from sprint_jax.serving.requests import Refused


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


def pixels(file):
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def test_frames_are_unpacked_as_they_were_packed():
    header = {"id": 3, "prompt": "eine grüne 7"}
    assert frames.unpack(frames.pack(header, b"bytes")) == (header, b"bytes")
    frame = frames.pack(header)
    for damaged in (b"", frame[:3], frame[:-1], b"\xff\xff\xff\xff" + frame[4:]):
        with pytest.raises(Refused) as refused:
            frames.unpack(damaged)
        assert refused.value.code == "frame"


def test_a_page_gets_the_pictures_that_it_asks_for(server):
    with server.socket(subprotocols=["sprint"]) as page:
        assert page.subprotocol == "sprint"
        send(page, 1, prompt="a 3", style="on blue", seed=5, steps=4, guidance=2.5, size="16x8")
        header, file = receive(page)
    wanted = OFFER.job(dict(prompt="a 3 on blue", seed=5, steps=4, guidance=2.5, size="16x8"))
    assert wanted.size == (8, 16)
    np.testing.assert_array_equal(pixels(file), picture(wanted))
    assert (header["id"], header["picture"], header["seed"]) == (1, "image/png", 5)
    assert header["ms"].keys() == {"queue", "text", "denoise", "decode", "total"}


def test_what_cannot_be_drawn_is_refused_and_the_page_goes_on(server):
    with server.socket() as page:
        wrong = [
            ({"prompt": "a gray 3"}, "prompt"),
            ({"prompt": "a\n3"}, "value"),
            ({"prompt": "a \ud83d 3"}, "value"),
            ({"prompt": 3}, "value"),
            ({"prompt": "3" * 1001}, "value"),
            ({"steps": 3}, "value"),
            ({"seed": 2**32}, "value"),
            ({"seed": 1.0}, "value"),
            ({"guidance": float("nan")}, "value"),
            ({"size": "8x9"}, "value"),
            ({"style": "clay"}, "value"),
            ({"path": "/etc"}, "value"),
            ({"id": True}, "value"),
        ]
        for number, (values, code) in enumerate(wrong, 1):
            page.send(frames.pack({"id": number, "prompt": "a 3"} | values))
            header, _ = receive(page)
            assert header["error"]["code"] == code, values
            assert header["id"] == (None if "id" in values else number)
        page.send("text")
        assert receive(page)[0]["error"]["code"] == "frame"
        page.send(frames.pack({"id": 40}, b"picture"))
        assert receive(page)[0] == {
            "id": 40,
            "error": {"code": "image", "message": "this server takes no control image"},
        }
        send(page, 41, prompt="\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}")
        assert receive(page)[0]["picture"] == "image/png"


def test_the_images_api_draws_what_its_clients_ask_for(server):
    status, headers, body = post(server.address, {"prompt": "a 3", "n": 2, "seed": 7, "model": "x"})
    answer = json.loads(body)
    assert status == 200 and headers["content-type"] == "application/json"
    assert [(each["seed"], each["index"]) for each in answer["data"]] == [(7, 0), (7, 1)]
    for index, each in enumerate(answer["data"]):
        wanted = OFFER.job({"prompt": "a 3", "seed": 7}, index)
        np.testing.assert_array_equal(pixels(base64.b64decode(each["b64_json"])), picture(wanted))
    asked = {"prompt": "eine grüne 3"}
    status, headers, file = post(server.address, asked, "Accept: image/png")
    assert status == 200 and headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(file)) as image:
        notes = image.text
    assert (notes["prompt"], notes["steps"]) == ("eine grüne 3", "2")
    assert notes["seed"] == headers["x-seed"]
    asked["seed"] = int(notes["seed"])
    assert post(server.address, asked, "Accept: image/png")[2] == file


def test_control_images_come_in_frames_and_in_requests():
    sketch = np.zeros((128, 64, 4), np.uint8)
    sketch[:64] = 255, 255, 255, 255
    sketch[:32, :, 3] = 0  # what is transparent is black
    out = io.BytesIO()
    Image.fromarray(sketch).save(out, "PNG")
    wanted = np.zeros((64, 64, 3), np.uint8)
    wanted[16:32] = 255
    how = {"prompt": "a 3", "control_kind": "sketch", "control_scale": 0.5}
    with running(offer=SKETCHES) as server:
        with server.socket() as page:
            send(page, 1, **how)
            assert (pixels(receive(page)[1]) == picture(SKETCHES.job(how))).all()
            page.send(frames.pack({"id": 2} | how, out.getvalue()))
            files = [receive(page)[1]]
        for prefix in ("", "data:image/png;base64,"):
            text = prefix + base64.b64encode(out.getvalue()).decode()
            asked = how | {"control": text, "response_format": "png"}
            status, _, file = post(server.address, asked)
            assert status == 200
            files.append(file)
        with Image.open(io.BytesIO(file)) as image:
            assert image.text["control_scale"] == "0.5"
        assert server.counters.pictures == 4
    for file in files:
        drawn = pixels(file).astype(int)
        rows = [0, 8, 20, 28, 40, 63]  # away from edges, which resizing softens
        assert np.abs(drawn[rows] - wanted[rows]).max() < 8


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"no JSON", 400, "json"),
        (b"[" * 100000, 400, "json"),
        (b'{"prompt": [' + b"1," * 5000 + b"1]}", 413, "large"),
        ({"prompt": ["1"] * 4000}, 400, "value"),
        ([], 400, "value"),
        ({"prompt": "a 3", "n": 9}, 400, "value"),
        ({"prompt": "a 3", "n": 2, "response_format": "png"}, 400, "value"),
        ({"prompt": "a gray 3"}, 400, "prompt"),
        ({"prompt": "a gray 3", "n": 3}, 400, "prompt"),
    ],
)
def test_the_images_api_refuses_in_its_own_form(server, request_, status, code):
    found, _, body = post(server.address, request_)
    error = json.loads(body)["error"]
    assert (found, error["code"]) == (status, code)
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]


def test_pages_come_with_a_policy_that_allows_their_own_script_alone(server):
    for path in ("/", "/api"):
        status, headers, body = get(server.address, path)
        policy = headers["content-security-policy"]
        assert status == 200 and b"<!doctype html>" in body
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert headers["x-frame-options"] == "deny" and headers["cache-control"] == "no-store"
        assert policy.count("sha256-") == body.count(b"<script>") + body.count(b"<style>")
        assert not re.findall(rb"(?:src|href|url)[=(] *[\"']?(?:https?:|//)", body)
    assert get(server.address, "/nothing")[0] == 404
    assert get(server.address, "/v1/images")[0] == 405
    offer = json.loads(get(server.address, "/v1/offer")[2])
    assert offer["sizes"] == ["8x8", "16x8"] and offer["steps"] == [2, 1, 4]


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:1", None, 200),
        ("[::1]:1", None, 200),
        ("draw.example", "https://draw.example", 200),
        ("draw.example", "https://evil.example", 403),
        ("draw.example", "null", 403),
        ("draw.example", "https://draw.example.evil.example", 403),
        ("evil.example", None, 421),
        ("127.0.0.1.evil.example:1", None, 421),
        ("", None, 421),
    ],
)
def test_hosts_and_origins_of_others_are_refused(server, host, origin, status):
    more = [f"Origin: {origin}"] if origin else []
    assert get(server.address, "/health", *more, host=host or " ")[0] == status
    more += ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    more += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
    if status != 200:
        assert get(server.address, "/draw", *more, host=host or " ")[0] == status


def test_a_token_opens_what_is_beyond_the_loopback():
    token = "a" * 20
    with running(token=token) as server:
        assert get(server.address, "/")[0] == get(server.address, "/health")[0] == 200
        for path in ("/v1/offer", "/metrics", "/draw", "/nothing"):
            assert get(server.address, path)[0] == 401
        assert get(server.address, "/metrics", "Authorization: Bearer " + "b" * 20)[0] == 401
        assert get(server.address, "/metrics", f"Authorization: Bearer {token}")[0] == 200
        assert post(server.address, {"prompt": "a 3"})[0] == 401
        for protocols in (["sprint"], ["sprint", "token." + "b" * 20]):
            with pytest.raises(InvalidStatus) as refused, server.socket(subprotocols=protocols):
                pass
            assert refused.value.response.status_code == 401
        with server.socket(subprotocols=["sprint", f"token.{token}"]) as page:
            send(page, 1)
            assert receive(page)[0]["id"] == 1


def test_one_request_is_in_flight_and_only_the_newest_waits():
    model = Held()
    with running(model) as server, server.socket() as page:
        for number in range(1, 5):
            send(page, number, seed=number)
            while number == 1 and not model.batches:
                time.sleep(0.002)
        assert [receive(page)[0] for _ in range(2)] == [
            {"id": 2, "dropped": True},
            {"id": 3, "dropped": True},
        ]
        model.go.release(2)
        answers = [receive(page)[0] for _ in range(2)]
    assert [(each["id"], each["seed"]) for each in answers] == [(1, 1), (4, 4)]
    assert [[job.seed for job in jobs] for jobs in model.batches] == [[1], [4]]
    assert server.counters.dropped == 2


def test_a_page_hears_that_a_slow_picture_is_still_to_come(monkeypatch):
    monkeypatch.setattr(session, "BEAT", 0.02, raising=False)
    model = Held()
    with running(model) as server, server.socket() as page:
        send(page, 7)
        assert [receive(page, 5)[0] for _ in range(2)] == [{"id": 7, "waiting": True}] * 2
        model.go.release()
        while (header := receive(page)[0]) == {"id": 7, "waiting": True}:
            pass
        assert header["picture"] == "image/png"


def test_those_who_wait_together_are_one_call_and_everybody_gets_their_own():
    model = Held()
    with running(model, most=4) as server, contextlib.ExitStack() as stack:
        pages = [stack.enter_context(server.socket()) for _ in range(7)]
        for seed, page in enumerate(pages):
            # The fourth asks for another program.
            send(page, 1, seed=seed, steps=1 if seed == 3 else 2)
            while model.batches == [] or server.service.waiting < seed:
                time.sleep(0.002)
        model.go.release(10)
        for seed, page in enumerate(pages):
            header, file = receive(page)
            wanted = OFFER.job({"prompt": "a 3", "seed": seed, "steps": 1 if seed == 3 else 2})
            assert header["seed"] == seed
            np.testing.assert_array_equal(pixels(file), picture(wanted))
    assert [[job.seed for job in jobs] for jobs in model.batches] == [[0], [1, 2, 4, 5], [3], [6]]


@pytest.mark.parametrize("here", [True, False])
def test_requests_of_the_api_leave_room_for_pages(monkeypatch, here):
    monkeypatch.setattr(serving, "LINE", 4 if here else 34)
    monkeypatch.setattr(app, "is_loopback", lambda address: here)
    assert serving.longest_line(100) == 200
    model, count, answers = Held(), 2 if here else 8, []
    with running(model, most=1, clients=2) as server, contextlib.ExitStack() as stack:
        pages = [stack.enter_context(server.socket()) for _ in range(2)]
        asked = {"prompt": "a 3", "n": count}
        asking = threading.Thread(target=lambda: answers.append(post(server.address, asked)))
        asking.start()
        while server.service.waiting < count - 1 or not model.batches:
            time.sleep(0.002)
        status, _, body = post(server.address, {"prompt": "a 3"})
        assert (status, json.loads(body)["error"]["code"]) == (503, "busy")
        for page in pages:
            send(page, 1)
        model.go.release(count + 3)
        assert [receive(page)[0]["picture"] for page in pages] == ["image/png"] * 2
        asking.join(20)
        assert answers[0][0] == post(server.address, {"prompt": "a 3"})[0] == 200


def test_what_nobody_waits_for_leaves_the_line():
    model = Held()
    with running(model, most=1) as server:
        host, port = server.address.split(":")
        body = json.dumps({"prompt": "a 3", "n": 3})
        lines = ["POST /v1/images HTTP/1.1", f"Host: {server.address}"]
        lines += [f"Content-Length: {len(body)}", "", body]
        with socket.create_connection((host, int(port)), 20) as client:
            client.sendall("\r\n".join(lines).encode())
            while server.service.waiting < 2 or not model.batches:
                time.sleep(0.002)
        with server.socket() as page:
            send(page, 1)
            deadline = time.monotonic() + 5
            while server.service.waiting != 1:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            model.go.release(2)
            assert receive(page)[0]["id"] == 1
    assert len(model.batches) == 2 and server.counters.refused["gone"] == 1


def test_a_model_that_fails_hurts_only_its_cause():
    def fail(jobs):
        if any("bad" in job.prompt for job in jobs):
            raise RuntimeError("a fault of the model")
        return draw(jobs)

    with running(fail) as server:
        status, _, body = post(server.address, {"prompt": "bad", "n": 2})
        assert (status, json.loads(body)["error"]["code"]) == (500, "failed")
        assert post(server.address, {"prompt": "a 3"})[0] == 200
        assert server.counters.failures >= 1


def test_more_people_than_allowed_are_told_so():
    with running(clients=1) as server, server.socket() as page:
        with pytest.raises(InvalidStatus) as refused, server.socket():
            pass
        assert refused.value.response.status_code == 503
        send(page, 1)
        assert receive(page)[0]["id"] == 1


def test_a_signal_ends_the_server_when_those_who_wait_are_answered():
    model = Held()
    with running(model) as server, server.socket() as page:
        send(page, 1)
        answers = []
        asking = threading.Thread(target=lambda: answers.append(post(server.address, {"steps": 1})))
        asking.start()
        while not (model.batches and server.service._requests):
            time.sleep(0.002)
        server.server.handle_exit(15, None)
        while not server.service.closing:
            time.sleep(0.002)
        assert get(server.address, "/health")[0] == 503
        assert post(server.address, {})[0] == 503
        send(page, 2)
        header, _ = receive(page)
        assert (header["id"], header["error"]["code"]) == (2, "closing")
        model.go.release(2)
        assert receive(page)[0]["id"] == 1
        asking.join(20)
        assert answers[0][0] == 200
        with pytest.raises(Exception, match="1012"):
            page.recv(20)


def test_metrics_are_those_of_prometheus(server):
    post(server.address, {"prompt": "a gray 3"})
    text = get(server.address, "/metrics")[2].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['sprint_refused_total{code="prompt"}']) >= 1
    count = float(values["sprint_pictures_total"])
    assert count >= 1 and float(values['sprint_seconds_count{phase="total"}']) == count
    assert float(values['sprint_seconds_bucket{phase="total",le="+Inf"}']) == count
    assert {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")} >= {
        "sprint_clients",
        "sprint_waiting",
        "sprint_batch_pictures",
    }


def test_a_histogram_counts_up_to_its_bounds():
    histogram = Histogram((1, 10))
    for value in (0.5, 1, 5, 50):
        histogram.add(value)
    assert list(histogram.lines("x", 1)) == [
        'x_bucket{le="1"} 2',
        'x_bucket{le="10"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 56.500000",
        "x_count 4",
    ]
