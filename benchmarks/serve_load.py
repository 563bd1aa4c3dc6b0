"""Load on the page's server: many people at once, one person, and what batching gains.

    PYTHONPATH=. python benchmarks/serve_load.py --model runs/quickstart/student [--control BRANCH]
        [--seconds 60] [--clients 32] [--browser]

Starts two servers on the loopback, one with calls of up to 8 pictures and one with calls of one. Clients do as
the page does: 30 changes a second, of words or, with a control branch, of a sketch; one request in flight, the
newest after it. Every answer must be of the
client's own last request, to the last; their last pictures are drawn again by the images API, one by one, and
must be the same to one in 255. Memory is the server's, a sixth of the time after the start and at the end.
Rounds of both servers take turns for the gain. ``--browser`` adds the time from a key or a pointer's move to
the picture that is shown, in headless Chromium. Prints JSON lines.
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from websockets.asyncio.client import connect

from sprint_jax.serving import frames

RATE = 30.0  # changes of a client in a second
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--control")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3, help="of the gain, 10 s each of both")
    parser.add_argument("--browser", action="store_true")
    flags = parser.parse_args()
    machine = {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}
    say({"benchmark": "serve_load", "steps": flags.steps, **machine})
    with server(flags, 8) as together, server(flags, 1) as alone:
        with urllib.request.urlopen(f"http://{together[0]}/v1/offer") as answer:
            sketches = json.load(answer)["control"]
        drawing = functools.partial(crowd, sketches=sketches)
        say(asyncio.run(drawing(*together, clients=1, seconds=flags.seconds / 4)))
        say(asyncio.run(drawing(*together, clients=flags.clients, seconds=flags.seconds)))
        rates = []
        for _ in range(flags.rounds):
            pair = [
                asyncio.run(drawing(*each, clients=flags.clients, seconds=10.0))["per_second"]
                for each in (together, alone)
            ]
            rates.append(pair)
        gains = [ours / one for ours, one in rates]
        gain = {"median": float(np.median(gains)), "min": min(gains), "max": max(gains)}
        say({"gain": gain, "per_second_of_both": rates})
        if flags.browser:
            say(shown(together[0], sketches))


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


@contextlib.contextmanager
def server(flags: argparse.Namespace, batch: int) -> Iterator[tuple[str, int]]:
    """A server's HOST:PORT and process."""
    words = ["--model", flags.model, "--port", "0", "--steps", str(flags.steps)]
    words += ["--batch", str(batch)] + (["--control", flags.control] if flags.control else [])
    command = [sys.executable, "-m", "sprint_jax.serve", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            opened = next(line for line in process.stdout if line.startswith("open "))
            yield opened.removeprefix("open http://").strip("/\n "), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()  # before its output is closed
    if process.returncode:
        raise SystemExit(f"the server ended with {process.returncode}")


class Client:
    """One person: changes what they ask for `RATE` times a second, and sees the answers."""

    def __init__(self, number: int, end: float, sketches: bool):
        self.number, self._end = number, end
        self._random = np.random.default_rng(number)
        self._paper = Image.new("L", (128, 128)) if sketches else None
        self._pen = self._random.integers(20, 108, 2)
        self._newest, self._changed = None, asyncio.Event()
        self.latencies: list[float] = []
        self.faults: list[Any] = []
        self.last: tuple[dict, bytes] | None = None

    async def run(self, address: str) -> None:
        async with connect(f"ws://{address}/draw", compression=None, proxy=None) as page:
            change = asyncio.create_task(self._change())
            asked = 0
            while not change.done() or self._newest is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 0.5)
                self._changed.clear()
                if self._newest is None:
                    continue
                (values, sketch, since), self._newest = self._newest, None
                asked += 1
                await page.send(frames.pack({"id": asked, **values}, sketch))
                header = {"waiting": True}
                while "waiting" in header:
                    header, file = frames.unpack(await asyncio.wait_for(page.recv(), 30))
                if header.get("id") != asked or header.get("seed") != values["seed"]:
                    self.faults.append(header)
                self.latencies.append(1000 * (time.perf_counter() - since))
                self.last = values, sketch, file
            await change

    async def _change(self) -> None:
        count = 0
        while time.perf_counter() < self._end:
            count += 1
            color = COLORS[count // 10 % len(COLORS)]
            prompt = f"a {color} {self.number % 10}"
            values = {"prompt": prompt, "seed": 10**6 * self.number + count}
            self._newest = values, self._sketch(count), time.perf_counter()
            self._changed.set()
            await asyncio.sleep(1 / RATE)

    def _sketch(self, count: int) -> bytes:
        """The sketch after one more move of a pen, which begins anew now and then; nothing without sketches."""
        if self._paper is None:
            return b""
        draw = ImageDraw.Draw(self._paper)
        if count % 60 == 0:
            draw.rectangle((0, 0, 128, 128), fill=0)
        before = self._pen
        self._pen = np.clip(before + self._random.integers(-14, 15, 2), 10, 118)
        draw.line([*before.tolist(), *self._pen.tolist()], fill=255, width=24)
        out = io.BytesIO()
        self._paper.save(out, "PNG", compress_level=1)
        return out.getvalue()


async def crowd(
    address: str, process: int, clients: int, seconds: float, sketches: bool
) -> dict[str, Any]:
    """So many people for so long; what they saw."""
    begin = time.perf_counter()
    people = [Client(number, begin + seconds, sketches) for number in range(1, clients + 1)]
    working = asyncio.gather(*(person.run(address) for person in people))
    await asyncio.sleep(seconds / 6)
    early = resident(process)
    await working
    took = time.perf_counter() - begin
    late, others = resident(process), 0
    for person in people:
        values, sketch, file = person.last
        asked = values | ({"control": base64.b64encode(sketch).decode()} if sketch else {})
        drawn = await asyncio.to_thread(draw, address, asked)
        others += int(np.abs(pixels(file) - drawn).max()) > 1
    latencies = np.concatenate([person.latencies for person in people])
    share = np.percentile(latencies, [50, 95, 99])
    return {
        "clients": clients,
        "change": "a sketch" if sketches else "words",
        "seconds": took,
        "pictures": len(latencies),
        "per_second": len(latencies) / took,
        "ms": dict(zip(("median", "p95", "p99"), share.tolist(), strict=True)),
        "least_of_a_client": min(len(person.latencies) for person in people),
        "faults": sum(len(person.faults) for person in people),
        "last_pictures_of_others": others,
        "mib": [early / 2**20, late / 2**20],
        "batches": batches(address),
    }


def batches(address: str) -> float:
    """Pictures in a call, the mean since the server started."""
    text = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return float(values["sprint_batch_pictures_sum"]) / float(values["sprint_batch_pictures_count"])


def draw(address: str, values: dict[str, Any]) -> np.ndarray:
    """The picture of a request by the images API."""
    while True:
        try:
            body = json.dumps(values).encode()
            with urllib.request.urlopen(f"http://{address}/v1/images", body) as answer:
                return pixels(base64.b64decode(json.load(answer)["data"][0]["b64_json"]))
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            time.sleep(1)


def pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"), np.int32)


def resident(process: int) -> int:
    """Bytes of a process in memory."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def shown(address: str, sketches: bool) -> dict[str, Any]:
    """The time from a key, or from a pointer's move, to the picture that is shown, in a browser."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    with webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver")) as browser:
        browser.get(f"http://{address}/")
        time.sleep(3)
        browser.execute_script(LISTEN)
        box = browser.find_element("id", "canvas").rect
        for count in range(200):
            if sketches:
                turn = 2 * np.pi * count / 50
                x = box["x"] + box["width"] * (0.5 + 0.3 * np.cos(turn))
                y = box["y"] + box["height"] * (0.5 + 0.3 * np.sin(turn))
                kind = "mouseMoved" if count else "mousePressed"
                event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1}
                browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)
            else:
                browser.execute_script(TYPE, f"a red {count % 10}")
            time.sleep(0.1)
        time.sleep(1)
        latencies = browser.execute_script("return latencies")
    share = np.percentile(latencies, [50, 95])
    ms = dict(zip(("median", "p95"), share.tolist(), strict=True))
    what = "a pointer's move" if sketches else "a key"
    return {"shown_after": what, "pictures": len(latencies), "ms": ms}


LISTEN = """
window.latencies = [];
document.addEventListener("shown", event => latencies.push(event.detail.latency));
"""
TYPE = """
const field = document.getElementById("prompt");
field.value = arguments[0];
field.dispatchEvent(new Event("input"));
"""


if __name__ == "__main__":
    main()
