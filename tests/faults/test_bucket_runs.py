"""A training, and what is made of it, with every path in a bucket; killed again and again.

``BUCKET_KILLS=5 pytest -s tests/faults/test_bucket_runs.py`` kills each five times, and counts.
"""

import json
import os
import random
import time

import jax
import numpy as np
import pytest
from helpers import bucket_servers, encode_worker, encoding, runs
from helpers.encoding import encode_small
from helpers.pods import TRAIN, finish_pod, start_one, start_pod

from sprint_jax import evaluate, export, sample
from sprint_jax.checkpoints.checkpoint import complete_steps, load_params
from sprint_jax.checkpoints.workdir import read_metrics
from sprint_jax.core.errors import UserError
from sprint_jax.core.files import PROBE
from sprint_jax.core.fingerprint import fingerprint
from sprint_jax.core.storage import as_path, walk
from sprint_jax.data.latents.cache import open_cache

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick")]

SPEC = "configs/digits.py:teacher,small"
STEPS = 8
KILLS = int(os.environ.get("BUCKET_KILLS", 1))  # a start is what takes time
SHORT = {"steps": STEPS, "log__checkpoint_every": 2, "log__sample_every": 4, "log__exam": 0}


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
    with bucket_servers.bucket(request.param) as address:
        yield address


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run on a disk that nothing disturbs."""
    return runs.train_here(runs.tiny(SPEC, data, **SHORT), tmp_path_factory.mktemp("whole") / "run")


def killed(name, start, progress, within=1.0, check=lambda: False):
    """Starts a process until one ends by itself; some are killed a moment after ``progress()`` has changed.

    The moment is up to ``within`` seconds. A start that fails is no survivor. ``check()`` follows every kill,
    and says whether all was written before it.
    """
    moments, kills = random.Random(time.time_ns()), 0
    for attempt in range(KILLS + 1):
        before, process = progress(), start()
        if attempt < KILLS:
            while progress() == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, within))
            kills += process.poll() is None
            process.kill()
        ended = runs.finish(process)
        assert ended.code in ({0, -9} if attempt < KILLS else {0}), ended.err
        if check() or ended.code == 0:
            break
    print(f"{name}: {attempt + 1} starts, {kills} killed, nothing lost")
    assert kills


@pytest.fixture(scope="module")
def trained(bucket, data, whole):
    """A workdir in the bucket that was killed at random moments until it was done, and the undisturbed one."""
    workdir = f"{bucket}/run"
    words = runs.words(SPEC, data, workdir, **SHORT)
    steps = as_path(f"{workdir}/checkpoints")
    killed(workdir, lambda: runs.start(words), lambda: complete_steps(steps))
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


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)  # where Orbax does not write
def test_two_processes_write_their_shards(bucket, trained, data):
    whole, _ = trained
    once = SHORT | {"log__checkpoint_every": STEPS, "log__sample_every": 1000}
    words = runs.words(SPEC, data, f"{bucket}/pod", **once, mesh__data=1, mesh__fsdp=8)
    for ended in finish_pod(start_pod([*TRAIN, *words])):
        assert ended.code == 0, ended.err
    mine, other = (
        {
            record["step"]: record["loss/flow"]
            for record in read_metrics(as_path(path) / "metrics.jsonl")
        }
        for path in (f"{bucket}/pod", str(whole))
    )
    assert mine == pytest.approx(other, rel=1e-5)
    marks = {name for name in walk(as_path(f"{bucket}/pod/checkpoints/{STEPS}")) if "done/" in name}
    assert marks == {"done/0-of-2", "done/1-of-2"}
    params, _ = load_params(f"{bucket}/pod", "raw")
    expected, _ = load_params(str(whole), "raw")
    for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


COMMANDS = {
    "sample": (sample, ["--prompt", "a red 3", "--steps", "2"], ["00000.png", "grid.png"]),
    "export": (export, ["--format", "diffusers"], ["model_index.json", "transformer/config.json"]),
    "evaluate": (evaluate, ["--count", "12", "--batch", "12"], ["report.json", "report.png"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_made_of_it_is_whole_after_kills_too(trained, bucket, name):
    (command, words, expected), (_, workdir) = COMMANDS[name], trained
    at, out = ("--workdir" if name == "export" else "--model"), f"{bucket}/{name}"

    def call(folder):
        file = "/report.json" if name == "evaluate" else ""
        return [at, workdir, *words, "--out", folder + file]

    command.main(call(f"{out}/whole"))
    whole = walk(as_path(f"{out}/whole"))
    assert set(expected) <= set(whole)

    def written():
        return sorted(set(walk(as_path(f"{out}/killed"))) - {PROBE})

    def check():
        for file in written():
            mine, other = (as_path(f"{out}/{folder}/{file}") for folder in ("killed", "whole"))
            if file == "report.json":  # which has times
                mine, other = (json.loads(each.read_text())["runs"] for each in (mine, other))
                assert [run["accuracy"] for run in mine] == [run["accuracy"] for run in other]
            else:
                assert mine.read_bytes() == other.read_bytes()
        return written() == sorted(whole)

    killed(out, lambda: runs.start(call(f"{out}/killed"), name), written, 0.0, check)
    assert written() == sorted(whole)
    assert not list(runs.ROOT.glob("*:"))  # no folder with the name of a scheme


def test_an_encoding_that_is_killed_ends_as_the_undisturbed_one_and_is_read_there(bucket, tmp_path):
    whole, out = encode_small(tmp_path / "whole", encode__unit=4), f"{bucket}/latents"
    command = [encode_worker.__file__, *encoding.words(out, encode__unit=4)]
    units = as_path(f"{out}/units")
    killed(out, lambda: start_one(command, devices=8), lambda: len(list(units.glob("*.json"))))
    expected = encoding.hashes(whole)
    assert {name for name in walk(as_path(out)) if not name.endswith(".png")} == set(expected)
    for name in expected:
        assert (as_path(out) / name).read_bytes() == (whole / name).read_bytes(), name
    here, there = open_cache(whole), open_cache(out)
    order = random.Random(0).sample(range(len(here)), len(here))
    for mine, other in zip(here.__getitems__(order), there.__getitems__(order), strict=True):
        assert mine.key == other.key and mine.captions == other.captions
        assert mine.latents.tobytes() == other.latents.tobytes()
        assert [text.tobytes() for text in mine.texts] == [text.tobytes() for text in other.texts]
    (as_path(out) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        open_cache(out)
