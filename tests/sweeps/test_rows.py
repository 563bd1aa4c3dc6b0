"""Sweeps: combinators, rows, names of folders, and everything that is wrong before a run starts."""

import os
import subprocess
import sys

import pytest
from helpers.runs import ROOT
from helpers.toy_sweep import TOY

from configs import methods
from launch import sweep as command
from sprint_jax.core.config import load_config
from sprint_jax.core.errors import UserError
from sprint_jax.sweeps import chain, product, sweep, together
from sprint_jax.sweeps.rows import NAME_LIMIT, folder_name, load_rows


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    return str(tmp_path / "toy.py")


def test_combinators():
    a, b = sweep("a", [1, 2]), sweep("b.c", [3, 4])
    assert a == [{"a": 1}, {"a": 2}]
    pairs = [{"a": 1, "b.c": 3}, {"a": 1, "b.c": 4}, {"a": 2, "b.c": 3}, {"a": 2, "b.c": 4}]
    assert product(a, b) == pairs and product() == [{}] and product(a, []) == []
    assert together(a, b) == [pairs[0], pairs[3]]
    assert chain(a, [{}], b) == [*a, {}, *b]
    for combine in (product, together):
        with pytest.raises(UserError, match="'a'"):
            combine(sweep("a", [1]), sweep("b", [2]), sweep("a", [3]))
    with pytest.raises(UserError, match=r"\[2, 3\]"):
        together(a, sweep("b", [1, 2, 3]))


def test_names_are_readable_and_unique_and_arguments_are_those_of_train(toy, tmp_path):
    rows = load_rows(toy, "lr", ["--config.steps=9"], tmp_path)
    names = [f"optimizer.learning_rate={lr},seed={seed}" for lr in (1e-4, 3e-4) for seed in (0, 1)]
    assert [row.name for row in rows] == names
    odd = [row.name for row in load_rows(toy, "kinds", [], tmp_path)]
    assert odd[0] == "base" and odd[-1] == "scm.mean_norm=true"
    shown = ["ladd.taps=1-2", "ladd.taps=3", "ladd.taps=", "init=a-b", "init=a-b"]
    assert [name.rpartition("_")[0] for name in odd[1:-1]] == shown
    long = [folder_name({"teacher": 300 * "x" + end}) for end in "ab"]
    assert max(map(len, long)) == NAME_LIMIT + 9
    assert len(set(odd + long)) == len(odd + long)
    for row in rows:
        assert row.arguments[:4] == ("--config", toy, "--workdir", str(tmp_path / row.name))
        assert load_config(toy, row.arguments[4:]) == row.config and row.config.steps == 9


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("unknown", [], "row 2 of 2 .*'optimizer.learning_rat'"),
        ("wrong", [], "row 2 of 2 .*config.seed=many"),
        ("small", [], "row 2 of 2 .*config.data.batch_size=0"),
        ("twice", [], "row 2 of 2 .*row 1"),
        ("words", [], "row 1 of 1 .*seed=1"),
        ("seed", ["--config.seed=4"], "row 1 of 4 .*--config.seed"),
        ("empty", [], "sweep_empty"),
        ("sede", [], "sweep_sede.*empty, kinds, lr"),
        ("seed", ["--parallel", "0"], "--parallel"),
        ("seed", ["--last", "0"], "--last"),
        ("seed", ["--parallel", "2", "--backend", "slurm"], "--parallel.*slurm"),
        ("seed", ["--workdir", "http://bucket/x"], "http://bucket/x"),
    ],
)
def test_what_is_wrong_is_found_before_anything_starts(name, words, message, toy, tmp_path):
    workdir = tmp_path / "sweep"
    with pytest.raises(UserError, match=message) as caught:
        command.main(["--config", toy, "--sweep", name, "--workdir", str(workdir), *words])
    assert caught.value.exit_code == 2 and not workdir.exists()


@pytest.mark.parametrize("name", ["teacher lr", "student lr", "student losses", "student ladd"])
def test_sweeps_of_the_shipped_config_load(name, tmp_path):
    stage, name = name.split()
    spec = f"{ROOT / 'configs' / 'digits.py'}:{stage},small"
    assert len(load_rows(spec, name, ["--config.teacher=x"], tmp_path)) >= 3


def test_every_method_is_a_row_with_a_name_that_train_accepts(tmp_path):
    rows = load_rows(str(ROOT / "configs" / "methods.py"), "updates", [], tmp_path)
    assert len(rows) == 3 * len(methods.METHODS) and rows[0].name == "scm-0"
    assert {row.config.seed for row in rows} == {0, 1, 2}
    assert all("--config.name" not in " ".join(row.arguments) for row in rows)
    meanflow = next(row.config for row in rows if row.name == "meanflow-1")
    assert meanflow.model.flow_map and not meanflow.scm.weight
    rows = load_rows(str(ROOT / "configs" / "methods.py") + ":small", "paper", [], tmp_path)
    assert len(rows) == 5 * len(methods.PAPER) and rows[0].name == "both-0"
    weights = {row.name: (row.config.scm.weight, row.config.ladd.weight) for row in rows}
    assert weights["both-4"] == weights["untold-0"] == (1.0, 0.5)
    assert (weights["ladd_alone-1"], weights["scm_alone-1"]) == ((0.0, 0.5), (1.0, 0.0))


def test_dry_run_prints_the_commands_and_touches_nothing(toy, tmp_path, capsys):
    """Nor any device: a backend of another process would be taken from the trainings."""
    workdir = tmp_path / "sweep"
    words = ["--config", toy, "--sweep", "lr", "--workdir", str(workdir), "--dry_run"]
    program = [sys.executable, "-m", "launch.sweep", *words]
    environment = os.environ | {"JAX_PLATFORMS": "nonsense"}
    out = subprocess.run(program, cwd=ROOT, env=environment, check=True, capture_output=True).stdout
    lines = out.decode().splitlines()
    assert len(lines) == 8 and lines[1].split()[1:3] == ["-m", "sprint_jax.train"]
    assert lines[7].endswith("--config.optimizer.learning_rate=0.0003 --config.seed=1")
    for backend, start in {"slurm": "sbatch --job", "pod": "bash launch/tpu_pod.sh -- "}.items():
        command.main([*words, "--backend", backend])
        assert capsys.readouterr().out.splitlines()[1].startswith(start)
    assert not workdir.exists()
