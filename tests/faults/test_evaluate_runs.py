"""Evaluations that are killed, or shared by several processes: the same features and numbers."""

import json
import signal
import time

import numpy as np
import pytest
from helpers.metric_networks import write_clip
from helpers.metric_pictures import make_pictures, write_pictures
from helpers.pods import finish_pod, start_one, start_pod
from helpers.workdirs import make_workdir

COUNT = 40
COMMAND = ["-c", "import sys; from sprint_jax.metrics import features; features.PART = 4; "]
COMMAND[1] += "from sprint_jax import evaluate; from sprint_jax.core import cli; "
COMMAND[1] += "cli.run_command(evaluate.main)"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_pictures(root / "fake", make_pictures(COUNT, 1, 16, 40))
    write_pictures(root / "real", make_pictures(COUNT, 2, 16, 40))
    write_clip(root / "clip")
    (root / "prompts.txt").write_text("".join(f"thing {n % 8}\n" for n in range(COUNT)))
    return root


def words(root, name):
    flags = dict(pictures=root / "fake", reference=root / "real", prompts=root / "prompts.txt")
    flags |= dict(clip=root / "clip", clip336=root / "clip", metrics="clip,diversity,cmmd")
    flags |= dict(out=root / f"{name}.json", batch=4)
    return [
        *COMMAND,
        *(word for flag, value in flags.items() for word in (f"--{flag}", str(value))),
    ]


def parts(root, name):
    return sorted((root / f"{name}.cache").glob("*/part-*.npy"))


def test_one_process_is_two_with_four_devices_is_one_that_was_killed(root, quick):
    process = start_one(words(root, "killed"), devices=1)
    deadline = time.monotonic() + 240
    while len(parts(root, "killed")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in parts(root, "killed")}
    assert 3 <= len(before) < 4 * COUNT // 4 and not (root / "killed.json").exists()

    pod = finish_pod(start_pod(words(root, "pod")))
    assert [ended.code for ended in pod] == [0, 0], pod[0].err + pod[1].err
    (again,) = finish_pod([start_one(words(root, "killed"), devices=1)])
    assert again.code == 0, again.err
    # What was done was not done again.
    assert {path: path.stat().st_mtime_ns for path in before} == before

    one, two = ([np.load(path) for path in parts(root, name)] for name in ("killed", "pod"))
    assert len(one) == len(two) == 4 * COUNT // 4
    for a, b in zip(one, two, strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()
    found = [json.loads((root / f"{name}.json").read_text()) for name in ("killed", "pod")]
    assert found[0]["protocol"] == found[1]["protocol"]
    for name, number in found[0]["metrics"].items():
        other = found[1]["metrics"][name]
        assert other["value"] == pytest.approx(number["value"], rel=1e-4), name
        assert other["standard_error"] == pytest.approx(number["standard_error"], rel=1e-4), name


def drawn(root, name):
    folder = root / f"{name}.cache" / "pictures"
    return {path.name: path.read_bytes() for path in folder.glob("*.jpg")}


def test_pictures_of_a_model_are_drawn_once_by_any_number_of_processes(root, quick):
    """Two processes draw what one drew that was killed on the way, byte for byte; what was there stays."""
    model, prompts = make_workdir(root / "student", "distill"), root / "digits.txt"
    prompts.write_text("".join(f"a {n % 10} on blue\n" for n in range(COUNT)))

    def command(name):
        flags = dict(model=model, prompts=prompts, clip=root / "clip", metrics="clip")
        flags |= dict(out=root / f"{name}.json", batch=4, steps=1, seed=3)
        return [
            *COMMAND,
            *(word for key, value in flags.items() for word in (f"--{key}", str(value))),
        ]

    process = start_one(command("stopped"), devices=1)
    deadline = time.monotonic() + 240
    while (
        len(drawn(root, "stopped")) < 6 and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = drawn(root, "stopped")
    assert 6 <= len(before) < COUNT and not (root / "stopped.json").exists()
    pod = finish_pod(start_pod(command("shared")))
    assert [ended.code for ended in pod] == [0, 0], pod[0].err + pod[1].err
    (again,) = finish_pod([start_one(command("stopped"), devices=1)])
    assert again.code == 0, again.err
    one, two = drawn(root, "stopped"), drawn(root, "shared")
    assert len(one) == COUNT and one == two
    assert all(one[name] == content for name, content in before.items())
    found = [json.loads((root / f"{name}.json").read_text()) for name in ("stopped", "shared")]
    values = [each["metrics"]["clip"]["value"] for each in found]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
