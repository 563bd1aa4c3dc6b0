"""The page in headless Chromium: what a person does with it, and what they see.

SCREENSHOTS=FOLDER keeps pictures of the page at the sizes of a desktop and of a phone.
"""

import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.serving import OFFER, SKETCHES, draw, picture, process, running
from PIL import Image

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER),
        reason="needs a browser: apt install chromium chromium-driver",
    ),
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    with webdriver.Chrome(options, service) as driver:
        driver.downloads = tmp_path_factory.mktemp("downloads")
        where = {"behavior": "allow", "downloadPath": str(driver.downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        driver.set_script_timeout(20)
        resize(driver, "desktop")
        yield driver


def until(ready, timeout=20):
    """The first true value of ``ready()``."""
    deadline = time.monotonic() + timeout
    while not (value := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def element(browser, name):
    return browser.find_element("id", name)


def resize(browser, size):
    width, height = SIZES[size]
    metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=size == "phone")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def screenshot(browser, name):
    if folder := os.environ.get("SCREENSHOTS"):
        for size in SIZES:
            resize(browser, size)
            time.sleep(0.2)
            browser.save_screenshot(str(Path(folder) / f"{name}-{size}.png"))
        resize(browser, "desktop")


def pixels(browser):
    """The pixels of the picture that is shown."""
    row = browser.execute_script(
        """const image = document.getElementById("picture"), canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [canvas.height, canvas.width,
                ...context.getImageData(0, 0, canvas.width, canvas.height).data];"""
    )
    return np.asarray(row[2:], np.uint8).reshape(*row[:2], 4)[..., :3]


def shows(browser, **values):
    """Waits until the picture of a request is shown."""
    wanted = picture(OFFER.job(values))
    until(lambda: element(browser, "picture").is_displayed())
    until(lambda: wanted.shape == (now := pixels(browser)).shape and (wanted == now).all())


def write(browser, name, text):
    field = element(browser, name)
    field.clear()
    field.send_keys(text)


def complaints(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]


def test_a_person_types_and_sees_and_keeps_pictures(browser):
    with running() as server:
        browser.get(f"http://{server.address}/")
        shows(browser, prompt=OFFER.prompt)
        write(browser, "prompt", "a green 7")
        shows(browser, prompt="a green 7")
        write(browser, "prompt", "a gray 7")
        until(lambda: "gray" in element(browser, "said").text)
        screenshot(browser, "refused")
        write(browser, "prompt", "a <b>blue</b> 7")
        shows(browser, prompt="a <b>blue</b> 7")
        write(browser, "prompt", "a blue 7")
        write(browser, "seed", "41")
        browser.find_element("css selector", "[data-steps='4']").click()
        element(browser, "style").send_keys("on blue")
        element(browser, "size").send_keys("16x8")
        asked = dict(prompt="a blue 7", style="on blue", seed=41, steps=4, size="16x8")
        shows(browser, **asked)
        assert "denoise" in element(browser, "time").text
        screenshot(browser, "drawn")
        element(browser, "save").click()
        file = until(lambda: list(browser.downloads.glob("*.png")))[0]
        with Image.open(file) as image:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels(browser))
            notes = image.text
        assert file.name == "picture-41.png"
        assert notes == {
            "prompt": "a blue 7",
            "style": "on blue",
            "seed": "41",
            "steps": "4",
            "guidance": "3",
            "size": "16x8",
        }
        # Not live: what is typed waits for the button, and a free seed is another each time.
        element(browser, "live").click()
        element(browser, "lock").click()
        write(browser, "prompt", "a red 1")
        time.sleep(0.2)
        shows(browser, **asked)
        element(browser, "draw").click()
        seed = int(until(lambda: element(browser, "seed").get_property("value")))
        assert seed != 41
        shows(browser, **asked | {"prompt": "a red 1", "seed": seed})
        assert not complaints(browser)


def drag(browser, *points, pointer="mouse", pressure=0.0):
    """Moves a pressed pointer over the canvas; points are shares of its sides."""
    box = element(browser, "canvas").rect
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    buttons = {"button": "left", "pointerType": pointer, "force": pressure, "clickCount": 1}
    for number, (x, y) in enumerate(places):
        kind = "mouseMoved" if number else "mousePressed"
        event = {"type": kind, "x": x, "y": y, "buttons": 1} | buttons
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)
        yield x, y
    event = {"type": "mouseReleased", "x": x, "y": y} | buttons
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def inked(browser):
    """Which of the 64 x 64 pixels of the picture are white, where it is a sketch; None where it is none."""
    if not element(browser, "picture").is_displayed():
        return None
    picture = pixels(browser)
    return picture[..., 0] > 127 if picture.shape == (64, 64, 3) else None


def shows_ink(browser, *where, without=()):
    """Waits until there is ink at these places, shares of the sides, and none at others."""

    def ready():
        ink = inked(browser)
        found = [ink is not None and ink[int(64 * y), int(64 * x)] for x, y in (*where, *without)]
        return ink is not None and found == [True] * len(where) + [False] * len(without)

    until(ready)
    return inked(browser)


