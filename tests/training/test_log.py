"""Metric lines, resume, pictures, curves and progress lines."""

import io
import json
import math
import os
import resource
import select
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sprint_jax.checkpoints.workdir import read_metrics
from sprint_jax.core.errors import UserError
from sprint_jax.core.files import write_json_atomic
from sprint_jax.core.progress import Progress
from sprint_jax.training.curves import draw_curves
from sprint_jax.training.log import MetricLog


def lines(workdir):
    """Lines of metrics.jsonl, without NaN, which JSON does not have."""
    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    assert "NaN" not in text and "Infinity" not in text
    return [json.loads(line) for line in text.splitlines()]


def board_events(workdir):
    """All TensorBoard events, in order of file names; the record framing is 12 + n + 4 bytes."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            events.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += 16 + size
    return events


def test_lines_have_the_step_first_and_null_for_what_is_not_finite(tmp_path):
    with MetricLog(tmp_path, resume_step=None) as log:
        log.write(1, {"loss/scm": 0.5, "grad/norm": np.float32(2), "time/n": 3})
        log.write(np.int32(2), {"a": math.nan, "b": -np.inf, "c": jnp.float32("nan"), "d": 1.0})
        found = lines(tmp_path)  # visible before close: a killed process loses nothing
    assert found == [
        {"step": 1, "loss/scm": 0.5, "grad/norm": 2.0, "time/n": 3.0},
        {"step": 2, "a": None, "b": None, "c": None, "d": 1.0},
    ]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert all(line.startswith('{"step": ') for line in text.splitlines())
    scalars = [v.tag for event in board_events(tmp_path) for v in event.summary.value]
    assert scalars == ["loss/scm", "grad/norm", "time/n", "d"]


@pytest.mark.parametrize(
    "tail", [b"", b'{"step": 5, "loss/s', b"\0" * 40, b'{"step": 9}', b"\xff\n"]
)
def test_resume_drops_later_steps_and_torn_lines(tmp_path, tail):
    with MetricLog(tmp_path, resume_step=None) as log:
        for step in (1, 2, 3, 4):
            log.write(step, {"x": step})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    with MetricLog(tmp_path, resume_step=2) as log:
        assert lines(tmp_path) == [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}]
        log.write(3, {"x": 30})
    assert lines(tmp_path)[2:] == [{"step": 3, "x": 30.0}]
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_keeps_a_whole_last_line_and_a_fresh_start_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "x": 1}\n{"step": 2, "x": 2}')
    for resume_step, steps in ((2, [1, 2, 3]), (None, [3]), (0, [3])):
        with MetricLog(tmp_path, resume_step=resume_step) as log:
            log.write(3, {"x": 3})
        assert [record["step"] for record in lines(tmp_path)] == steps


def test_tensorboard_purges_on_resume(tmp_path):
    for resume_step, step in ((None, 7), (3, 4)):
        with MetricLog(tmp_path, resume_step=resume_step) as log:
            log.write(step, {"loss/x": 1 / step})
    events = board_events(tmp_path)
    assert sorted(e.step for e in events if e.summary.value) == [4, 7]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert 4 in starts, "TensorBoard hides what was logged from step 4 on before the resume"


def test_full_disk_is_a_user_error(tmp_path):
    """A limit on file sizes stands in for a full disk."""
    log = MetricLog(tmp_path, resume_step=None)
    log.write(1, {"x": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(UserError, match=f"{log.path}: File too large"):
            log.write(2, {"x": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    assert read_metrics(log.path)[0] == {"step": 1, "x": 1.0}
    with pytest.raises(UserError, match=f"{log.path}/run"):
        MetricLog(log.path / "run", resume_step=None)


def test_images(tmp_path):
    color = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    with MetricLog(tmp_path, resume_step=None) as log:
        log.image(40, "ema/2_steps", color)
        log.image(40, "gray", color[..., 0])
        for wrong in (color / 255, color[..., :2], color[None]):
            with pytest.raises(ValueError, match="wrong: need uint8"):
                log.image(1, "wrong", wrong)
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == ["00000040_ema-2_steps.png", "00000040_gray.png"]
    shown = [v for e in board_events(tmp_path) for v in e.summary.value]
    assert [(v.tag, v.image.width, v.image.height) for v in shown] == [
        ("ema/2_steps", 9, 6),
        ("gray", 9, 6),
    ]
    for file in (pictures[0], io.BytesIO(shown[0].image.encoded_image_string)):
        with Image.open(file) as image:
            np.testing.assert_array_equal(np.asarray(image), color)


def test_curves_grow_with_groups_and_bear_gaps(tmp_path):
    with MetricLog(tmp_path, resume_step=None) as log:
        log.curves()
        assert not (tmp_path / "curves.png").exists(), "nothing to draw yet"
        for step in range(300):
            noise = math.nan if 50 < step < 90 or step == 7 else math.exp(-step / 30)
            log.write(step, {"loss/scm": noise, **{f"loss/part{i}": i for i in range(12)}})
        log.write(300, {"loss/never": math.nan})
        log.curves()
        with Image.open(tmp_path / "curves.png") as image:
            single = image.size
            assert np.asarray(image.convert("L")).std() > 5, "something is drawn"
        log.write(301, {"grad/norm": 1, "time/step": 2, "plain": 3})
        log.curves()
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1.8 * single[0] and image.height > 1.8 * single[1], "4 panels"
    assert not list(tmp_path.glob("*tmp*")) and not list(tmp_path.glob(".*"))
    # Of a file that ends in the middle of a line.
    (tmp_path / "torn.jsonl").write_text('{"step": 1, "a/b": 1}\n{"step": 2, "a/')
    assert draw_curves(tmp_path / "torn.jsonl", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    stream = io.StringIO()
    with MetricLog(tmp_path / "run", resume_step=None) as log, Progress(3, stream=stream) as bar:
        log.write(1, {"x": 1})
        log.image(1, "x", np.zeros((2, 2, 3), np.uint8))
        log.curves()
        log.sync()
        bar.update(3, {"x": 1})
    write_json_atomic(tmp_path / "config.json", {})
    assert not list(tmp_path.iterdir())
    assert stream.getvalue() == ""


def test_write_json_atomic_never_shows_half_a_file(tmp_path):
    path = tmp_path / "x.json"
    write_json_atomic(path, {"b": [1, 2.5], "a": None})
    assert list(json.loads(path.read_text()).items()) == [("b", [1, 2.5]), ("a", None)]
    for value, error in ((math.nan, ValueError), (object(), TypeError)):
        with pytest.raises(error):
            write_json_atomic(path, {"x": value})
    with pytest.raises(UserError, match=r"no/x\.json"):
        write_json_atomic(tmp_path / "no" / "x.json", {})
    assert json.loads(path.read_text())["b"] == [1, 2.5], "the old file is left alone"
    stop, torn = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                json.loads(path.read_text())
            except ValueError as error:
                torn.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(15):
        write_json_atomic(path, [value] * 20000)
    stop.set()
    reader.join()
    assert not torn


def test_progress_prints_plain_lines_at_intervals():
    now, stream = [100.0], io.StringIO()
    with Progress(1000, 200, interval=20, stream=stream, clock=lambda: now[0]) as bar:
        for step in range(201, 242):
            bar.update(step, {"loss/scm": 0.123456})
            now[0] += 1.0 if step > 201 else 0.5
        now[0] = 1e6
        bar.update(1000)
    first, second, last = stream.getvalue().splitlines()
    # The first at once; the next after 20 seconds, when 21 updates took 20.5 s; the last always.
    assert first == "step 201/1000  loss/scm 0.1235"
    assert second == "step 222/1000  loss/scm 0.1235  1.02 steps/s  ETA 0:12:39"
    assert last.startswith("step 1000/1000  ") and last.endswith("ETA 0:00:00")


def test_progress_on_a_terminal_is_a_bar():
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream:
        with Progress(10, 4, stream=stream) as bar:
            for step in range(5, 11):
                bar.update(step, {"loss": 0.5})
        stream.flush()
        text = ""
        # A terminal hands on what was written in parts, when it gets to it.
        while "100%" not in text and select.select([master], [], [], 10)[0]:
            text += os.read(master, 65536).decode()
    os.close(master)
    assert "10/10" in text and "100%" in text and "loss=0.5" in text
