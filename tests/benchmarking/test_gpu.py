"""Benchmarks of a GPU machine: parts that end, fail and are cut off; wheels; the page; tiny sizes for real."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.runs import ROOT, wait_for

from sprint_jax.benchmarking import goals, gpu_page

BENCHMARKS = ROOT / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu():
    return load("gpu")


@pytest.fixture
def run(gpu, tmp_path, monkeypatch):
    """Runs a table of parts {name: (seconds, code)}; returns the exit code and the lines since."""
    out = tmp_path / "out.jsonl"

    def call(table, *words):
        made = [gpu.Part(name, seconds, ["-c", code]) for name, (seconds, code) in table.items()]
        monkeypatch.setattr(gpu, "parts", lambda *_: made)
        before = out.read_text().count("\n") if out.exists() else 0
        words = ["--tiny", f"--out={out}", f"--scratch={tmp_path / 'scratch'}", *words]
        code = gpu.main([*words, f"--wheels={tmp_path / 'wheels'}"])
        return code, [*map(json.loads, out.read_text().splitlines()[before:])]

    return call


def ends(lines):
    return {line["part"]: line["ended"] for line in lines if "ended" in line}


def test_a_part_that_fails_or_takes_too_long_costs_only_itself(run):
    table = {
        "good": (9, "import os; print(os.environ['JAX_PLATFORMS'])"),
        "bad": (9, "import sys; print('memory'); sys.exit(3)"),
        "slow": (0.1, "import time; time.sleep(60)"),
        "last": (9, ""),
    }
    code, lines = run(table)
    expected = {"good": "finished", "bad": "exit code 3", "slow": "out of time", "last": "finished"}
    assert code == 1 and ends(lines) == expected
    assert [line["log"] for line in lines if line.get("ended") == "exit code 3"] == ["memory"]
    assert run(table) == (1, [])  # what has ended is not run again
    table["bad"] = table["slow"] = (9, "")
    assert run(table, "--again", "--only=bad")[0] == 0
    code, lines = run(table, "--again")
    assert code == 0 and ends(lines) == {"slow": "finished"}
    with pytest.raises(SystemExit) as error:
        run(table, "--only=good,better")
    assert error.value.code == 2


def test_what_the_time_for_all_cuts_off_begins_anew(run, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0)
    table = {"first": (90, "import time; time.sleep(60)"), "second": (9, "")}
    code, lines = run(table, "--seconds=0.2")
    assert code == 1 and ends(lines) == {"first": "cut off"}
    table["first"] = (9, "")
    code, lines = run(table)
    assert code == 0 and ends(lines) == {"first": "finished", "second": "finished"}


def test_commands_of_a_part_run_at_once_and_each_must_end_well(gpu, tmp_path, monkeypatch):
    def meet(mine, others):
        code = "import pathlib, time; end = time.time() + 60\n"
        code += f"pathlib.Path({str(tmp_path / mine)!r}).touch()\n"
        code += (
            f"while not pathlib.Path({str(tmp_path / others)!r}).exists(): assert time.time() < end"
        )
        return ["-c", code]

    spared = gpu.Part("spared", 90, ["-c", "1 / 0"], only_for=("both",))
    both = gpu.Part("both", 90, meet("a", "b"), beside=(meet("b", "a"),))
    bad = gpu.Part("bad", 90, ["-c", ""], beside=(["-c", "import sys; sys.exit(5)"],))
    monkeypatch.setattr(gpu, "parts", lambda *_: [both, bad])
    out = tmp_path / "out.jsonl"
    words = ["--tiny", f"--out={out}", f"--scratch={tmp_path}", f"--wheels={tmp_path / 'none'}"]
    assert gpu.main(words) == 1
    found = ends(map(json.loads, out.read_text().splitlines()))
    assert found == {"both": "finished", "bad": "exit code 5"}
    # What is made for parts that have ended is made no more.
    monkeypatch.setattr(gpu, "parts", lambda *_: [spared, both])
    assert gpu.main(words) == 0


def test_without_a_gpu_one_line_says_so(gpu, capsys, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    monkeypatch.setattr(gpu.Path, "exists", lambda _: False)
    with pytest.raises(SystemExit) as error:
        gpu.main([])
    assert error.value.code == 2 and "--tiny" in capsys.readouterr().err


RUNNER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gpu", sys.argv[1])
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)
first = gpu.Part("first", 60, ["-c", ""])
made = gpu.Part("made", 60, ["-c", f"import pathlib; pathlib.Path({sys.argv[3]!r}).touch()"], makes="made")
second = gpu.Part("second", 60, ["-c", sys.argv[2]])
gpu.parts = lambda *_: [first, made, second]
sys.exit(gpu.main(sys.argv[4:]))
"""