def test_a_person_draws_and_the_picture_follows(browser):
    left, middle, right, below = (0.2, 0.3), (0.5, 0.3), (0.8, 0.3), (0.5, 0.8)
    with running(offer=SKETCHES) as server:
        browser.get(f"http://{server.address}/")
        until(lambda: element(browser, "picture").is_displayed())
        stroke = drag(browser, left, middle, right)
        next(stroke)
        next(stroke)
        shows_ink(browser, left, middle, without=[right, below])  # while the pointer is down
        for _ in stroke:
            pass
        line = shows_ink(browser, left, middle, right, without=[below])
        assert 0.04 < line[:, 32].mean() < 0.08  # a line of the width that the offer asks for
        for _ in drag(browser, below, (0.52, 0.8)):
            pass
        shows_ink(browser, left, right, below)
        screenshot(browser, "sketch")
        element(browser, "undo").click()
        np.testing.assert_array_equal(shows_ink(browser, left, right, without=[below]), line)
        browser.find_element("tag name", "body").send_keys("\ue009", "y")  # Control
        shows_ink(browser, below)
        element(browser, "eraser").click()
        for _ in drag(browser, right, (0.7, 0.3)):
            pass
        shows_ink(browser, left, below, without=[right])
        element(browser, "keep").click()
        file = until(lambda: list(browser.downloads.glob("sketch-*.png")))[0]
        with Image.open(file) as image:
            assert image.text["prompt"] == SKETCHES.prompt and image.text["seed"] == "0"
            assert image.getpixel((int(0.2 * image.width), int(0.3 * image.height)))[0] > 127
            assert image.getpixel((0, 0))[0] == 0
        element(browser, "clear").click()
        until(lambda: inked(browser) is not None and not element(browser, "redo").is_enabled())
        wanted = picture(SKETCHES.job({"prompt": SKETCHES.prompt}))
        until(lambda: (pixels(browser) == wanted).all())
        element(browser, "undo").click()
        shows_ink(browser, left, below)
        element(browser, "blend").click()
        screenshot(browser, "blend")
        resize(browser, "phone")
        element(browser, "blend").click()
        element(browser, "brush").click()
        touch(browser, (0.2, 0.6), (0.3, 0.6))
        shows_ink(browser, left, below, (0.25, 0.6))
        resize(browser, "desktop")
        assert not complaints(browser)


def test_a_photo_is_sent_as_one_and_can_be_drawn_upon(browser, tmp_path):
    photo = np.full((300, 300, 3), 255, np.uint8)
    photo[:, 150:] = 0
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    with running(offer=SKETCHES) as server:
        browser.get(f"http://{server.address}/")
        until(lambda: element(browser, "picture").is_displayed())
        element(browser, "photo").send_keys(str(tmp_path / "photo.jpg"))
        shows_ink(browser, (0.8, 0.2), (0.8, 0.8), without=[(0.2, 0.2), (0.2, 0.8)])
        for _ in drag(browser, (0.1, 0.2), (0.3, 0.2)):
            pass
        shows_ink(browser, (0.2, 0.2), (0.8, 0.8), without=[(0.2, 0.8)])
        screenshot(browser, "photo")
        (tmp_path / "none.png").write_bytes(b"no picture")
        element(browser, "photo").send_keys(str(tmp_path / "none.png"))
        until(lambda: "no picture" in element(browser, "said").text)
        assert not complaints(browser)


def touch(browser, *points):
    """Moves a finger over the canvas."""
    browser.execute_script("document.getElementById('canvas').scrollIntoView({block: 'center'})")
    box = browser.execute_script(
        "const box = document.getElementById('canvas').getBoundingClientRect();"
        "return [box.left, box.top, box.width, box.height]"
    )
    left, top, width, height = box
    for number, (x, y) in enumerate(points):
        place = {"x": left + x * width, "y": top + y * height}
        event = {"type": "touchMove" if number else "touchStart", "touchPoints": [place]}
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", event)
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


@pytest.mark.parametrize("killed", [True, False])
def test_a_page_recovers_from_a_server_that_ended(browser, killed):
    """By SIGKILL, and in good order."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with process(port) if killed else running(port=port):
        browser.get(f"http://127.0.0.1:{port}/")
        shows(browser, prompt=OFFER.prompt)
    state = element(browser, "state")
    until(lambda: state.get_attribute("data-state") == "closed")
    write(browser, "prompt", "a 9 on red")
    screenshot(browser, "lost")
    with running(port=port):
        shows(browser, prompt="a 9 on red")
        assert state.get_attribute("data-state") == "open"
    complaints(browser)


def test_a_page_asks_again_where_the_server_failed(browser):
    calls = []

    def fail_once(jobs):
        calls.append(jobs)
        if len(calls) == 1:
            raise RuntimeError("a fault of the model")
        return draw(jobs)

    with running(fail_once) as server:
        browser.get(f"http://{server.address}/")
        shows(browser, prompt=OFFER.prompt)
    assert len(calls) == 2
    complaints(browser)


def test_a_page_asks_for_a_token_and_keeps_it_out_of_sight(browser):
    with running(token="a" * 20) as server:
        browser.get(f"http://{server.address}/")
        until(lambda: element(browser, "door").is_displayed())
        screenshot(browser, "token")
        write(browser, "token", "a" * 20 + "\n")
        shows(browser, prompt=OFFER.prompt)
        browser.execute_script("sessionStorage.clear()")
        browser.get(f"http://{server.address}/api")
        browser.get(f"http://{server.address}/#token={'a' * 20}")
        shows(browser, prompt=OFFER.prompt)
        assert browser.current_url == f"http://{server.address}/"
