"""What a user can get wrong: one line that names it, an exit code, no traceback, and no step run."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers.runs import (
    BATCH,
    TINY,
    checkpoint_steps,
    finish,
    quick_compilation,
    records,
    run_here,
    start,
    tiny,
    words,
    write_digits,
)
from helpers.workdirs import STEP, make_workdir, random_params, tiny_config

from sprint_jax import sample, train
from sprint_jax.checkpoints.checkpoint import Checkpoints

TEACHER = "configs/digits.py:teacher,small"
STUDENT = "configs/digits.py:student,small"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.getbasetemp() / "digits")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {stage: make_workdir(root / stage, stage) for stage in ("flow", "distill")}


@pytest.fixture
def refused(data, monkeypatch, capfd):
    """``refused(spec, workdir, code, *parts, extra=(), **changes)``: the line fails with these words."""

    def no_updates(*_):
        raise AssertionError("got as far as compiling its updates")

    def run(spec, workdir, code, *parts, extra=(), traced=False, **changes):
        if not traced:
            monkeypatch.setattr(train, "lower_updates", no_updates)
        ended = run_here([*words(spec, data, workdir, **changes), *extra], monkeypatch, capfd)
        check(ended, code, *parts)
        assert not (workdir / "metrics.jsonl").exists()

    return run


def check(ended, code, *parts):
    assert ended.code == code, ended
    for part in parts:
        assert part in ended.error, (part, ended.error)


def test_unknown_key_names_the_nearest(refused, tmp_path):
    extra = ["--config.optimizer.learning_rat=1e-3"]
    refused(TEACHER, tmp_path, 2, "learning_rat'", "'optimizer.learning_rate'", extra=extra)
    extra = ["--config.leraning_rate", "1e-3"]
    refused(TEACHER, tmp_path, 2, "leraning_rate", "optimizer.learning_rate", extra=extra)


@pytest.mark.parametrize(
    "word, parts",
    [
        ("steps=many", ("steps=many", "an integer")),
        ("steps=1.5", ("steps=1.5", "an integer")),
        ("optimizer.learning_rate=fast", ("learning_rate=fast", "a number")),
        ("scm.mean_norm=1", ("scm.mean_norm=1", "true or false")),
        ("ladd.taps=a,b", ("ladd.taps", "comma list")),
        ("optimizer=adamw", ("'optimizer' is a section",)),
    ],
)
def test_value_of_a_wrong_type(word, parts, refused, tmp_path):
    refused(STUDENT, tmp_path, 2, *parts, extra=[f"--config.{word}"])


def test_key_that_nothing_reads_in_this_stage(refused, tmp_path):
    parts = ("scm.weight", "not read by stage 'flow'")
    refused(TEACHER, tmp_path / "run", 2, *parts, traced=True, extra=["--config.scm.weight=2"])
    assert not (tmp_path / "run").exists()


def test_unknown_words_files_and_flags(refused, tmp_path):
    refused("configs/digits.py:techer", tmp_path, 2, "'techer'", "'teacher'")
    refused("configs/digits.py:teacher,student", tmp_path, 2, "choose one of teacher, student")
    refused("configs/digit.py", tmp_path, 2, "digit.py", "digits.py")
    refused(TEACHER, tmp_path, 2, "--workdr", "--workdir", extra=["--workdr=x"])


@pytest.mark.parametrize(
    "word, code, parts",
    [
        ("data.batch_size=12", 2, ("batch_size=12", "8 devices")),
        ("accumulate=3", 2, ("accumulate=3", f"batch_size={BATCH}")),
        ("accumulate=0", 2, ("accumulate=0",)),
        ("data.batch_size=0", 2, ("batch_size=0",)),
        ("mesh.data=3", 2, ("mesh", "data=3", "8 devices")),
        ("mesh.fsdp=0", 2, ("mesh", "fsdp=0")),
        ("data.world=tiny", 2, ("'tiny'", "small, full, large")),
        ("stage=distil", 2, ("'distil'", "flow, distill")),
        ("optimizer.name=sgd", 2, ("'sgd'", "adamw")),
        ("model.num_attention_heads=2", 2, ("cross-attention", "64")),
        ("model.dtype=float16", 2, ("'float16'", "bfloat16")),
        ("model.remat=some", 2, ("'some'", "dots")),
        ("steps=0", 2, ("steps=0",)),
        ("max_nonfinite=0", 2, ("max_nonfinite=0",)),
        ("seed=-1", 2, ("seed -1", "0 to")),
        ("init=nowhere", 1, ("nowhere", "does not exist")),
    ],
)
def test_values_that_cannot_work(word, code, parts, refused, tmp_path):
    refused(TEACHER, tmp_path, code, *parts, extra=[f"--config.{word}"])


@pytest.mark.parametrize("key", ["every", "sample_every", "checkpoint_every", "keep"])
def test_intervals_below_one(key, refused, tmp_path):
    refused(TEACHER, tmp_path, 2, f"log.{key}=0", "at least 1", extra=[f"--config.log.{key}=0"])


def test_distillation_without_a_scale_of_guidance(refused, tmp_path):
    refused(STUDENT, tmp_path, 2, "scm.guidance is empty", extra=["--config.scm.guidance="])


def test_teacher_that_is_none(refused, models, tmp_path):
    refused(STUDENT, tmp_path / "run", 2, "--config.teacher=DIR")
    refused(STUDENT, tmp_path / "run", 1, "nowhere does not exist", teacher="nowhere")
    student = str(models["distill"])
    refused(STUDENT, tmp_path / "run", 1, student, "is no teacher", "distill", teacher=student)
    for taps in ((2,), (1, 0), (1, 1)):
        changes = {"teacher": str(models["flow"]), "ladd__taps": taps}
        refused(STUDENT, tmp_path / "run", 2, f"ladd.taps={taps}", "below 2", **changes)
    wide = str(make_workdir(tmp_path / "full", "flow", "full"))
    changes = {"teacher": wide, "model__num_layers": 3}
    refused(STUDENT, tmp_path / "run", 1, "--config.teacher=", "has shape", **changes)
    bare = tmp_path / "bare"
    shutil.copytree(models["flow"], bare)
    shutil.rmtree(bare / "checkpoints" / str(STEP))
    refused(STUDENT, tmp_path / "run", 1, "bare", "no complete checkpoint", teacher=str(bare))
    assert not (tmp_path / "run").exists()


def test_workdir_of_something_else(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    refused(TEACHER, file, 1, f"--workdir {file} is a file")
    assert file.read_text() == "mine"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    refused(TEACHER, foreign, 1, str(foreign), "no config.json")
    (foreign / "config.json").write_text("{")
    refused(TEACHER, foreign, 1, "config.json", "is not JSON")
    assert sorted(path.name for path in foreign.iterdir()) == ["config.json", "thesis.txt"]


def counting_updates(c, nets, state, batch, frozen):
    """Stands in for `stages.lower_updates`: updates that count steps and compute nothing."""

    class Program:
        def compile(self):
            return self.update

    class First(Program):
        def update(self, state, batch, frozen):
            return state.replace(step=state.step + 1), {"health/in_a_row": np.zeros(())}

    class Second(Program):
        def update(self, state, batch, frozen):
            return state, {}

    # Read here because the real ones do.
    for section in (c.flow, c.scm, c.ladd):
        dict(section)
    return [First()] if c.stage == "flow" else [First(), Second()]


@pytest.fixture
def counted(data, monkeypatch, capfd):
    """``counted(spec, workdir, **changes)``: runs with updates that only count."""

    def run(spec, workdir, **changes):
        changes = {"steps": 6, "log__checkpoint_every": 2} | changes
        with monkeypatch.context() as patch:
            patch.setattr(train, "lower_updates", counting_updates)
            patch.setattr(train, "make_preview", fake_preview)
            return run_here(words(spec, data, workdir, **changes), monkeypatch, capfd)

    return run


def fake_preview(c, nets, data, mesh):
    return lambda params, frozen: np.zeros((64, 64, 3), np.uint8)


def test_workdir_of_another_config(counted, tmp_path):
    workdir = tmp_path / "run"
    assert counted(TEACHER, workdir).code == 0
    before = (workdir / "config.json").read_bytes()
    ended = counted(TEACHER, workdir, ema_decay=0.9, seed=3, steps=8)
    check(ended, 1, str(workdir), "ema_decay and 1 more differ")
    check(counted("configs/digits.py:teacher,full", workdir), 1, "data.world")
    assert (workdir / "config.json").read_bytes() == before
    assert list(records(workdir)) == [1, 2, 3, 4, 5, 6]
    # What does not decide the numbers of a step may change.
    ended = counted(TEACHER, workdir, steps=8, log__every=2, data__prefetch=1, mesh__fsdp=2)
    assert ended.code == 0 and list(records(workdir)) == [1, 2, 3, 4, 5, 6, 8]
    assert json.loads((workdir / "config.json").read_text())["steps"] == 8


def test_teacher_that_changed_under_its_student(counted, models, tmp_path):
    teacher, workdir = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(models["flow"], teacher)
    assert counted(STUDENT, workdir, teacher=str(teacher)).code == 0
    # Elsewhere it is the same teacher.
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    assert counted(STUDENT, workdir, teacher=str(moved), steps=7).code == 0
    params = random_params(tiny_config("flow")["model"], 3)
    with Checkpoints(teacher / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(STEP + 1, {"ema": params, "params": params}, {"stage": "flow"})
    ended = counted(STUDENT, workdir, teacher=str(teacher), steps=9)
    check(ended, 1, "checkpoint", "teacher_hash")
    assert max(records(workdir)) == 7 and checkpoint_steps(workdir)[-1] == 7


def damage(workdir, step):
    """Turns one bit of every file with array data, which Orbax itself does not notice."""
    files = list((workdir / "checkpoints" / str(step) / "state").glob("ocdbt.*/d/*"))
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_damaged_newest_checkpoint(counted, tmp_path):
    workdir = tmp_path / "run"
    assert counted(TEACHER, workdir).code == 0
    damage(workdir, 6)
    ended = counted(TEACHER, workdir, steps=8)
    assert ended.code == 0
    assert "warning: " in ended.err and "checkpoints/6 is damaged" in ended.err
    assert list(records(workdir)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert checkpoint_steps(workdir) == [4, 6, 8]
    assert (workdir / "checkpoints" / "6.damaged").is_dir()


def test_no_checkpoint_is_whole(counted, tmp_path):
    workdir = tmp_path / "run"
    assert counted(TEACHER, workdir).code == 0
    before = (workdir / "metrics.jsonl").read_bytes()
    for step in (2, 4, 6):
        damage(workdir, step)
    ended = counted(TEACHER, workdir, steps=8)
    check(ended, 1, str(workdir), "[2, 4, 6]")
    assert ended.err.count("is damaged and not used") == 3
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert checkpoint_steps(workdir) == [2, 4, 6]


@pytest.mark.parametrize(
    "flags, code, parts",
    [
        (["--prompt", "a 3", "--steps", "5"], 2, ("steps", "5", "1, 2, 3 or 4")),
        (["--prompt", "a 3", "--steps", "0"], 2, ("steps", "0", "1, 2, 3 or 4")),
        (["--prompt", "a 3", "--steps", "two"], 2, ("--steps", "'two'")),
        ([], 2, ("--prompt",)),
        (["--prompts", "{empty}"], 1, ("empty.txt", "no prompt")),
        (["--prompts", "{missing}"], 1, ("missing.txt", "No such file")),
        (["--prompt", "a rad 3"], 1, ("'rad'", "'red'")),
        (["--prompt", "a 3", "--size", "8"], 2, ("--size 8",)),
        (["--prompt", "a 3", "--params", "emma"], 2, ("emma",)),
    ],
)
def test_sample(flags, code, parts, models, tmp_path, monkeypatch, capfd):
    (tmp_path / "empty.txt").write_text("\n  \n")
    places = {name: str(tmp_path / f"{name}.txt") for name in ("empty", "missing")}
    flags = [flag.format(**places) for flag in flags]
    base = ["--model", str(models["distill"]), "--out", str(tmp_path / "out")]
    check(run_here([*base, *flags], monkeypatch, capfd, sample.main), code, *parts)
    assert not list(tmp_path.glob("out/*"))


def test_sample_from_what_is_no_model(tmp_path, monkeypatch, capfd):
    base = ["--out", str(tmp_path / "out"), "--prompt", "a 3", "--model"]
    ended = run_here([*base, str(tmp_path)], monkeypatch, capfd, sample.main)
    check(ended, 1, str(tmp_path))


def test_commands_in_their_own_process(data, models, tmp_path):
    """The same through ``python -m``: nothing but the line on stderr, and the code of the process."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x").write_text("")
    model = ["--model", str(models["distill"]), "--out", str(tmp_path / "out")]
    cases = [
        (2, start([*words(TEACHER, data, tmp_path / "run"), "--config.step=3"]), "'steps'"),
        (1, start(words(TEACHER, data, tmp_path / "foreign")), "no config.json"),
        (2, start(words(TEACHER, data, tmp_path / "run", data__batch_size=12)), "batch_size=12"),
        (2, start([*model, "--prompt", "a 3", "--steps", "7"], "sample"), "7"),
    ]
    for code, process, part in cases:
        ended = finish(process)
        check(ended, code, part)
        assert ended.err == f"{ended.error}\n" and ended.out == ""
    assert not (tmp_path / "run").exists()


def test_shrinking_names_real_keys(data):
    """The helpers' overrides are keys of the shipped configs, with values that arrive."""
    config = tiny(TEACHER, data).to_dict()
    assert config["data"]["batch_size"] == BATCH == TINY["data.batch_size"]
    assert config["model"]["num_layers"] == 2 and len(jax.devices()) == 8
