"""Training of a control branch: alone on a frozen trunk, then distilled together or alone."""

import collections
import functools
import inspect
import json
import shutil

import jax
import numpy as np
import pytest
from helpers.compare import assert_same
from helpers.runs import read_state, tiny, train_here
from helpers.updates import changed, one_device
from helpers.workdirs import make_workdir, random_params

from sprint_jax import SprintPipeline
from sprint_jax.checkpoints.checkpoint import Checkpoints, load_params
from sprint_jax.checkpoints.weights import find_weights
from sprint_jax.core.errors import UserError
from sprint_jax.core.fingerprint import fingerprint
from sprint_jax.data import feed
from sprint_jax.models import functions
from sprint_jax.models.control import new_branch
from sprint_jax.training import checks, setup
from sprint_jax.training.terms import generator_terms

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]

SMALL = {"model__control_blocks": 1, "log__exam": 4}
LINES = np.eye(8, dtype=np.uint8)[..., None].repeat(3, -1) * 255


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    root = tmp_path_factory.mktemp("trunks")
    return {stage: make_workdir(root / stage, stage) for stage in ("flow", "distill")}


@pytest.fixture(scope="module")
def teacher(data, trunks, tmp_path_factory):
    """The config and workdir of a branch that learnt for two updates on a frozen teacher."""
    trunk = str(trunks["flow"])
    c = tiny("configs/controlnet.py:digits,small", data, trunk=trunk, steps=2, **SMALL)
    return c, train_here(c, tmp_path_factory.mktemp("control") / "teacher")


def test_a_branch_learns_alone_on_a_frozen_teacher(teacher, trunks):
    _, workdir = teacher
    frozen, _ = load_params(str(trunks["flow"]))
    state = read_state(workdir, 2)
    for field in ("params", "ema"):
        assert state[field].keys() == {"control"}
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if np.ndim(leaf)]
    count = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    assert sum(leaf.size for leaf in moments) == 2 * count
    start = jax.device_get(new_branch(frozen, 1, "nvlabs"))
    # The warm-up's first rate is 0, and the second update sees a branch that is still new.
    assert {name for name in changed(start, state["params"]["control"])} == {
        "transformer_blocks/after_proj/kernel",
        "transformer_blocks/after_proj/bias",
    }
    # As one network again: with its trunk, which it equals at scale 0.
    whole, _ = find_weights(str(workdir)).load()
    assert_same({name: whole[name] for name in frozen}, frozen)
    pipe = SprintPipeline.from_pretrained(workdir)
    plain = SprintPipeline.from_pretrained(trunks["flow"])
    drawn = [
        pipe(["a 3"], steps=2, guidance=3.0, control=LINES, control_scale=s)[0] for s in (0.0, 1.0)
    ]
    expected = np.asarray(plain(["a 3"], steps=2, guidance=3.0)[0])
    np.testing.assert_array_equal(drawn[0], expected)
    assert (np.asarray(drawn[1]) != expected).any()


def test_another_trunk_is_refused(teacher, trunks, tmp_path):
    """By its shape; by its hash, where the branch is put back on it; and what is no trunk at all."""
    c, workdir = teacher
    wider = make_workdir(tmp_path / "wider", "flow", mlp_ratio=3.0)
    with pytest.raises(UserError, match="mlp_ratio"):
        train_here(c.override({"trunk": str(wider), "steps": 3}), workdir)
    other, copied = tmp_path / "other", shutil.copytree(workdir, tmp_path / "copied")
    shutil.copytree(trunks["flow"], other, ignore=lambda *_: ["checkpoints"])
    params = random_params(dict(c.model) | {"control_blocks": 0}, 5)
    with Checkpoints(other / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(7, {"ema": params, "params": params}, {"stage": "flow"})
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"trunk": str(other)}))
    with pytest.raises(UserError, match=r"another network than the one in .*other"):
        SprintPipeline.from_pretrained(copied)
    # Where the trunk is not found as it was named, as from another folder, its place from the root is.
    (copied / "config.json").write_text(json.dumps(config | {"trunk": "trunks/flow"}))
    assert "control" in find_weights(str(copied)).load()[0]
    wired = c.override({"init": str(workdir), "model.control_wiring": "diffusers"})
    built = one_device(), feed.open_data(c, one_device())
    nets = setup.build_nets(wired, built[0])
    with pytest.raises(UserError, match=r"control_wiring=diffusers, but nvlabs in --config\.init"):
        setup.init_state(wired, nets, built[1].batches(0), {}, built[0])
    with pytest.raises(UserError, match="stage 'flow' takes"):
        setup.build_nets(c.override({"trunk": str(trunks["distill"])}), one_device())
    for change, word in (
        ({"trunk": ""}, "config.init"),
        ({"model.control_blocks": 0}, "config.trunk"),
        ({"data.control": ""}, "config.data.control"),
        (
            {"data.source": "latents", "data.control_variants": 4},
            "control_variants is for `encode`",
        ),
        ({"data.source": "latents", "data.control_weights": "hed.pth"}, "control_weights"),
    ):
        with pytest.raises(UserError, match=word):
            checks.check_values(c.override(change))


@pytest.fixture(scope="module")
def student(data, teacher):
    config = functools.partial(tiny, "configs/controlnet.py:digits,student,small", data)
    return config(teacher=str(teacher[1]), **SMALL)


def test_a_branch_is_distilled_alone(student, data, teacher, trunks):
    """It starts from the teacher's, on a student that stays as it is and is no part of the state."""
    c, mesh = student.override({"trunk": str(trunks["distill"])}), one_device()
    nets, opened = setup.build_nets(c, mesh), feed.open_data(c, mesh)
    frozen, origin = setup.load_frozen(c, opened, mesh)
    state = setup.init_state(c, nets, opened.batches(0), frozen, mesh)
    whole, _ = find_weights(str(teacher[1])).load()
    trunk, _ = load_params(str(trunks["distill"]))
    assert_same(state.params["control"], whole["control"])
    assert state.params.keys() == state.ema.keys() == {"control", "logvar_linear"}
    assert_same(frozen["trunk"], without(trunk, "logvar_linear"))
    assert origin["trunk"]["hash"] == fingerprint(frozen["trunk"])


def without(tree, name):
    return {key: tree[key] for key in tree if key != name}


def planned(c):
    return setup.abstract_run(c, one_device())


def test_every_network_of_every_loss_sees_the_condition(student, monkeypatch):
    losses = {
        "ladd.weight": 1.0,
        "dmd.weight": 1.0,
        "twinflow.weight": 1.0,
        "trajectory.weight": 1.0,
        "trajectory.steps": 2,
    }
    c = student.override(losses | {"ladd.features": "copy", "dmd.decoupled": True})
    nets, state, batch, frozen = planned(c)
    calls = collections.Counter()
    for name in ("velocity", "features"):
        monkeypatch.setattr(functions, name, watched(getattr(functions, name), calls))

    def every_loss(state, batch, frozen):
        found = {}
        for term in generator_terms(nets, c, state, frozen).values():
            found |= term(state.params, batch, jax.random.key(0), found)[1]
        return found

    jax.eval_shape(every_loss, state, batch, frozen)
    assert calls == {("velocity", True): calls["velocity", True], ("features", True): 1}
    assert calls["velocity", True] >= 10


def watched(function, calls):
    signature = inspect.signature(function)

    def run(*args, **how):
        given = signature.bind(*args, **how).arguments
        calls[function.__name__, given.get("control") is not None] += 1
        return function(*args, **how)

    return run
