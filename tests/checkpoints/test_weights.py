"""Weights of a transformer, wherever they lie."""

from unittest import mock

import pytest
from helpers.refusals import refuse
from helpers.workdirs import STEP, make_workdir, random_params, tiny_config

from sprint_jax.checkpoints.checkpoint import load_params
from sprint_jax.checkpoints.weights import find_weights
from sprint_jax.core.errors import UserError
from sprint_jax.core.fingerprint import fingerprint
from sprint_jax.interop import diffusers, hub
from sprint_jax.models.sana import from_fields

FIELDS = tiny_config("flow")["model"] | {"timestep_scale": 1.0}


def test_weights_of_a_diffusers_folder(tmp_path):
    params = random_params(FIELDS, 5)
    diffusers.save_transformer(tmp_path / "transformer", FIELDS, params)
    for path in (tmp_path, tmp_path / "transformer"):
        found = find_weights(str(path))
        assert (found.kind, found.is_teacher) == ("diffusers", True)
        assert from_fields(found.fields) == from_fields(FIELDS)
        loaded, step = found.load(None)
        assert step is None and fingerprint(loaded) == fingerprint(params)


def test_weights_of_a_workdir_are_its_ema(tmp_path):
    make_workdir(tmp_path / "teacher", "flow")
    make_workdir(tmp_path / "student", "distill")
    found = find_weights(str(tmp_path / "teacher"))
    params, step = found.load(None)
    assert (found.kind, found.is_teacher, step) == ("workdir", True, STEP)
    assert fingerprint(params) == fingerprint(load_params(str(tmp_path / "teacher"), "ema")[0])
    assert not find_weights(str(tmp_path / "student")).is_teacher


@pytest.mark.parametrize("path", ["nowhere", ".", "a.pth"])
def test_a_place_without_weights_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(UserError, match=path) as refused:
        find_weights(path)
    assert refused.value.exit_code == (1 if path == "a.pth" else 2)


@pytest.mark.parametrize(("here", "code"), [(True, 2), (False, 1)])
def test_a_mistyped_path_is_told_from_a_hub_that_cannot_be_asked(tmp_path, monkeypatch, here, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", mock.Mock(side_effect=UserError("cannot be downloaded")))
    if here:
        (tmp_path / "runs").mkdir()
    refuse(find_weights, "runs/techer", parts=["downloaded"], exit_code=code)