def test_a_kill_loses_half_a_line_and_nothing_runs_on(tmp_path):
    out, pid, made = tmp_path / "out.jsonl", tmp_path / "pid", tmp_path / "scratch" / "made"
    half = f"import os, time; file = open({str(out)!r}, 'a'); file.write('{{\"half'); file.flush()"
    half += f"; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    words = ["--tiny", f"--out={out}", f"--scratch={made.parent}", f"--wheels={tmp_path / 'none'}"]
    command = [sys.executable, "-c", RUNNER, str(BENCHMARKS / "gpu.py")]
    process = subprocess.Popen([*command, half, str(made), *words], stdout=subprocess.DEVNULL)
    wait_for(lambda: pid.exists() and pid.read_text())
    process.kill()
    process.wait()
    wait_for(lambda: not Path(f"/proc/{pid.read_text()}").exists())
    assert out.read_text().endswith('{"half')
    made.unlink()  # as on another machine
    subprocess.run([*command, "", str(made), *words], check=True, stdout=subprocess.DEVNULL)
    lines = [*map(json.loads, out.read_text().splitlines())]
    begun = [line["part"] for line in lines if "began" in line]
    assert begun == ["first", "made", "second", "made", "second"]
    assert ends(lines) == dict.fromkeys(("first", "made", "second"), "finished")


