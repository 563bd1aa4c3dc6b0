"""Mistakes of a user: one line that names them, an exit code, no traceback, and no step run."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import runs
from helpers.workdirs import STEP, make_workdir, random_params, tiny_config

from sprint_jax import train
from sprint_jax.checkpoints.checkpoint import Checkpoints
from sprint_jax.checkpoints.workdir import read_workdir_config

TEACHER = "configs/digits.py:teacher,small"
STUDENT = "configs/digits.py:student,small,sprint"
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {stage: make_workdir(root / stage, stage) for stage in ("flow", "distill")}


@pytest.fixture
def run(data, monkeypatch, capfd):
    """``run(spec, workdir, **changes)``: six steps with an update that only counts them."""

    def count(state, batch, frozen):
        return state.replace(step=state.step + 1), {"health/in_a_row": np.zeros(())}

    def run(spec, workdir, update=count, **changes):
        monkeypatch.setattr(
            train, "lower_updates", lambda *_, **__: [SimpleNamespace(compile=lambda: update)]
        )
        monkeypatch.setattr(train, "make_preview", lambda *_: None)
        changes = {"steps": 6, "log__checkpoint_every": 2} | changes
        return runs.run_here(runs.words(spec, data, workdir, **changes), monkeypatch, capfd)

    return run


def check(ended, code, *parts):
    assert ended.code == code and all(part in ended.error for part in parts), ended


@pytest.fixture
def refused(run, monkeypatch):
    """``refused(spec, workdir, code, *parts, **changes)``: an error with these parts, and no compiling."""

    def refused(spec, workdir, code, *parts, **changes):
        monkeypatch.setattr(train, "compile_updates", None)
        check(run(spec, workdir, **changes), code, *parts)

    return refused


COUNTS = ["steps", "data.batch_size", "accumulate", "mesh.fsdp", "max_nonfinite"]
COUNTS += ["log.every", "log.sample_every", "log.checkpoint_every", "log.keep"]


@pytest.mark.parametrize(
    "word, parts",
    [
        *((f"{key}=0", [f"{key.removeprefix('mesh.')}=0"]) for key in COUNTS),
        ("steps=many", ["steps=many", "1800"]),
        ("data.batch_size=12", ["batch_size=12", "8 devices"]),
        ("accumulate=3", ["accumulate=3", f"batch_size={runs.BATCH}"]),
        ("mesh.data=3", ["data=3", "8 devices"]),
        ("data.world=tiny", ["'tiny'", "small, full, large"]),
        ("stage=distil", ["'distil'", "flow, distill"]),
        ("optimizer.name=sgd", ["'sgd'", "adamw"]),
        ("model.num_attention_heads=2", ["cross-attention", "64"]),
        ("model.dtype=float16", ["'float16'", "bfloat16"]),
        ("model.remat=some", ["'some'", "dots"]),
        ("seed=-1", ["seed=-1"]),
        # It would train 100 updates of warm-up, as many as this, and then nothing.
        ("optimizer.decay_steps=1", ["optimizer.decay_steps=1", "at update 101 of 102", "-1"]),
    ],
)
def test_values_that_cannot_work(word, parts, refused, tmp_path):
    key, _, value = word.partition("=")
    refused(TEACHER, tmp_path, 2, *parts, **{"steps": 102, key.replace(".", "__"): value})


def test_weights_that_are_none(refused, models, tmp_path):
    run, teacher, student = tmp_path / "run", str(models["flow"]), str(models["distill"])
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare)
    shutil.rmtree(bare / "checkpoints" / str(STEP))
    refused(STUDENT, run, 2, "--config.teacher=DIR")
    refused(STUDENT, run, 2, "scm.guidance", scm__guidance="")
    refused(STUDENT, run, 2, "nowhere", teacher="nowhere")
    refused(TEACHER, run, 2, "nowhere", init="nowhere")
    refused(STUDENT, run, 1, student, teacher=student)
    command = "prepare_teacher"
    for key, value, theirs, more in (
        ("num_layers", 3, 2, [command, "--prune 3"]),
        ("mlp_ratio", 2.0, 2.5, []),
        ("timestep_scale", 1.0, 0.001, [command, "timestep_scale=1.0"]),
        ("qk_norm", False, True, []),
        ("interpolation_scale", 2.0, 1.0, ["interpolation_scale=1.0"]),
    ):
        parts = [f"config.model.{key}={value}", f"but {theirs} in --config.teacher={teacher}"]
        refused(STUDENT, run, 2, *parts, *more, teacher=teacher, **{f"model__{key}": value})
    refused(STUDENT, run, 1, str(bare), teacher=str(bare))
    for taps in ((2,), (1, 0), (1, 1)):
        refused(STUDENT, run, 2, f"ladd.taps={taps}", "2", teacher=teacher, ladd__taps=taps)
    none = {
        f"{name}__weight": 0.0
        for name in ("scm", "ladd", "dmd", "twinflow", "meanflow", "trajectory")
    }
    for parts, changes in (
        (["scm.weight", "dmd.weight"], none),
        (["dmd.weight=-1.0"], {"dmd__weight": -1.0}),
        (["dmd.fake_updates=0"], {"dmd__fake_updates": 0}),
        (["images.max_time_probability=1.5"], {"images__max_time_probability": 1.5}),
        (["meanflow.same_time=-0.1"], {"meanflow__same_time": -0.1}),
        (["twinflow.twin_weight=-1.0"], {"twinflow__twin_weight": -1.0}),
        (["trajectory.spread=0.5"], {"trajectory__spread": 0.5}),
        (["dmd.shift=0.0"], {"dmd__shift": 0.0}),
        (["model.flow_map"], {"meanflow__weight": 1.0}),
        (["ladd.loss", "hinge"], {"ladd__loss": "logistic"}),
        (["ladd.paired"], {"ladd__loss": "relativistic"}),
        (["ladd.misaligned", "16 / 16"], {"accumulate": 16}),
        (["ladd.token_norm"], {"ladd__r1": 0.1, "ladd__token_norm": False}),
        (["ladd.features=fake", "dmd.weight"], {"ladd__features": "fake"}),
    ):
        refused(STUDENT, run, 2, *parts, teacher=teacher, **changes)
    refused(TEACHER, run, 2, "model.flow_map", model__flow_map=True)
    assert not run.exists()


def test_workdir_of_something_else(refused, tmp_path):
    file, foreign = tmp_path / "file", tmp_path / "foreign"
    file.write_text("mine")
    refused(TEACHER, file, 1, str(file))
    assert file.read_text() == "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    refused(TEACHER, foreign, 1, str(foreign), "config.json")
    (foreign / "config.json").write_text("{")
    refused(TEACHER, foreign, 1, str(foreign / "config.json"))
    assert sorted(path.name for path in foreign.iterdir()) == ["config.json", "thesis.txt"]


def test_workdir_of_another_config(run, tmp_path):
    workdir = tmp_path / "run"
    assert run(TEACHER, workdir).code == 0
    before = (workdir / "config.json").read_bytes()
    ended = run(TEACHER, workdir, sigma_d=0.6, seed=3, steps=8)
    check(ended, 2, str(workdir), "seed is 0 there and 3 here", "1 more")
    check(run("configs/digits.py:teacher,full", workdir), 2, "data.world")
    for changes in (
        {"model__qk_norm": False},
        {"data__batch_size": 32},
        {"optimizer__name": "came"},
    ):
        (key,) = changes
        check(run(TEACHER, workdir, **changes), 2, key.replace("__", "."))
    # Off, the optimizer would have another form.
    check(run(TEACHER, workdir, optimizer__clip_norm=0.0), 2, "optimizer.clip_norm is 1.0 there")
    assert (workdir / "config.json").read_bytes() == before


def test_a_run_is_mended_and_its_history_kept(run, tmp_path):
    workdir = tmp_path / "run"
    assert run(TEACHER, workdir).code == 0
    # As another version left it, which lacks one key and has one of its own.
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    assert config["data"].pop("holdout") == 0 and "history" not in config
    path.write_text(json.dumps(config | {"retired": 1.5}))
    mended = {"optimizer.learning_rate": [1.5e-3, 1e-4], "optimizer.clip_norm": [1.0, 0.5]}
    mended |= {"max_nonfinite": [20, 5], "accumulate": [1, 2], "ema_decay": [0.998, 0.9]}
    mended |= {"model.remat": ["none", "full"], "mesh.fsdp": [1, 2], "steps": [6, 8]}
    mended |= {"log.every": [1, 2], "data.prefetch": [4, 1]}
    # A checkpoint has the weights that `init` was for.
    mended |= {"init": ["", "nowhere"]}
    changes = {key.replace(".", "__"): new for key, (_, new) in mended.items()}
    ended = run(TEACHER, workdir, **changes)
    assert ended.code == 0 and list(runs.records(workdir)) == [1, 2, 3, 4, 5, 6, 8]
    (line,) = [line for line in ended.out.splitlines() if "from step 6 on" in line]
    for key, (old, new) in mended.items():
        assert f"{key} {old} -> {new}" in line
    versions = {"data.holdout": ["absent", 0], "retired": [1.5, "absent"]}
    config = read_workdir_config(workdir)
    assert config.steps == 8 and config.max_nonfinite == 5 and "retired" not in config
    # The same line changes nothing more; another one adds to the history.
    assert run(TEACHER, workdir, **changes).code == 0
    first = {"step": 6, "changed": mended | versions}
    assert json.loads(path.read_text())["history"] == [first]
    assert run(TEACHER, workdir, **changes | {"steps": 9}).code == 0
    last = {"step": 8, "changed": {"steps": [8, 9]}}
    assert json.loads(path.read_text())["history"] == [first, last]


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: 17 GB", "INTERNAL: something else"])
def test_out_of_memory_says_what_to_change(run, tmp_path, message):
    """As a device says it; an error of another kind stays what it is."""

    def update(state, batch, frozen):
        raise jax.errors.JaxRuntimeError(message)

    if "INTERNAL" in message:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            run(TEACHER, tmp_path / "run", update)
    else:
        parts = ["17 GB", "batch_size", "accumulate", "remat", "fsdp"]
        check(run(TEACHER, tmp_path / "run", update), 4, *parts)


def test_a_start_that_is_killed_anywhere_is_begun_anew(run, tmp_path, monkeypatch):
    """Before and after each of its first writes; the same line then trains."""
    whole = []
    for name in ("write_workdir_config", "Checkpoints"):
        for after in (False, True):
            original, workdir = getattr(train, name), tmp_path / f"{name}{after}"

            def killed(*words, original=original, after=after, **more):
                if after:
                    original(*words, **more)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(train, name, killed)
                assert run(TEACHER, workdir).code == 130
            assert run(TEACHER, workdir).code == 0
            whole.append(runs.records(workdir))
    assert list(whole[0]) == [1, 2, 3, 4, 5, 6] and all(each == whole[0] for each in whole)


def test_teacher_that_changed_under_its_student(run, models, tmp_path):
    teacher, moved, workdir = (tmp_path / name for name in ("teacher", "moved", "run"))
    shutil.copytree(models["flow"], teacher)
    shutil.copytree(models["flow"], moved)
    assert run(STUDENT, workdir, teacher=str(teacher)).code == 0
    assert run(STUDENT, workdir, teacher=str(moved), steps=7).code == 0
    params = random_params(tiny_config("flow")["model"], 3)
    with Checkpoints(teacher / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(STEP + 1, {"ema": params, "params": params}, {"stage": "flow"})
    check(run(STUDENT, workdir, teacher=str(teacher), steps=9), 1, "teacher_hash")
    assert max(runs.records(workdir)) == 7 and runs.checkpoint_steps(workdir)[-1] == 7


def damage(workdir, step):
    """Cuts off half of every file with array data."""
    # Of each process, and merged: small arrays may lie in either.
    files = list((workdir / "checkpoints" / str(step) / "state").rglob("d/*"))
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoints(run, tmp_path):
    """The newest whole one is used and the others are named; without a whole one nothing runs."""
    workdir = tmp_path / "run"
    assert run(TEACHER, workdir).code == 0
    damage(workdir, 6)
    ended = run(TEACHER, workdir, steps=8)
    assert ended.code == 0 and "warning: " in ended.err and "checkpoints/6 " in ended.err
    assert list(runs.records(workdir)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert runs.checkpoint_steps(workdir) == [4, 6, 8]
    assert (workdir / "checkpoints" / "6.damaged").is_dir()
    before = (workdir / "metrics.jsonl").read_bytes()
    for step in (4, 6, 8):
        damage(workdir, step)
    ended = run(TEACHER, workdir, steps=10)
    check(ended, 1, str(workdir), "[4, 6, 8]")
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert runs.checkpoint_steps(workdir) == [4, 6, 8]


def test_commands_in_their_own_process(data, models, tmp_path):
    """The same through ``python -m``: nothing but the line on stderr, and the code of the process."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x").write_text("")
    train_run = runs.words(TEACHER, data, tmp_path / "run")
    foreign = runs.words(TEACHER, data, tmp_path / "foreign")
    sample = ["--model", str(models["distill"]), "--out", str(tmp_path / "out"), "--prompt", "a 3"]
    cases = [
        (
            2,
            "train",
            [*train_run, "--config.optimizer.learning_rat", "1"],
            "'optimizer.learning_rate'",
        ),
        (2, "train", [*train_run, "--workdr=x"], "--workdir"),
        (1, "train", foreign, "config.json"),
        (2, "sample", [*sample, "--steps", "7"], "7"),
    ]
    for code, part, process in [(c[0], c[3], runs.start(c[2], c[1])) for c in cases]:
        ended = runs.finish(process)
        check(ended, code, part)
        assert ended.err == f"{ended.error}\n" and ended.out == ""
    assert not (tmp_path / "run").exists()
