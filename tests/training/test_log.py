"""Metric lines, resume, pictures, curves and progress lines."""

import io
import json
import math
import os
import resource
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


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def lines(workdir):
    """Parsed by the letter of JSON, which has no NaN."""
    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]


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


def test_lines_have_the_step_first_and_numbers_of_any_kind(tmp_path):
    with MetricLog(tmp_path, resume_step=None) as log:
        log.write(1, {"loss/scm": 0.5, "grad/norm": np.float32(2), "time/n": 3})
        log.write(np.int32(2), {"loss/scm": jnp.float32(0.25)})
        assert len(lines(tmp_path)) == 2, "visible before close: a killed process loses nothing"
    assert lines(tmp_path) == [
        {"step": 1, "loss/scm": 0.5, "grad/norm": 2.0, "time/n": 3.0},
        {"step": 2, "loss/scm": 0.25},
    ]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert all(line.startswith('{"step": ') for line in text.splitlines())


def test_non_finite_values_are_null(tmp_path):
    with MetricLog(tmp_path, resume_step=None) as log:
        log.write(
            1, {"a": math.nan, "b": math.inf, "c": -np.inf, "d": jnp.float32("nan"), "e": 1.0}
        )
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": None, "e": 1.0}]
    scalars = [v for event in board_events(tmp_path) for v in event.summary.value]
    assert [(v.tag, v.simple_value) for v in scalars] == [("e", 1.0)]


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


def test_resume_keeps_a_whole_last_line_without_its_newline(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "x": 1}\n{"step": 2, "x": 2}')
    with MetricLog(tmp_path, resume_step=2) as log:
        log.write(3, {"x": 3})
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3]


def test_fresh_start_drops_what_a_run_without_checkpoint_left(tmp_path):
    for resume_step in (None, None, 0):
        with MetricLog(tmp_path, resume_step=resume_step) as log:
            log.write(1, {"x": 1})
    assert lines(tmp_path) == [{"step": 1, "x": 1.0}]


def test_tensorboard_purges_on_resume(tmp_path):
    with MetricLog(tmp_path, resume_step=None) as log:
        log.write(7, {"loss/x": 0.5})
    with MetricLog(tmp_path, resume_step=3) as log:
        log.write(4, {"loss/x": 0.25})
    events = board_events(tmp_path)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert sorted(scalars) == [(4, "loss/x", 0.25), (7, "loss/x", 0.5)]
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
        with pytest.raises(UserError, match=f"cannot write {log.path}: File too large"):
            log.write(2, {"x": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    assert read_metrics(log.path)[0] == {"step": 1, "x": 1.0}


def test_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in workdir"):
        MetricLog(tmp_path / "file" / "run", resume_step=None)


def test_images(tmp_path):
    color = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    with MetricLog(tmp_path, resume_step=None) as log:
        log.image(40, "ema/2_steps", color)
        log.image(40, "gray", color[..., 0])
        for wrong in (color / 255, color[..., :2], color[None]):
            with pytest.raises(ValueError, match="wrong: need uint8"):
                log.image(1, "wrong", wrong)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "00000040_ema-2_steps.png",
        "00000040_gray.png",
    ]
    with Image.open(tmp_path / "samples" / "00000040_ema-2_steps.png") as image:
        np.testing.assert_array_equal(np.asarray(image), color)
    shown = [v for e in board_events(tmp_path) for v in e.summary.value]
    assert [(v.tag, v.image.width, v.image.height) for v in shown] == [
        ("ema/2_steps", 9, 6),
        ("gray", 9, 6),
    ]
    with Image.open(io.BytesIO(shown[0].image.encoded_image_string)) as image:
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
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "curves.png",
        "metrics.jsonl",
        "samples",
        "tensorboard",
    ]


def test_curves_of_a_torn_file_and_of_none(tmp_path):
    assert not draw_curves(tmp_path / "metrics.jsonl", tmp_path / "out.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a/b": 1}\n{"step": 2, "a/')
    assert draw_curves(tmp_path / "metrics.jsonl", tmp_path / "out.png")
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


def test_write_json_atomic(tmp_path):
    path = tmp_path / "config.json"
    write_json_atomic(path, {"b": [1, 2.5], "a": None})
    assert json.loads(path.read_text()) == {"b": [1, 2.5], "a": None}
    assert list(json.loads(path.read_text())) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"x": math.nan})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"x": object()})
    assert json.loads(path.read_text())["b"] == [1, 2.5], "the old file is left alone"
    with pytest.raises(UserError, match=r"cannot write .*/no/x\.json: No such file"):
        write_json_atomic(tmp_path / "no" / "x.json", {})


def test_write_json_atomic_never_shows_half_a_file(tmp_path):
    path = tmp_path / "x.json"
    write_json_atomic(path, [0] * 20000)
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


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_progress_prints_plain_lines_at_intervals():
    clock, stream = Clock(), io.StringIO()
    with Progress(1000, 200, interval=20, stream=stream, clock=clock) as bar:
        for step in range(201, 242):
            bar.update(step, {"loss/scm": 0.123456})
            clock.now += 1.0 if step > 201 else 0.5
        clock.now = 1e6
        bar.update(1000)
    printed = stream.getvalue().splitlines()
    # The first at once; the next after 20 seconds, when 21 updates took 20.5 s; the last always.
    assert printed[0] == "step 201/1000  loss/scm 0.1235"
    assert printed[1] == "step 222/1000  loss/scm 0.1235  1.02 steps/s  ETA 0:12:39"
    assert printed[2].startswith("step 1000/1000  ")
    assert printed[2].endswith("ETA 0:00:00")
    assert len(printed) == 3


def test_progress_on_a_terminal_is_a_bar():
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream:
        with Progress(10, 4, stream=stream) as bar:
            for step in range(5, 11):
                bar.update(step, {"loss": 0.5})
        stream.flush()
        text = os.read(master, 65536).decode()
    os.close(master)
    assert "10/10" in text and "100%" in text and "loss=0.5" in text
