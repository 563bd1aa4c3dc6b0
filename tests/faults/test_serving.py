"""Clients that send what they should not, as they should not; and the server as a process."""

import base64
import contextlib
import dataclasses
import io
import json
import random
import socket
import struct
import threading
import time

import numpy as np
import pytest
from helpers.damage import damage_json
from helpers.runs import finish, run_here, start
from helpers.serving import OFFER, SKETCHES, exchange, get, picture, post, receive, running, send
from helpers.workdirs import make_workdir
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sprint_jax import serve
from sprint_jax.serving import app, frames, guard, server, session
from sprint_jax.serving.pictures import DECODERS, SCANS, read_picture
from sprint_jax.serving.requests import Refused, check_request

CASES = 200
WHOLE = {"prompt": "a 3", "seed": 1, "steps": 2, "guidance": 3.0, "size": "8x8", "style": "none"}


def wrong_picture(case: random.Random) -> bytes:
    """Bytes of a picture that must not be taken; none of them is large."""

    def saved(form="PNG", mode="L", size=(32, 32), **how):
        out = io.BytesIO()
        Image.new(mode, size, 1).save(out, form, **how)
        return out.getvalue()

    def claims(*size):
        """A PNG that says it has a size."""
        header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + case.randbytes(40)

    def bomb():
        notes = PngInfo()
        notes.add_text("a", "0" * 2**21, zip=True)
        return saved(pnginfo=notes)

    kinds = (
        bomb,
        lambda: claims(60000, 60000),
        lambda: claims(2**31 - 1, 1),
        lambda: saved(size=(4096, 4096)),
        lambda: saved(form=case.choice(["GIF", "BMP", "TIFF", "PPM", "ICO"])),
        lambda: (lambda whole: whole[: case.randrange(1, len(whole) - 12)])(saved()),
        lambda: (lambda whole: whole[: len(whole) // 2])(saved("JPEG", "RGB")),
        lambda: (lambda whole: whole[: len(whole) // 2])(saved("WEBP", "RGB")),
        lambda: saved()[:33] + case.randbytes(100),
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    )
    return case.choice(kinds)()


def damaged_frame(case: random.Random) -> bytes:
    whole = frames.pack(WHOLE | {"id": 1})
    kinds = (
        lambda: whole[: case.randrange(len(whole))],
        lambda: case.randbytes(case.randrange(200)),
        lambda: struct.pack("<I", case.randrange(2**32)) + whole[4:],
        lambda: frames.pack(WHOLE | {"id": 1}, wrong_picture(case)),
        lambda: frames.pack(WHOLE | {"id": 1, "control_kind": "/etc/passwd"}, b"x"),
        lambda: frames.pack(WHOLE | {"id": case.choice([-1, 2**60, "1", None, [], {}])}),
        lambda: frames.pack(
            WHOLE | {"id": 1, case.choice(list(WHOLE)): case.choice([[], {}, None, -1, 1e300])}
        ),
        lambda: frames.pack(WHOLE | {"id": 1, "prompt": "<script>\0" + "x" * case.randrange(99)}),
        lambda: frames.pack(WHOLE | {"id": 1, "prompt": "x" * 10**6}),
        lambda: (lambda text: struct.pack("<I", len(text)) + text)(b"[" * 9000),
        lambda: frames.pack([WHOLE] * case.randrange(3)),
    )
    return case.choice(kinds)()


def damaged_request(case: random.Random, address: str) -> bytes:
    body = json.dumps(WHOLE).encode()

    def request(head="POST /v1/images HTTP/1.1", host=address, body=body, length=None, more=()):
        length = len(body) if length is None else length
        lines = [head, f"Host: {host}", f"Content-Length: {length}", "Connection: close", *more]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def encoded(picture):
        return json.dumps({"control": base64.b64encode(picture).decode()}).encode()

    kinds = (
        lambda: case.randbytes(case.randrange(1, 300)) + b"\r\n\r\n",
        lambda: request(head=f"{case.choice(['GET', 'PUT', 'TRACE'])} /v1/images HTTP/1.1"),
        lambda: request(head="POST /../../etc/passwd HTTP/1.1"),
        lambda: request(head="GET /" + "a" * 100000 + " HTTP/1.1"),
        lambda: request(host=case.choice(["evil.example", "", "127.0.0.1.evil.example"])),
        lambda: request(
            more=[f"Origin: http://{case.choice(['evil.example', 'null', address + '0'])}"]
        ),
        lambda: request(body=damage_json(case, body.decode()) + b"}"),
        lambda: request(body=b'{"prompt": ' + case.choice([b"1", b"NaN", b"1e999", b"[]"]) + b"}"),
        lambda: request(body=b'{"seed": ' + b"9" * 6000 + b"}"),
        lambda: request(body=b'{"n": ' + case.choice([b"0", b"1000000", b"true"]) + b"}"),
        lambda: request(body=b"\x80" + case.randbytes(40)),
        lambda: request(
            body=json.dumps({"control": case.choice(["!", "é", "a" * 9, ""])}).encode()
        ),
        lambda: request(body=encoded(wrong_picture(case))),
        lambda: request(length=case.choice(["-1", "x", "1, 2"])),
        lambda: request(more=["Upgrade: websocket", "Connection: Upgrade"]),
        lambda: request(more=["X-Long: " + "a" * 200000]),
    )
    return case.choice(kinds)()


@pytest.fixture(scope="module")
def service():
    with running(clients=32, offer=dataclasses.replace(OFFER, control=True)) as found:
        yield found


@pytest.fixture
def neighbour(service):
    """Somebody who draws all the while, and must get every picture of their own."""
    over, drawn, wrong = threading.Event(), [], []

    def work():
        with service.socket() as page:
            while not over.is_set():
                number = len(drawn) + 1
                send(page, number, seed=number)
                header, file = receive(page)
                wanted = picture(OFFER.job({"prompt": "a 3", "seed": number}))
                if header["id"] != number or not (read(file) == wanted).all():
                    wrong.append(header)
                drawn.append(header["ms"]["total"])
                time.sleep(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    over.set()
    thread.join(30)
    assert not thread.is_alive() and not wrong
    assert len(drawn) >= 3 and max(drawn) < 5000


def read(file):
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def test_frames_and_requests_of_all_wrong_kinds_are_refused_with_a_reason(service, neighbour):
    refused = 0
    for number in range(CASES):
        time.sleep(0.025)  # an address may ask 50 times a second
        case = random.Random(f"serving {number}")
        if number % 2:
            status, _, body = exchange(service.address, damaged_request(case, service.address))
            assert 400 <= status < 600 and body, number
            assert status != 500, number
            refused += 1
            continue
        with service.socket() as page:
            try:
                page.send(damaged_frame(case))
                header, file = receive(page)
                assert header["error"]["code"] and header["error"]["message"] and not file, number
                send(page, 2, seed=number)  # the connection still serves
                header, file = receive(page)
                wanted = picture(OFFER.job({"prompt": "a 3", "seed": number}))
                assert header["id"] == 2 and (read(file) == wanted).all()
            except ConnectionClosed as closed:
                assert closed.rcvd.code in (1007, 1008, 1009), number
            refused += 1
    assert refused == CASES
    assert get(service.address, "/health")[0] == 200


def test_pictures_of_too_many_scans_are_refused():
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(out, "JPEG", progressive=True)
    file = out.getvalue()
    scan = file[file.rindex(b"\xff\xda") : -2]
    most = SCANS - file.count(b"\xff\xda")
    assert read_picture(file[:-2] + most * scan + file[-2:], 8, 8).min() > 250
    with pytest.raises(Refused) as refused:
        read_picture(file[:-2] + (most + 1) * scan + file[-2:], 8, 8)
    assert (refused.value.code, refused.value.status) == ("image", 413)


def test_few_pictures_are_read_at_once(monkeypatch):
    reading, go = [], threading.Semaphore(0)

    def slowly(data, height, width):
        reading.append(data)
        assert go.acquire(timeout=20)
        return np.zeros((height, width, 3), np.uint8)

    monkeypatch.setattr(session, "read_picture", slowly)
    with running(offer=SKETCHES) as shared, contextlib.ExitStack() as stack:
        pages = [stack.enter_context(shared.socket()) for _ in range(DECODERS + 2)]
        for page in pages:
            page.send(frames.pack({"id": 1}, b"picture"))
        time.sleep(0.2)
        assert len(reading) <= DECODERS
        go.release(len(pages))
        assert [receive(page)[0]["picture"] for page in pages] == ["image/png"] * len(pages)
    assert len(reading) == len(pages)


def test_no_more_of_a_wrong_request_is_looked_at_than_is_told():
    looked = []

    class Key(str):
        def __hash__(self):
            looked.append(self)
            return super().__hash__()

        def __repr__(self):
            looked.append(self)
            return super().__repr__()

    many = [Key(number) for number in range(1000)]
    wrong = {"prompt": many}, {"prompt": {1: many}}, dict.fromkeys(many, 1)
    for values in wrong:
        looked.clear()
        with pytest.raises(Refused) as refused:
            check_request(values, OFFER.kinds())
        assert refused.value.code == "value" and len(looked) < 100
        assert "'0'" in str(refused.value) and len(str(refused.value)) < 200


def test_what_is_too_large_is_not_kept(service, neighbour):
    status, _, body = post(service.address, b" " * (app.BODY + 1))
    assert (status, json.loads(body)["error"]["code"]) == (413, "large")
    with service.socket() as page:
        page.send(bytes(frames.FRAME + 1))
        assert receive(page)[0]["error"]["code"] == "large"
        with pytest.raises(ConnectionClosed):  # not even read
            page.send(bytes(app.BODY + 1))
            page.recv(20)
    with service.socket() as page:
        for _ in range(400):
            page.send(b"no frame")
        codes = set()
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                codes.add(receive(page)[0]["error"]["code"])
        assert codes <= {"frame", "rate"} and closed.value.rcvd.code == 1008


def test_slow_clients_are_left(service, neighbour, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    monkeypatch.setattr(app, "BODY_TIME", 0.3)
    host, port = service.address.split(":")

    def slowly(*parts, pause=0.1):
        with socket.create_connection((host, int(port)), 20) as client:
            for part in parts:
                client.sendall(part)
                time.sleep(pause)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := client.recv(65536):
                    answer += part
            return answer

    line = f"POST /v1/images HTTP/1.1\r\nHost: {service.address}\r\n".encode()
    begin = time.monotonic()
    assert slowly(b"") == b""  # says nothing
    assert slowly(line, b"A: b\r\n") == b""  # never ends the head
    answer = slowly(line + b"Content-Length: 100\r\n\r\n", b"{", pause=0.05)
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"slow"' in answer
    assert time.monotonic() - begin < 30


def test_a_body_that_was_answered_before_it_came_must_come(service, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    host, port = service.address.split(":")
    head = f"GET /health HTTP/1.1\r\nHost: {service.address}\r\nContent-Length: 10\r\n\r\n"
    with socket.create_connection((host, int(port)), 4) as client:
        client.sendall(head.encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(ConnectionError):
            for _ in range(5):  # one byte and then nothing would do; these must not prolong it
                client.sendall(b"x")
                time.sleep(0.1)
            while client.recv(65536):
                pass


def test_a_client_that_reads_nothing_is_left(monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    monkeypatch.setattr(guard, "BURST", 1e6)
    with running() as service:
        host, port = service.address.split(":")
        with socket.create_connection((host, int(port)), 20) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            name = client.getsockname()
            ask = f"GET / HTTP/1.1\r\nHost: {service.address}\r\n\r\n".encode()
            client.sendall(500 * ask)  # of 30 kB each
            begin, waiting = time.monotonic(), []
            here = []
            while here or not waiting:
                here = [each for each in connections(service) if each.client == name]
                waiting += [each.flow.write_paused for each in here]
                time.sleep(0.01)
                assert time.monotonic() - begin < 30
        assert any(waiting) and get(service.address, "/health")[0] == 200


def connections(service):
    return list(service.server.server_state.connections)


def test_one_address_cannot_hold_the_places_of_all(monkeypatch):
    monkeypatch.setattr(app, "is_loopback", lambda address: False)
    with running(clients=20) as service, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(service.socket())
        with pytest.raises(InvalidStatus, match="503"), service.socket():
            pass


def test_connections_that_do_nothing_leave_room_for_others():
    with running(clients=2) as service:
        host, port = service.address.split(":")
        held = [socket.create_connection((host, int(port)), 20) for _ in range(20)]
        try:
            for client in held[server.SOCKETS * 2 :]:
                assert client.recv(1) == b""  # closed at once
        finally:
            for client in held:
                client.close()
        deadline = time.monotonic() + 10
        while get(service.address, "/health")[0] != 200:
            assert time.monotonic() < deadline


@pytest.mark.usefixtures("quick")
def test_a_process_compiles_opens_serves_and_drains(tmp_path):
    folder = make_workdir(tmp_path / "student", "distill", control_blocks=1)
    words = ["--model", str(folder), "--port", "0", "--steps", "1", "--batch", "1"]
    process = start(words, "serve")
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("open http://127.0.0.1:"):
            break
    address = printed[-1].split("//")[1].strip().strip("/")
    assert "1 programs ready" in printed[0]
    status, _, body = post(address, {"prompt": "a red 3", "seed": 1})
    assert status == 200 and json.loads(body)["data"][0]["seed"] == 1
    assert post(address, {"steps": 2})[0] == 400
    out = io.BytesIO()
    Image.new("L", (40, 40), 255).save(out, "PNG")
    control = base64.b64encode(out.getvalue()).decode()
    asked = {"prompt": "a red 3", "seed": 1, "control": control, "control_kind": "photo"}
    assert post(address, asked)[0] == 200
    assert json.loads(get(address, "/v1/offer")[2])["photos"]
    process.terminate()
    ended = finish(process)
    assert ended.code == 0 and "Traceback" not in ended.err
    assert "program 1/1" in ended.err


def test_a_taken_port_and_wrong_flags_are_told_before_anything_is_loaded(
    tmp_path, monkeypatch, capfd
):
    def fails(*words):
        return run_here(["--model", str(tmp_path / "none"), *words], monkeypatch, capfd, serve.main)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = fails("--port", port)
        assert ended.code == 1 and f"--port {port}" in ended.error
    assert fails("--port", "70000").code == 2
    assert fails("--batch", "3").code == 2
    assert {fails("--name", name).code for name in ("a:80", "http://a", "a/b")} == {2}
    assert fails("--size", "8").code == 2
    assert fails("--host", "no.such.host.example", "--port", "0").code == 1
    (tmp_path / "token").write_text("short")
    assert "token" in fails("--token", str(tmp_path / "token")).error
    assert "none" in fails("--port", "0").error


def test_a_token_is_made_where_others_can_ask():
    assert server.make_token("127.0.0.1", [], None) is None
    assert server.make_token("::1", ["localhost"], None) is None
    tokens = {server.make_token("0.0.0.0", [], None), server.make_token("", ["a.example"], None)}
    assert len(tokens) == 2 and all(len(token) >= 32 for token in tokens)
