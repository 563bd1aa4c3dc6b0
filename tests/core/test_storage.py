"""Paths that users give: local ones as they are, those of buckets by their scheme, others refused."""

import importlib.util
from pathlib import Path

import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.core.schema import LOCAL, PLACE
from sprint_jax.core.storage import as_path, in_bucket, read_range, read_ranges, stamp_of


def test_local_paths_are_pathlibs_and_buckets_keep_their_scheme(tmp_path):
    assert as_path(tmp_path) == tmp_path and isinstance(as_path("runs/a"), Path)
    place = as_path("s3://bucket/runs/a/")
    assert str(place / "b.json") == "s3://bucket/runs/a/b.json" and place.parent.name == "runs"
    assert in_bucket(place) and in_bucket("gs://b/x") and not in_bucket("runs/gs://b")


@pytest.mark.parametrize("name", ["az://bucket/x", "https://host/x", "gs://", "s3:///x"])
def test_unknown_schemes_and_nameless_buckets_are_refused(name):
    with pytest.raises(UserError) as refused:
        as_path(name)
    assert refused.value.exit_code == 2 and name in str(refused.value)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package, extra in (("gs://b/x", "gcsfs", "[gcs]"), ("s3://b/x", "s3fs", "[s3]")):
        with pytest.raises(UserError) as refused:
            as_path(name)
        assert package in str(refused.value) and extra in str(refused.value)


def test_values_of_flags_and_configs():
    for good in ("runs/a", "user/model", "tfds:digits/full:train", "C", "", "./gs:x"):
        assert LOCAL.holds(good) and PLACE.holds(good), good
    for bucket in ("gs://bucket", "gs://bucket/a b/c", "s3://my.bucket/x"):
        assert PLACE.holds(bucket) and not LOCAL.holds(bucket), bucket
    for bad in ("gs://", "gs:/bucket/x", "az://b/x", "http://h/x", "a\0b", "gs://b/\0", 3, None):
        assert not PLACE.holds(bad) and not LOCAL.holds(bad), bad


def test_ranges_of_local_files(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(10)))
    assert read_range(path, 3, 5) == b"\3\4" and read_range(path, 8, 99) == b"\x08\x09"
    assert read_ranges([path, path], [0, 9], [1, 10]) == [b"\0", b"\x09"]
    before = stamp_of(path)
    path.write_bytes(b"")
    assert stamp_of(path) != before