def write_wheel(folder, name, version):
    """A wheel of one module that holds its version."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {f"{name}.py": f"version = '{version}'\n"}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.mark.slow
def test_parts_import_what_only_the_wheels_have(run, gpu, tmp_path):
    wheels = tmp_path / "wheels"
    write_wheel(wheels, "only_a_wheel", "1.2")
    write_wheel(wheels, "pytest", "0.1")  # older than what is there
    assert [path.name.partition("-")[0] for path in gpu.missing(wheels)] == ["only_a_wheel"]
    code = "import only_a_wheel, pytest; assert only_a_wheel.version == '1.2' and pytest.fixture"
    assert run({"part": (60, code)})[0] == 0


def closure(names):
    """Names of installed distributions that these require, without extras, and theirs in turn."""
    seen, left = set(), [*names]
    while left:
        name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", left.pop())[0]).lower()
        if name in seen:
            continue
        try:
            more = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:  # of another platform or version of Python
            continue
        seen.add(name)
        left += [line for line in more if "extra ==" not in line]
    return seen


def test_the_wheels_are_all_that_a_machine_with_jax_torch_and_transformers_lacks():
    script = (BENCHMARKS / "wheels.sh").read_text()
    names = re.search(r'names="(.*?)"', script, re.S)[1].split()
    names += re.search(r'only_source="(.*?)"', script)[1].split()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = closure(line for line in lines if line and not line.startswith("#"))
    there = closure(["jax", "huggingface-hub", "tokenizers", "safetensors", "tqdm"])
    left_out = {"pyarrow", "uvloop", "matplotlib", "scikit-learn", "contourpy", "fonttools"}
    left_out |= {
        "kiwisolver",
        "rich",
        "markdown-it-py",
        "mdurl",
        "pygments",
    }  # rich: of transformers
    lacking = needed - there - left_out - {name.lower() for name in names}
    assert not lacking and {"diffusers", "flax", "grain", "optax"} <= set(names)


PLAN = {
    "topology": "h200:1",
    "model": "600m",
    "runs": [
        {
            "steps": 1,
            "batch": 1,
            "parts": [{"name": "transformer", "calls": 1, "seconds": 0.0021}],
            "whole": {"seconds": 0.0154},
        }
    ],
}


EIGHT = {"topology": "h200:8", "chip": "H200", "config": "configs/sprint.py:1600m", "fits": True}
EIGHT |= {"devices": 8, "batch": 512, "mfu": 0.61, "limit_bytes": 100.0, "bytes_per_device": 70.0}
EIGHT |= {"memory": {"batch": 2.0, "temporaries": 18.0, "params": 50.0}}


def test_the_page_shows_goals_beside_plans_and_the_last_run_of_a_part():
    def begin(part):
        return [{"part": part, "began": "now"}, {"command": "x", "device": "H200"}]

    def forward(ms):
        line = {"workload": "transformer", "size": "x/600m", "batch": 1, "dtype": "bfloat16"}
        line |= {"ms": {"sprint_jax": [1.0, ms, 9.0], "diffusers": [2.0, 20.0, 30.0]}}
        return line | {"ratio": {"diffusers": [1.5, 2.5, 3.5]}, "pictures_per_s": 1e3 / ms}

    step = {"distill": "1600m", "batch": 96, "images_per_second": 8, "needed_gb": 130.0}
    step |= {"flops_per_second": 4e14, "ms": {"generator": [1, 2, 3], "discriminator": [4, 5, 6]}}
    lines = [*begin("600m x 1"), forward(8.0), *begin("600m x 1"), forward(4.0)]
    lines += [
        *begin("ceilings"),
        {"ceiling": "product", "per_second": 8e14, "ms": {"product": [1, 2, 3]}},
    ]
    lines += [*begin("programs 600m"), forward(5.0)]  # timed beside others
    fused = {"options": "decoder", "option": "fused", "ratio": {"fused": [0.8, 0.9, 1.0]}}
    lines += [*begin("options decoder"), fused | {"compile_s": 9.5}]
    lines += [fused | {"option": "new", "failed": "unknown", "ratio": {}}]
    lines += [*begin("distill 1600m"), {"distill": "1600m", "batch": 128}, step]
    found = {
        row[0]: row for row in goals.rows([PLAN, *PLAN["runs"], EIGHT], goals.latest(lines), [])
    }
    assert found["transformer 0.6B, batch 1, ms"][3:] == ("2.1", "4 (H200)")
    assert found["prompt to picture 0.6B / 1.6B, 1 step, ms"][3:] == ("15.4 / -", "")
    assert found["MFU of distillation, 0.6B / 1.6B"][3:] == (
        "- / 61%",
        "- / 50% of the measured product (H200)",
    )
    assert found["largest batch of a GPU, remat, EMA, 0.6B / 1.6B"][3:] == (
        "- / 160",  # on the line of what grows with the batch
        "- / 96 (H200)",
    )
    assert all(row[3:] == ("", "") for row in goals.rows([], [], []))
    page = gpu_page.section([PLAN], lines, [])
    assert "| transformer | 600m | bfloat16 | 1 | 4 | 2.50 [1.50, 3.50] | - | - |" in page
    assert "| decoder | fused | 9.5 | 0.90 [0.80, 1.00] |" in page
    assert "| decoder | new | unknown | - |" in page
    assert "| 1600m | 96 | 8 | 2, 5 | 130.0 |" in page and "| product | 8e+14 | H200 |" in page


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_tiny_parts_run_from_a_random_folder_to_pictures(tmp_path):
    out = tmp_path / "out.jsonl"
    words = ["--tiny", "--alone", f"--out={out}", f"--scratch={tmp_path}", "--seconds=500"]
    words += [f"--wheels={tmp_path / 'none'}", "--only=ceilings,folders,600m x 1,600m control"]
    script = ["bash", BENCHMARKS / "gpu.sh", *words]
    ended = subprocess.run(script, env=os.environ | {"PYTHON": sys.executable}, check=False)
    lines = [*map(json.loads, out.read_text().splitlines())]
    assert ended.returncode == 0, lines
    found = {line["workload"]: line for line in lines if "workload" in line}
    sketches = ["control, 1 steps", "control remembered, 1 steps"]
    assert list(found) == ["transformer", "decoder", "text", "whole, 1 steps", *sketches]
    ceilings = {line["ceiling"]: line["per_second"] for line in lines if "ceiling" in line}
    assert min(ceilings.values()) > 1e6 and set(ceilings) == {"product", "copy"}
    assert [line["folder"] for line in lines if "folder" in line] == ["600m", "1600m"]
    assert goals.latest(lines)[0]["device"] == "cpu"
    assert (tmp_path / "1600m" / "vae").is_symlink()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_tiny_distillation_is_timed_and_its_losses_are_finite(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    load("gpu_distill").main(["--tiny", "--pairs=2", f"--out={out}"])
    head, tried, line = map(json.loads, out.read_text().splitlines())
    assert head["command"].startswith("python benchmarks/gpu_distill.py --tiny")
    assert tried == {"distill": "600m", "batch": 2, "needed_gb": tried["needed_gb"]}
    assert line["pairs"] == 2 and set(line["ms"]) == {"generator", "discriminator"}
    assert line["losses"] and all(abs(value) < 1e6 for value in line["losses"].values())
    capsys.readouterr()
