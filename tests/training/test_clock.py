"""The loop's clock, profile windows, and that the host never waits for the step in progress."""

import math
import signal

import jax
import pytest
from helpers.runs import finish, quick_compilation, start, tiny, words, write_digits

from sprint_jax import train
from sprint_jax.checkpoints.workdir import read_metrics
from sprint_jax.core.errors import UserError
from sprint_jax.core.progress import Progress
from sprint_jax.training import log as log_module
from sprint_jax.training.clock import PARTS, Clock
from sprint_jax.training.log import MetricLog
from sprint_jax.training.profile import Profile

TEACHER = "configs/digits.py:teacher,small"


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def test_shares_are_of_the_wall_clock_since_the_last_lap():
    hand = Hand()
    clock = Clock(step=10, images=64, now=hand)
    for part, seconds in (("data_wait", 1), ("step", 4), ("step", 2), ("log", 1.5)):
        with clock(part):
            hand.now += seconds
        hand.now += 0.375  # the loop itself
    assert clock.lap(14) == {
        "time/data_wait": 0.1,
        "time/step": 0.6,
        "time/log": 0.15,
        "time/checkpoint": 0.0,
        "time/step_seconds": 2.5,
        "time/images_per_second": 25.6,
    }
    # The next lap knows nothing of this one, and time within an error counts.
    with pytest.raises(ZeroDivisionError), clock("checkpoint"):
        hand.now += 3
        _ = 1 / 0
    hand.now += 1
    again = clock.lap(15)
    assert again["time/checkpoint"] == 0.75 and again["time/step"] == 0
    assert again["time/step_seconds"] == 4 and again["time/images_per_second"] == 16


