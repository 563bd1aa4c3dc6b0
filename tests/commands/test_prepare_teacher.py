"""Surgery on teachers, where they come from, and the command prepare_teacher."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import quick_compilation, read_state, run_here, tiny, words, write_digits
from helpers.workdirs import STEP, make_workdir, random_params, tiny_config

from sprint_jax import prepare_teacher
from sprint_jax.checkpoints.checkpoint import load_params
from sprint_jax.checkpoints.weights import find_weights
from sprint_jax.core.errors import UserError
from sprint_jax.core.fingerprint import fingerprint
from sprint_jax.data import feed
from sprint_jax.interop import diffusers
from sprint_jax.models.sana import from_fields
from sprint_jax.teacher import surgery
from sprint_jax.training import setup

DENSE = tiny_config("flow")["model"]
OLD = DENSE | {"qk_norm": False, "timestep_scale": 1.0}
SPEC = "configs/digits.py:teacher,small"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def old():
    """Parameters of a network without QK norm, times 0..1000, whose time embedding is smooth in them."""
    params = random_params(OLD, 5)
    first = params["time_embed"]["timestep_embedder"]["linear_1"]
    # The slow part of the sinusoid alone: what a trained embedding mostly listens to.
    first["kernel"] = first["kernel"].at[:88].set(0).at[128:216].set(0)
    return params


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(8, 4, 4, 12)), jnp.float32)
    text = jnp.asarray(random.normal(size=(8, 5, 64)), jnp.float32)
    return x, jnp.linspace(0, 1, 8), text, jnp.ones((8, 5), jnp.int32)


def run(fields, params, inputs):
    return np.asarray(jax.jit(from_fields(fields).apply)({"params": params}, *inputs))


def test_where_nothing_is_to_be_changed_nothing_is():
    params = random_params(DENSE, 1)
    result, changes = surgery.operate(DENSE, params, DENSE)
    assert changes == []
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (result, params)), strict=True))


def test_qk_norm_is_inserted_with_ones_into_both_attentions(old):
    target = OLD | {"qk_norm": True}
    params, changes = surgery.operate(OLD, old, target)
    assert len(changes) == 1 and "QK norm" in changes[0]
    shapes = jax.tree.map(jnp.shape, random_params(target, 0))
    assert jax.tree.map(jnp.shape, params) == shapes
    for attention in ("attn1", "attn2"):
        for norm in ("norm_q", "norm_k"):
            weight = params["transformer_blocks"][attention][norm]["weight"]
            np.testing.assert_array_equal(weight, np.ones((2, 32), np.float32))
    kept = params["transformer_blocks"]["attn2"]["to_q"]["kernel"]
    np.testing.assert_array_equal(kept, old["transformer_blocks"]["attn2"]["to_q"]["kernel"])


def test_qk_norm_of_equally_large_queries_and_keys_changes_nothing(inputs):
    """Linear attention does not see a token's query scale; so where keys are of one size, nor does it here."""
    params = random_params(OLD, 2)
    blocks = params["transformer_blocks"]
    for name in ("attn1", "attn2"):
        for layer in ("to_q", "to_k"):
            blocks[name][layer] = jax.tree.map(jnp.zeros_like, blocks[name][layer])
    target = OLD | {"qk_norm": True}
    changed, _ = surgery.operate(OLD, params, target)
    np.testing.assert_array_equal(run(target, changed, inputs), run(OLD, params, inputs))


def test_fitted_time_embedding_keeps_the_function_where_the_old_weights_do_not(old, inputs):
    target = OLD | {"timestep_scale": 0.001}
    fitted, error = surgery.fit_time_embedding(old, 1.0, 0.001)
    kept, _ = surgery.operate(OLD, old, target, fit_time=False)
    expected = run(OLD, old, inputs)
    scale = np.sqrt(np.square(expected).mean())

    def distance(params):
        return np.sqrt(np.square(run(target, params, inputs) - expected).mean()) / scale

    assert error < 0.1
    assert distance(fitted) < 0.1
    assert distance(kept) > 3 * distance(fitted)


