"""A training, and what is made of it, with every path in a bucket; killed again and again."""

import json
import os
import random
import time

import pytest
from helpers import bucket_servers, runs

from sprint_jax import evaluate, export, sample
from sprint_jax.checkpoints.checkpoint import complete_steps, load_params
from sprint_jax.checkpoints.workdir import read_metrics
from sprint_jax.core.fingerprint import fingerprint
from sprint_jax.core.storage import as_path, walk

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick")]

SPEC = "configs/digits.py:teacher,small"
STEPS, KILLS = 12, 3
SHORT = {"steps": STEPS, "log__checkpoint_every": 2, "log__sample_every": 6, "log__exam": 0}


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
    with bucket_servers.bucket(request.param) as address:
        yield address


@pytest.fixture(scope="module")
def trained(bucket, data, tmp_path_factory):
    """A workdir in the bucket that was killed at random moments until it was done, and the undisturbed one."""
    whole = runs.train_here(
        runs.tiny(SPEC, data, **SHORT), tmp_path_factory.mktemp("whole") / "run"
    )
    workdir, kills, moments = f"{bucket}/run", 0, random.Random(time.time_ns())
    words = runs.words(SPEC, data, workdir, **SHORT)
    words[words.index("--workdir") + 1] = workdir
    checkpoints = as_path(f"{workdir}/checkpoints")
    for attempt in range(10):
        before = complete_steps(checkpoints)
        process = runs.start(words)
        if attempt < KILLS:
            while complete_steps(checkpoints) == before and process.poll() is None:
                time.sleep(0.1)
            time.sleep(moments.uniform(0, 1))
            kills += process.poll() is None
            process.kill()
        ended = runs.finish(process)
        if ended.code == 0:
            break
    assert ended.code == 0, ended.err
    assert kills
    return whole, workdir


def test_it_ends_as_the_undisturbed_run_and_no_line_is_lost(trained):
    whole, workdir = trained
    (mine, meta), (other, _) = load_params(workdir, "raw"), load_params(str(whole), "raw")
    assert meta["step"] == STEPS and fingerprint(mine) == fingerprint(other)
    found, expected = (
        {
            record["step"]: record["loss/flow"]
            for record in read_metrics(as_path(place) / "metrics.jsonl")
        }
        for place in (workdir, str(whole))
    )
    assert found == expected
    names = walk(as_path(workdir))
    assert {"config.json", "curves.png", f"samples/{STEPS:08d}_ema.png"} <= set(names)


def test_it_is_sampled_measured_and_exported_into_the_bucket(trained, bucket):
    _, workdir = trained
    sample.main(
        ["--model", workdir, "--prompt", "a red 3", "--out", f"{bucket}/pictures", "--steps", "2"]
    )
    assert sorted(walk(as_path(f"{bucket}/pictures"))) == ["00000.png", "grid.png"]
    export.main(["--workdir", workdir, "--format", "diffusers", "--out", f"{bucket}/exported"])
    names = walk(as_path(f"{bucket}/exported"))
    assert {"model_index.json", "transformer/config.json"} <= set(names)
    report = as_path(f"{bucket}/report.json")
    evaluate.main(["--model", workdir, "--out", str(report), "--count", "12", "--batch", "12"])
    assert json.loads(report.read_text())["model"]["step"] == STEPS
    assert report.with_suffix(".png").is_file()


def test_no_folder_with_the_name_of_a_scheme_is_made(trained, bucket):
    assert not {name for name in os.listdir() if name.endswith(":")}