def test_an_unknown_part_is_an_error():
    with pytest.raises(KeyError), Clock(0, 1)("lunch"):
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.getbasetemp() / "digits")


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    """A run whose host-side events are noted in order: (event, step). -> (events, metrics, folder)

    The step of a "get" is the newest one whose numbers are fetched.
    """
    events, made, folder = [], [], tmp_path_factory.mktemp("watched") / "run"
    c = tiny(
        TEACHER,
        data,
        steps=12,
        log__every=3,
        log__sample_every=1000,
        log__checkpoint_every=1000,
    )
    lower, get = train.lower_updates, jax.device_get

    def lower_updates(*arguments):
        (lowered,) = lower(*arguments)

        class Program:
            def compile(self):
                compiled = lowered.compile()

                def update(state, batch, frozen):
                    count = 1 + sum(event == "update" for event, _ in events)
                    # From here on to the last step no array may be moved unasked.
                    jax.config.update("jax_transfer_guard", "disallow" if count < 12 else "allow")
                    events.append(("update", count))
                    assert {leaf.committed for leaf in batch.values()} == {True}
                    state, metrics = compiled(state, batch, frozen)
                    made.append(list(metrics.values()))  # kept, so that identities stay unique
                    return state, metrics

                return update

        return [Program()]

    def device_get(tree):
        asked = {id(leaf) for leaf in jax.tree.leaves(tree)}
        steps = [i for i, each in enumerate(made, 1) if asked & {id(leaf) for leaf in each}]
        events.append(("get", max(steps, default=0)))
        return get(tree)

    def defer(self, step, metrics, original=MetricLog.defer):
        events.append(("defer", step))
        original(self, step, metrics)

    def write(self, step, metrics, original=MetricLog.write):
        events.append(("write", step))
        original(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch, quick_compilation():
        patch.setattr(train, "lower_updates", lower_updates)
        patch.setattr(jax, "device_get", device_get)
        patch.setattr(log_module.MetricLog, "defer", defer)
        patch.setattr(log_module.MetricLog, "write", write)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            train.train(c, folder)
        finally:
            signal.signal(signal.SIGTERM, handler)
            jax.config.update("jax_transfer_guard", "allow")
    return events, read_metrics(folder / "metrics.jsonl"), folder


def test_the_host_never_waits_for_the_step_in_progress(watched):
    events, _, _ = watched
    dispatched, fetched = 0, []
    for event, step in events:
        if event == "update":
            dispatched = step
        elif event == "get" and 0 < dispatched < 12:
            fetched.append(step)
            assert step < dispatched, events
    # One number in every step but the first, and the three lines.
    assert len(fetched) == 10 + 1 + 3 and set(fetched) == set(range(11))


def test_lines_are_written_when_the_next_step_is_under_way(watched):
    events, _, _ = watched
    for step in (3, 6, 9):
        line, written = events.index(("defer", step)), events.index(("write", step))
        assert events[line + 1] == ("update", step + 1)
        assert line < events.index(("update", step + 1)) < written
    assert events.index(("write", 12)) > events.index(("defer", 12))  # nothing follows the last


def test_the_shares_of_a_run(watched):
    _, metrics, _ = watched
    assert [record["step"] for record in metrics] == [3, 6, 9, 12]
    for record in metrics:
        shares = [record[f"time/{part}"] for part in PARTS]
        assert min(shares) >= 0 and 0 < sum(shares) <= 1
        rate = record["time/images_per_second"] * record["time/step_seconds"]
        assert math.isclose(rate, 16)
    names = {f"time/{part}" for part in PARTS} | {"time/step_seconds", "time/images_per_second"}
    assert {name for name in metrics[0] if name.startswith("time/")} == names


def test_a_profile_window_leaves_a_trace_of_this_host(data, tmp_path):
    """In a process of its own: the profiler ends one in which libtpu's compiler was at work."""
    workdir, options = tmp_path / "run", {"log__profile_start": 2, "log__profile_steps": 2}
    with quick_compilation():
        ended = finish(start(words(TEACHER, data, workdir, steps=4, **options)))
    assert ended.code == 0 and f"trace: {workdir}/profile/host_0" in ended.out
    traces = list((workdir / "profile" / "host_0").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


def window(start=0, steps=3, hosts=(0,)):
    return {"profile_start": start, "profile_steps": steps, "profile_hosts": hosts}


def test_profiles_are_off_by_default_and_of_whole_steps(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))

    def run(options, first=1, last=9):
        seen.clear()
        with Profile(tmp_path, options) as profile:
            for step in range(first, last + 1):
                profile.at(step, ())
                seen.append(step)
        return [event if isinstance(event, int | str) else event[0] for event in seen]

    assert run(window()) == list(range(1, 10))
    assert run(window(4, 2)) == [1, 2, 3, "start", 4, 5, "stop", 6, 7, 8, 9]
    assert run(window(1, 1), last=2) == ["start", 1, "stop", 2]
    # Resumed inside the window, and ended inside it.
    assert run(window(4, 2), first=5) == [5, 6, 7, 8, 9]
    assert run(window(8, 5)) == [*range(1, 8), "start", 8, 9, "stop"]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert run(window(4, 2, (1, 2))) == list(range(1, 10))
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert "start" in run(window(4, 2, (1, 2)))
    run(window(4, 2, (1, 2)))
    assert ("start", tmp_path / "host_2") in seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (window(-1), "profile_start=-1"),
        (window(1, 0), "profile_steps=0"),
        (window(1, 1, (1,)), r"profile_hosts=\(1,\): name some of the processes 0 to 0"),
        (window(1, 1, ()), "profile_hosts"),
    ],
)
def test_windows_that_cannot_be(options, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        Profile(tmp_path, options)
    assert caught.value.exit_code == 2


def test_a_deferred_line_is_shown_and_survives_an_error(tmp_path):
    class Shown(Progress):
        lines = []  # noqa: RUF012

        def update(self, step, metrics=None):
            self.lines.append((step, metrics))

    with (
        pytest.raises(ZeroDivisionError),
        MetricLog(tmp_path, resume_step=None, progress=Shown(9)) as log,
    ):
        log.defer(1, {"loss/x": jax.numpy.float32(0.5), "grad/y": 2.0})
        assert read_metrics(log.path) == []
        log.defer(2, {"loss/x": 0.25})
        assert read_metrics(log.path) == [{"step": 1, "loss/x": 0.5, "grad/y": 2.0}]
        _ = 1 / 0
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2]
    assert Shown.lines == [(1, {"loss/x": 0.5}), (2, {"loss/x": 0.25})]