def test_fit_error_is_that_of_the_embedding_the_network_computes(old):
    fitted, error = surgery.fit_time_embedding(old, 1.0, 0.001)

    def embed(params, scale):
        t = np.linspace(0, 1, 4096)
        layers = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64), params["time_embed"]["timestep_embedder"]
        )
        seen = surgery.sinusoid(1000 * scale * t, 256)
        hidden = seen @ layers["linear_1"]["kernel"] + layers["linear_1"]["bias"]
        hidden = hidden / (1 + np.exp(-hidden))
        return hidden @ layers["linear_2"]["kernel"] + layers["linear_2"]["bias"]

    target = embed(old, 1.0)
    left = np.sqrt(np.square(embed(fitted, 0.001) - target).mean())
    spread = np.sqrt(np.square(target - target.mean(0)).mean())
    assert error == pytest.approx(left / spread, rel=1e-3)


def test_fit_has_a_derivative_by_time_far_below_that_of_times_to_1000(inputs):
    """Of a network whose embedding wiggles fast, as an untrained one does."""
    params = random_params(OLD, 5)
    fitted, _ = surgery.fit_time_embedding(params, 1.0, 0.001)

    def derivative(fields, params):
        x, t, text, mask = inputs

        @jax.jit
        def change(t):
            def velocity(t):
                return from_fields(fields).apply({"params": params}, x, t, text, mask)

            return jnp.abs(jax.jvp(velocity, (t,), (jnp.ones_like(t),))[1]).mean()

        return float(change(t))

    assert derivative(OLD | {"timestep_scale": 0.001}, fitted) < 0.1 * derivative(OLD, params)


@pytest.mark.parametrize(
    ("source", "target", "prune", "message"),
    [
        (
            {"caption_channels": 32},
            {},
            0,
            "caption_channels 32.*config.model.caption_channels is 64",
        ),
        ({}, {"qk_norm": False}, 0, "set --config.model.qk_norm=true"),
        ({"num_layers": 4}, {}, 0, "has 4 blocks.*is 2: prune it with --prune 2"),
        ({"num_layers": 1}, {}, 0, "has 1 blocks.*cannot be added"),
        ({}, {}, 3, "--prune 3.*has 2 blocks"),
        ({"interpolation_scale": 1.0}, {}, 0, "interpolation_scale"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(source, target, prune, message):
    with pytest.raises(UserError, match=message) as caught:
        surgery.check_fits("old", DENSE | source, DENSE | target, prune)
    assert caught.value.exit_code == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory, old):
    """A transformer folder and a pipeline folder of diffusers, and a workdir."""
    folder = tmp_path_factory.mktemp("sources")
    diffusers.save_transformer(folder / "transformer", OLD, old)
    make_workdir(folder / "teacher", "flow")
    make_workdir(folder / "student", "distill")
    return folder


@pytest.mark.parametrize("name", ["", "transformer"])
def test_weights_of_a_diffusers_folder(folder, old, name):
    found = find_weights(str(folder / name))
    assert (found.kind, found.is_teacher) == ("diffusers", True)
    assert from_fields(found.fields) == from_fields(OLD)
    params, step = found.load(None)
    assert step is None and fingerprint(params) == fingerprint(old)


def test_weights_of_a_workdir_are_its_ema(folder):
    found = find_weights(str(folder / "teacher"))
    params, step = found.load(None)
    assert (found.kind, found.is_teacher, step) == ("workdir", True, STEP)
    assert fingerprint(params) == fingerprint(load_params(str(folder / "teacher"), "ema")[0])
    assert not find_weights(str(folder / "student")).is_teacher


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "does not exist"), (".", "neither a training workdir"), ("a.pth", "architecture")],
)
def test_a_place_without_weights_is_refused(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        find_weights(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.getbasetemp() / "digits")


def command(folder, data, workdir, *more, model="transformer", **changes):
    line = words(SPEC, data, workdir, steps=2, model__interpolation_scale=0.0, **changes)
    return [*line, "--model", str(folder / model), *more]


def test_command_prepares_trains_and_resumes(folder, data, tmp_path, monkeypatch, capfd, old):
    """From a diffusers folder to a workdir whose first step starts from the operated weights."""
    workdir = tmp_path / "run"
    line = command(folder, data, workdir)
    ended = run_here(line, monkeypatch, capfd, main=prepare_teacher.main)
    assert ended.code == 0, ended.err
    assert "QK norm inserted" in ended.out
    record = json.loads((workdir / "prepared" / "prepared.json").read_text())
    assert record["hash"] == fingerprint(old) and len(record["changes"]) == 2
    fields, params = diffusers.load_transformer(workdir / "prepared")
    expected, _ = surgery.operate(OLD, old, DENSE)
    assert from_fields(fields) == from_fields(DENSE)
    assert fingerprint(params) == fingerprint(expected)
    config = json.loads((workdir / "config.json").read_text())
    assert config["init"] == str(workdir / "prepared")
    trained = read_state(workdir, 2)["params"]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), trained, params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01  # two steps of the warm-up

    ended = run_here(line, monkeypatch, capfd, main=prepare_teacher.main)
    assert ended.code == 0 and "nothing to do" in ended.out and "is there already" in ended.out
    other = run_here([*line, "--protect", "0"], monkeypatch, capfd, main=prepare_teacher.main)
    assert other.code == 1 and "--protect" in other.error
    c = tiny("configs/digits.py:student,small", data, teacher=str(workdir))
    assert setup.find_teacher(c).is_teacher


