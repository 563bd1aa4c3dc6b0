"""Evaluations that are killed, or shared by several processes: the same features and numbers."""

import json
import signal
import time

import numpy as np
import pytest
from helpers.metric_networks import write_clip
from helpers.metric_pictures import make_pictures, write_pictures
from helpers.pods import finish_pod, start_one, start_pod

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
