"""The report on the digits world: numbers of real pictures, and the command on tiny networks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.workdirs import STEP, make_workdir

from sprint_jax import evaluate
from sprint_jax.core.errors import UserError
from sprint_jax.core.pixels import to_bytes
from sprint_jax.core.request import Request
from sprint_jax.digits import report
from sprint_jax.digits.evaluation import measure_sketches, print_table, student_runs
from sprint_jax.digits.scenes import draw_images

pytestmark = pytest.mark.usefixtures("quick")
KINDS = {"student": ("distill", "small"), "teacher": ("flow", "small"), "other": ("flow", "full")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("workdirs")
    return {name: str(make_workdir(root / name, *kind)) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def sticks():
    return report.make_yardsticks("small", 256, seed=0)


def real_pictures(sticks, seed):
    images = draw_images("small", sticks.prompts, "train", seed)
    return to_bytes(images), to_bytes(draw_images("small", sticks.grouped, "train", seed + 1))


def test_real_pictures_get_full_marks(sticks):
    result, right = report.measure(sticks, *real_pictures(sticks, 5))
    assert right.shape == (256,) and right.mean() > 0.95
    assert result["accuracy"]["overall"]["accuracy"] == right.mean()
    assert result["unreadable"]["share"] < 0.05
    assert result["geneval"]["overall"]["value"] >= 0.95
    frechet, variety = result["frechet"], result["diversity"]
    assert abs(result["kid"]["distance"]) < 4 * result["kid"]["standard_error"]
    assert abs(frechet["distance"] - frechet["real"]) < 5 * frechet["standard_error"]
    assert abs(variety["combined"] - 1) < 0.1 and 0 < variety["standard_error"] < 0.1
    # A Frechet distance needs 128 pictures, diversity its own.
    few, right = report.measure(sticks, real_pictures(sticks, 5)[0][:100])
    assert few["frechet"] is None and few["diversity"] is None
    assert len(right) == few["accuracy"]["overall"]["count"] == 100


def test_networks_with_a_control_branch_are_given_sketches(sticks):
    """One that draws the sketch itself follows it at every scale; students take one and two steps."""
    asked = []

    def draw(prompts, request):
        asked.append((request.steps, request.control_scale))
        yield request.control

    pipe = SimpleNamespace(params={"control": None}, draw=draw, is_student=True)
    runs = student_runs(pipe)
    found = measure_sketches(sticks, [*runs[:1], *runs[2:]], Request(seed=1))
    assert found.keys() == {"student 1"} and asked == [(1, s) for s in (0.0, 0.5, 1.0)] * 3
    iou = {(row["sketch"], row["scale"]): row["iou"]["iou"] for row in found["student 1"]}
    assert iou["right", 1.0] == 1 and iou["shuffled", 0.5] < 0.5 and iou["empty", 0.0] == 0
    assert not measure_sketches(sticks, student_runs(SimpleNamespace(params={})), Request())


def numbers(name, accuracy, distance, combined):
    return {
        "name": name,
        "accuracy": {"overall": {"accuracy": accuracy, "standard_error": 0.01}},
        "frechet": distance and {"distance": distance, "standard_error": 0.5},
        "diversity": {"combined": combined, "standard_error": 0.02},
    }


def test_goals_compare_student_with_teacher(capsys):
    runs = [numbers("teacher 20", 0.8, 10.0, 1.0)]
    runs += [numbers(f"student {n}", 0.79, 14.0, np.nan) for n in (1, 2, 3, 4)]
    goals = {(goal["run"], goal["number"]): goal for goal in report.judge_goals(runs)}
    assert {key: goal["met"] for key, goal in goals.items()} == {
        ("teacher 20", "accuracy"): False,
        ("student 1", "accuracy"): False,  # 0.79 against 0.80, whatever the teacher
        ("student 2", "accuracy"): True,
        ("student 4", "accuracy"): True,
        ("student 1", "frechet"): True,
        ("student 1", "diversity"): None,
    }
    within, frechet = goals["student 4", "accuracy"], goals["student 1", "frechet"]
    assert (within["limit"], frechet["limit"]) == (pytest.approx(0.77), 15.0)
    assert (within["standard_error"], frechet["standard_error"]) == (0.01, 0.5)
    assert within["margin_error"] == pytest.approx(0.01 * 2**0.5)
    assert frechet["margin_error"] == pytest.approx((0.5**2 + (1.5 * 0.5) ** 2) ** 0.5)
    assert goals["teacher 20", "accuracy"]["margin_error"] == 0.01  # of a fixed limit
    print_table({"runs": [], "real": numbers("real", 1, None, 1), "goals": goals.values()})
    said = "student 1: frechet 14.000 ± 0.500, at most 15.000 (difference -1.000 ± 0.901): met"
    assert said in capsys.readouterr().out.splitlines()
    runs[0] = numbers("teacher 20", 0.8, None, 1.0)
    assert {g["met"] for g in report.judge_goals(runs) if g["number"] == "frechet"} == {None}
    assert [g["number"] for g in report.judge_goals(runs[1:])] == ["accuracy"]


def test_command_writes_numbers_and_a_sheet(folders, tmp_path, capsys):
    out = tmp_path / "report.json"
    words = ["--model", folders["student"], "--teacher", folders["teacher"], "--out", str(out)]
    evaluate.main([*words, "--count", "12", "--batch", "50", "--params", "raw"])
    written = json.loads(out.read_text())
    assert written["command"].startswith("python -m sprint_jax.evaluate --model ")
    student = {"path": folders["student"], "stage": "distill", "step": STEP, "params": "raw"}
    teacher = {"path": folders["teacher"], "stage": "flow", "step": STEP, "params": "ema"}
    assert (written["model"], written["teacher"]) == (student, teacher)
    assert written["guidance"] == 3.0 and "params" not in written
    names = [run["name"] for run in written["runs"]]
    assert names[0] == "teacher 20" and names[-4:] == [f"student {n}" for n in (1, 2, 3, 4)]
    assert {run["pictures"] for run in written["runs"]} == {12}
    assert all(0 <= run["accuracy"]["overall"]["accuracy"] <= 1 for run in written["runs"])
    assert written["real"]["accuracy"]["overall"]["accuracy"] > 0.8
    assert {goal["number"] for goal in written["goals"]} == {"accuracy", "diversity", "frechet"}
    assert out.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and str(out) in printed


def test_a_lone_teacher_gets_its_own_part(folders, tmp_path):
    out = tmp_path / "report.json"
    evaluate.main(["--model", folders["teacher"], "--out", str(out), "--count", "12"])
    written = json.loads(out.read_text())
    assert written["teacher"] is None
    assert [goal["run"] for goal in written["goals"]] == ["teacher 20"]
    assert [run["steps"] for run in written["runs"]] == [20, 50, 50, 2, 1]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--metrics", "fid"], ["--metrics fid"]),
        (["--out", "report.txt"], ["--out report.txt", ".json"]),
        (["--out", "missing/report.json"], ["--out missing/report.json"]),
        (["--count", "3"], ["--count", "12"]),
        (["--model", "TEACHER", "--teacher", "TEACHER"], ["--model ", "--teacher"]),
        (["--teacher", "STUDENT"], ["--teacher ", "student"]),
        (["--teacher", "OTHER"], ["'small'", "'full'"]),
        (["--model", "nowhere"], ["nowhere"]),
        (["--steps", "2"], ["--steps", "--metrics digits"]),
        (["--cache", "x"], ["--cache", "--metrics digits"]),
        (["--metrics", "fid", "--teacher", "TEACHER"], ["--teacher", "--model"]),
        (["--metrics", "fid", "--steps", "0"], ["--steps=0"]),
        (["--metrics", "fid", "--size", "8by8"], ["--size 8by8"]),
        (["--metrics", "clip", "--prompts", "/dev/zero"], ["/dev/zero", "256 MiB"]),
    ],
)
def test_mistakes_are_refused(folders, tmp_path, words, names):
    base = {"--model": folders["student"], "--out": str(tmp_path / "report.json")}
    given = dict(zip(words[::2], words[1::2], strict=True))
    flags = base | {flag: folders.get(word.lower(), word) for flag, word in given.items()}
    with pytest.raises(UserError) as error:
        evaluate.main([word for pair in flags.items() for word in pair])
    assert all(name in str(error.value) for name in names), error.value
    assert not (tmp_path / "report.json").exists()