def test_command_prunes_a_workdir_and_may_stop_before_training(
    folder, data, tmp_path, monkeypatch, capfd
):
    workdir = tmp_path / "run"
    line = command(
        folder, data, workdir, "--prune", "1", "--surgery_only", model="teacher",
        model__num_layers=2,
    )  # fmt: skip
    ended = run_here(line, monkeypatch, capfd, main=prepare_teacher.main)
    assert ended.code == 0, ended.err
    assert [path.name for path in workdir.iterdir()] == ["prepared"]
    record = json.loads((workdir / "prepared" / "prepared.json").read_text())
    assert len(record["importance"]) == 2
    assert record["kept"] == [int(np.argmax(record["importance"]))]
    assert (workdir / "prepared" / "importance.png").is_file()
    fields, params = diffusers.load_transformer(workdir / "prepared")
    whole, _ = load_params(str(folder / "teacher"), "ema")
    assert fields["num_layers"] == 1
    kept = jax.tree.map(lambda leaf: leaf[record["kept"][0]][None], whole["transformer_blocks"])
    assert fingerprint(params["transformer_blocks"]) == fingerprint(kept)


def test_interrupted_surgery_is_begun_anew(folder, data, tmp_path, monkeypatch, capfd):
    workdir = tmp_path / "run"
    partial = workdir / "prepared.partial"
    shutil.copytree(folder / "transformer", partial)
    (partial / "stray").write_text("")
    line = command(folder, data, workdir, "--surgery_only")
    assert run_here(line, monkeypatch, capfd, main=prepare_teacher.main).code == 0
    assert [path.name for path in workdir.iterdir()] == ["prepared"]
    assert not (workdir / "prepared" / "stray").exists()


@pytest.mark.parametrize(
    ("more", "model", "code", "message"),
    [
        ([], "student", 1, "is a student"),
        ([], "nothing", 1, "does not exist"),
        (["--config.init=x"], "transformer", 2, "leave out --config.init"),
        (["--config.stage=distill"], "transformer", 2, "stage 'flow'"),
        (["--config.model.caption_channels=32"], "transformer", 2, "caption_channels"),
        (["--config.steps=0"], "transformer", 2, "config.steps=0"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing(
    folder, data, tmp_path, monkeypatch, capfd, more, model, code, message
):
    line = command(folder, data, tmp_path / "run", *more, model=model)
    ended = run_here(line, monkeypatch, capfd, main=prepare_teacher.main)
    assert ended.code == code and message in ended.error
    assert not (tmp_path / "run").exists()


def test_a_student_may_have_a_teacher_from_a_diffusers_folder(folder, data):
    c = tiny("configs/digits.py:student,small", data, teacher=str(folder))
    mesh = setup.mesh_from(c)
    nets, opened = setup.build_nets(c, mesh), feed.open_data(c, mesh)
    frozen, origin = setup.load_frozen(c, opened, mesh)
    assert nets.teacher.timestep_scale == 1.0 and not nets.teacher.qk_norm
    assert origin["path"] == str(folder.resolve())
    assert origin["hash"] == fingerprint(frozen["teacher"])
