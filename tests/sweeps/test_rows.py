"""Sweeps: combinators, rows, names of folders, and everything that is wrong before a run starts."""

import subprocess
import sys

import pytest
from helpers.runs import ROOT
from helpers.toy_sweep import TOY

from launch import sweep as command
from sprint_jax.core.config import load_config
from sprint_jax.core.errors import UserError
from sprint_jax.sweeps import chain, product, sweep, zip
from sprint_jax.sweeps.rows import NAME_LIMIT, folder_name, load_rows

DIGITS = str(ROOT / "configs" / "digits.py")


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "settings" / "toy.py"
    path.parent.mkdir()
    path.write_text(TOY)
    return str(path)


def test_combinators():
    a, b = sweep("a", [1, 2]), sweep("b.c", [3, 4])
    assert a == [{"a": 1}, {"a": 2}]
    assert product(a, b) == [
        {"a": 1, "b.c": 3},
        {"a": 1, "b.c": 4},
        {"a": 2, "b.c": 3},
        {"a": 2, "b.c": 4},
    ]
    assert zip(a, b) == [{"a": 1, "b.c": 3}, {"a": 2, "b.c": 4}]
    assert chain(a, [{}], b) == [{"a": 1}, {"a": 2}, {}, {"b.c": 3}, {"b.c": 4}]
    assert product() == [{}] and product(a, []) == [] == chain() == zip()
    assert a == [{"a": 1}, {"a": 2}] and b == [{"b.c": 3}, {"b.c": 4}], "arguments stay"


@pytest.mark.parametrize("combine", [product, zip])
def test_two_parts_must_not_set_one_key(combine):
    with pytest.raises(UserError, match="two parts of a sweep set 'a'"):
        combine(sweep("a", [1]), sweep("b", [2]), sweep("a", [3]))


def test_zip_wants_equal_lengths():
    with pytest.raises(UserError, match=r"\[2, 3\] rows"):
        zip(sweep("a", [1, 2]), sweep("b", [1, 2, 3]))


def test_names_are_readable_unique_and_of_the_overrides_alone(toy, tmp_path):
    rows = load_rows(toy, "lr", ["--config.steps=9"], tmp_path)
    assert [row.name for row in rows] == [
        "optimizer.learning_rate=0.0001,seed=0",
        "optimizer.learning_rate=0.0001,seed=1",
        "optimizer.learning_rate=0.0003,seed=0",
        "optimizer.learning_rate=0.0003,seed=1",
    ]
    assert folder_name({"b": 1, "a": 2}) == folder_name({"a": 2, "b": 1}) == "a=2,b=1"
    odd = [row.name for row in load_rows(toy, "kinds", [], tmp_path)]
    assert odd[0] == "base" and odd[-1] == "scm.mean_norm=true"
    assert [name.rpartition("_")[0] for name in odd[1:-1]] == [
        "ladd.taps=1-2",
        "ladd.taps=3",
        "ladd.taps=",
        "init=a-b",
        "init=a-b",
    ]
    assert len(set(odd)) == len(odd)
    long = [folder_name({"teacher": 300 * "x" + end}) for end in "ab"]
    assert long[0] != long[1] and max(map(len, long)) == NAME_LIMIT + 9
    assert not any(set(name) & set("/ \\%") for name in odd)


def test_arguments_are_those_of_train_and_give_the_config_of_the_row(toy, tmp_path):
    for name in ("lr", "kinds"):
        for row in load_rows(toy, name, ["--config.steps=9"], tmp_path):
            first, second, third, fourth, *words = row.arguments
            assert (first, second, third) == ("--config", toy, "--workdir")
            assert fourth == str(tmp_path / row.name)
            assert load_config(toy, words) == row.config and row.config.steps == 9


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("unknown", [], r"row 2 of 2 .*'optimizer.learning_rat', nearest is 'optimizer.learning_r"),
        ("wrong", [], r"row 2 of 2 .*--config.seed=many must be an integer"),
        ("small", [], r"row 2 of 2 .*config.data.batch_size=0 must be at least 1"),
        ("twice", [], r"row 2 of 2 .*repeats row 1"),
        ("words", [], r"row 1 of 1 .*must be a dict"),
        ("seed", ["--config.seed=4"], r"row 1 of 4 .*--config.seed is set for all rows"),
        ("empty", [], "has no rows"),
        ("sede", [], r"has no sweep_sede\(\); it has: empty, kinds, lr"),
    ],
)
def test_what_is_wrong_is_found_before_anything_starts(name, words, message, toy, tmp_path):
    workdir = tmp_path / "sweep"
    arguments = ["--config", toy, "--sweep", name, "--workdir", str(workdir), *words]
    with pytest.raises(UserError, match=message) as caught:
        command.main(arguments)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel", "0"], "--parallel and --last must be at least 1"),
        (["--last", "0"], "--parallel and --last"),
        (["--parallel", "2", "--backend", "slurm"], "no use with --backend slurm"),
        (["--backend", "cloud"], "invalid choice: 'cloud'"),
        (["--goal", "best"], "invalid choice: 'best'"),
        (["--paralel", "2"], "nearest is --parallel"),
        (["--workdir", "gs://bucket/x"], "must be a folder, not an address"),
    ],
)
def test_wrong_flags(words, message, toy, tmp_path):
    base = ["--config", toy, "--sweep", "seed", "--workdir", str(tmp_path / "sweep")]
    with pytest.raises(UserError, match=message) as caught:
        command.main([*base, *words])
    assert caught.value.exit_code == 2 and not (tmp_path / "sweep").exists()


def test_sweeps_of_the_shipped_config_load(tmp_path):
    for spec, names in (("teacher", ["lr"]), ("student", ["lr", "losses", "ladd"])):
        for name in names:
            rows = load_rows(f"{DIGITS}:{spec},small", name, ["--config.teacher=x"], tmp_path)
            assert len(rows) >= 3
            assert len({str(row.config.to_dict()) for row in rows}) == len(rows)


def test_dry_run_prints_the_commands_and_touches_nothing(toy, tmp_path, capsys):
    """Nor any device: a backend of another process would be taken from the trainings."""
    workdir = tmp_path / "sweep"
    words = ["--config", toy, "--sweep", "lr", "--workdir", str(workdir), "--dry_run"]
    environment = {"JAX_PLATFORMS": "nonsense", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.sweep", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and not workdir.exists()
    assert lines[0] == "# optimizer.learning_rate=0.0001,seed=0: from step 0"
    assert lines[1].split()[1:3] == ["-m", "sprint_jax.train"]
    assert lines[7].endswith("--config.optimizer.learning_rate=0.0003 --config.seed=1")
    command.main([*words, "--backend", "slurm"])
    assert capsys.readouterr().out.splitlines()[1].startswith("sbatch --parsable --job-name=")
    command.main([*words, "--backend", "pod"])
    assert capsys.readouterr().out.splitlines()[1].startswith("bash launch/tpu_pod.sh -- --config ")
    assert not workdir.exists()
