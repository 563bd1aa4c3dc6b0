"""The loop's clock, profile windows, and that the host never waits for the step in progress."""

import math
import types

import jax
import pytest
from helpers.refusals import refuse
from helpers.runs import finish, start, tiny, train_here, words

from sprint_jax import train
from sprint_jax.checkpoints.workdir import read_metrics
from sprint_jax.core.progress import Progress
from sprint_jax.training.clock import PARTS, Clock
from sprint_jax.training.log import MetricLog
from sprint_jax.training.profile import Profile

TEACHER = "configs/digits.py:teacher,small"
pytestmark = pytest.mark.usefixtures("quick")


def test_shares_are_of_the_wall_clock_since_the_last_lap():
    hand = types.SimpleNamespace(now=50.0)
    clock = Clock(step=10, images=64, now=lambda: hand.now)
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


def test_the_host_never_waits_for_the_step_in_progress(data, tmp_path, monkeypatch):
    """The host's events are noted in order as (event, step); the step of a "get" is the newest it fetches."""
    events, made = [], []
    never = dict(log__sample_every=1000, log__checkpoint_every=1000)
    c = tiny(TEACHER, data, steps=12, log__every=3, **never)
    lower, get = train.lower_updates, jax.device_get

    def lower_updates(*arguments, **more):
        (lowered,) = lower(*arguments, **more)

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

    def noted(event, original):
        def call(self, step, metrics):
            events.append((event, step))
            original(self, step, metrics)

        return call

    monkeypatch.setattr(train, "lower_updates", lower_updates)
    monkeypatch.setattr(jax, "device_get", device_get)
    for event in ("defer", "write"):
        monkeypatch.setattr(MetricLog, event, noted(event, getattr(MetricLog, event)))
    try:
        metrics = read_metrics(train_here(c, tmp_path / "run") / "metrics.jsonl")
    finally:
        jax.config.update("jax_transfer_guard", "allow")

    dispatched, fetched = 0, []
    for event, step in events:
        if event == "update":
            dispatched = step
        elif event == "get" and 0 < dispatched < 12:
            fetched.append(step)
            assert step < dispatched, events
    # One number in every step but the first, and the three lines.
    assert len(fetched) == 10 + 1 + 3 and set(fetched) == set(range(11))

    # Lines are written when the next step is under way; nothing follows the last.
    for step in (3, 6, 9):
        line, written = events.index(("defer", step)), events.index(("write", step))
        assert events[line + 1] == ("update", step + 1) and line + 1 < written
    assert events.index(("write", 12)) > events.index(("defer", 12))

    assert [record["step"] for record in metrics] == [3, 6, 9, 12]
    for record in metrics:
        shares = [record.pop(f"time/{part}") for part in PARTS]
        assert min(shares) >= 0 and 0 < sum(shares) <= 1
        rate = record.pop("time/images_per_second") * record.pop("time/step_seconds")
        assert math.isclose(rate, 16) and not any(name.startswith("time/") for name in record)


@pytest.mark.slow
def test_a_profile_window_leaves_a_trace_of_this_host(data, tmp_path):
    """In a process of its own: the profiler ends one in which libtpu's compiler was at work."""
    workdir, options = tmp_path / "run", {"log__profile_start": 2, "log__profile_steps": 2}
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
    ("options", "named"),
    [
        (window(-1), "profile_start=-1"),
        (window(1, 0), "profile_steps=0"),
        (window(1, 1, (1,)), "profile_hosts=(1,)"),
        (window(1, 1, ()), "profile_hosts=()"),
    ],
)
def test_windows_that_cannot_be(options, named, tmp_path):
    refuse(Profile, tmp_path, options, parts=[named])


def test_a_deferred_line_is_shown_and_survives_an_error(tmp_path):
    shown = []

    class Shown(Progress):
        def update(self, step, metrics=None):
            shown.append((step, metrics))

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
    assert shown == [(1, {"loss/x": 0.5}), (2, {"loss/x": 0.25})]
