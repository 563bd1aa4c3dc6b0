"""Encoding that is killed, fails while it writes, or is shared by several processes."""

import multiprocessing
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from helpers import encode_worker
from helpers.encoding import Pictures, encode_small, hashes, words
from helpers.pods import finish_pod, start_pod
from helpers.runs import ROOT

from sprint_jax.core.errors import UserError
from sprint_jax.data.latents import cache, encoding


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return encode_small(tmp_path_factory.mktemp("encode") / "latents")


def test_a_full_disk_ends_in_one_line_and_commits_nothing(tmp_path, monkeypatch):
    class Full(cache.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(cache, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"00000-0\.array_record.*No space left"):
        encode_small(tmp_path / "a", Pictures(8))
    assert not list((tmp_path / "a" / "units").iterdir())


def test_killed_at_ten_random_moments_the_content_is_that_of_the_undisturbed_run(
    tmp_path, monkeypatch
):
    # A server imports everything once, and forks for each encoding.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["helpers.encode_worker"])

    def encode(out, units_done=0, seconds=None) -> int:
        process = processes.Process(target=encode_worker.main, args=(words(out, encode__unit=4),))
        process.start()
        if seconds is not None:
            while len(list((out / "units").glob("*.json"))) < units_done and process.is_alive():
                time.sleep(0.0005)
            time.sleep(seconds)
            process.kill()
        process.join(200)
        return process.exitcode

    assert encode(tmp_path / "whole") == 0
    random, folders, killed = np.random.default_rng(time.time_ns()), [tmp_path / "0"], 0
    for turn in range(10):
        done = len(list((folders[-1] / "units").glob("*.json")))
        # Some units on, or just before the manifest; a process may end before its moment.
        status = encode(folders[-1], min(10, done + 1 + turn % 3), random.uniform(0, 0.03))
        killed += status == -signal.SIGKILL
        if status == 0 or done == 10:
            folders.append(tmp_path / str(len(folders)))
    assert killed >= 5
    for out in folders:
        assert encode(out) == 0
        assert hashes(out) == hashes(tmp_path / "whole")


def test_two_processes_write_what_one_does(written, tmp_path):
    pod = finish_pod(
        start_pod([encode_worker.__file__, *words(tmp_path / "a")], count=2, devices=8)
    )
    assert [ended.code for ended in pod] == [0, 0], pod
    assert hashes(tmp_path / "a") == hashes(written)


def test_units_whose_shards_were_lost_are_done_again(written, tmp_path):
    out = shutil.copytree(written, tmp_path / "a")
    (out / "manifest.json").unlink()
    (out / "shards" / "00001-0.array_record").unlink()
    with (out / "shards" / "00003-0.array_record").open("r+b") as file:
        file.truncate(1000)
    encode_small(out)
    assert hashes(out) == hashes(written)


def test_another_number_of_processes_goes_on(written, tmp_path, monkeypatch):
    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 3)
        patch.setattr(encoding, "VISIBLE_SECONDS", 0.0)
        with pytest.raises(UserError, match=str(out)):
            encode_small(out)
    assert sorted(path.name for path in (out / "units").iterdir()) == ["00000.json", "00003.json"]
    encode_small(out)
    assert hashes(out) == hashes(written)
