"""Runs the parts of benchmarks/gpu.sh: each in a process of its own, within its time, the most important first.

    bash benchmarks/gpu.sh [--seconds 600] [--out FILE] [--wheels DIR] [--scratch DIR] [--tiny]

Each part adds its lines to FILE as it knows them, between a line {"part", "began"} and a line {"part", "ended",
"seconds"} of this process, which imports nothing of JAX. A part that has an end is not run again; one that
was cut off by --seconds, a kill or the loss of the machine begins anew. --again runs those again that did not
end well.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
OK, TOO_LONG = "finished", "out of time"
# Before it becomes the part, a process asks Linux to kill it when this one is gone: it would hold the device.
DIE_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
LEAST = 10  # seconds that are worth starting a part for


class Part(NamedTuple):
    """A process.

    Attributes:
      name: in the results.
      seconds: that it gets at most.
      words: of its command, after the interpreter.
      variables: of its environment.
      makes: a path that later parts need; it is made again where it is not.
      beside: words of commands that run at the same time; for what is not timed.
      only_for: names of the parts that need it; it is left out when these have all ended well.
    """

    name: str
    seconds: int
    words: list[str]
    variables: Mapping[str, str] = types.MappingProxyType({})
    makes: str = ""
    beside: tuple[list[str], ...] = ()
    only_for: tuple[str, ...] = ()


def parts(flags, against: list[str]) -> list[Part]:
    """All parts, the most important first."""
    out, scratch = ["--out", str(flags.out)], flags.scratch
    tiny, image = [], "1024x1024"
    counts = {"rounds": 15, "queue": 20, "steps": "1,2"}
    if flags.tiny:
        tiny, image = ["--tiny"], "64x64"
        counts = {"rounds": 1, "queue": 2, "steps": "1"}
    # Torch and JAX share the device's memory.
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # Compilers of both take minutes: they run side by side, and what is timed finds its programs. With a
    # limit, which is never reached, JAX locks what it writes.
    kept = shared | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "programs"),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(20 * 10**9),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }

    def own(part, *words, script="gpu_parts.py"):
        return [f"benchmarks/{script}", *part.split(), *words, *out, *tiny]

    def distill(size):
        return own("", "--size", size, script="gpu_distill.py")

    def sample(size, named, dtype="bfloat16", mode="reduce-overhead", others=against, **changes):
        how = counts | changes
        words = ["-m", "sprint_jax.benchmark", "sample", "--model", str(scratch / size)]
        words += ["--parts", named, "--dtype", dtype, "--image", image, *others, *out]
        words += ["--mode", mode, "--tolerance", "0.1"] if mode else []
        words += ["--no-compile"] if flags.tiny or not mode else []
        words += ["--threads", "1"] if flags.tiny else []
        return words + [word for key, value in how.items() for word in (f"--{key}", str(value))]

    def control(size):
        return sample(size, "control", mode=None, others=[], batch="1", steps="1")

    def train(kind, *words):
        words += (f"--config.data.dir={scratch / 'data'}", "--workdir", str(scratch / kind))
        words += ("--config.steps=2",) if flags.tiny else ()
        return ["-m", "sprint_jax.train", "--config", f"configs/digits.py:{kind},small", *words]

    many = "2" if flags.tiny else "10"
    networks = "transformer,decoder"
    everything, larger = f"{networks},text,whole", "transformer,whole"

    def timed(size, named, batch):
        """A part of `sample`, and one before it that compiles what it times.

        Ours one after another, since XLA times kernels to choose among them, and diffusers' beside them.
        """
        how = dict(batch=batch, others=[], mode=None, rounds=1, queue=1)
        words = ("--folder", str(scratch / size), "--batch", batch, "--image", image)
        theirs = (own("torch", *words, "--parts", named),) if against else ()
        name, folder = f"{size} x {batch}", f"programs/{size}-{batch}"
        own_cache = kept | {"JAX_COMPILATION_CACHE_DIR": str(scratch / folder)}
        more = dict(makes=folder, beside=theirs, only_for=(name,))
        before = Part(f"programs {name}", 200, sample(size, named, **how), own_cache, **more)
        return [before, Part(name, 240, sample(size, named, batch=batch), own_cache)]

    exact = dict(dtype="float32", mode=None, batch="1", rounds=1)
    alone = kept | {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    best = dict(mode="max-autotune", batch="1")
    student = train("student", f"--config.teacher={scratch / 'teacher'}")
    return [
        Part("ceilings", 60, own("ceilings")),
        Part(
            "folders", 120, own("folders", "--folder", str(scratch)), {}, "1600m/model_index.json"
        ),
        *timed("600m", everything, "1"),
        Part("distill 600m", 240, distill("600m"), alone),
        Part("options transformer", 200, own("options", "--network", "transformer")),
        Part("options decoder", 300, own("options", "--network", "decoder")),
        *timed("600m", everything, many),
        Part("600m control", 200, control("600m"), kept),
        *timed("1600m", larger, "1"),
        *timed("1600m", larger, many),
        Part("1600m control", 200, control("1600m"), kept),
        Part("distill 1600m", 240, distill("1600m"), alone),
        Part("float32 equal", 240, sample("600m", networks, **exact), shared),
        Part("600m first picture", 200, sample("600m", "first", mode=None, batch="1", steps="1")),
        Part("max-autotune", 300, sample("600m", networks, **best), shared),
        Part("digits teacher", 200, train("teacher"), {}, "teacher/config.json"),
        Part("digits student", 300, student, {}, "student/config.json"),
        Part("digits accuracy", 60, own("accuracy", "--folder", str(scratch / "student"))),
    ]


def ended(out: Path) -> dict[str, str]:
    """Returns {part: how it ended} of a file of results, without the parts that were cut off.

    Half a line at the end, of a process that was killed while it wrote, is taken off the file.
    """
    found: dict[str, str] = {}
    if not out.exists():
        return found
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(out, len(whole))
    for line in map(json.loads, whole.splitlines()):
        if "began" in line:
            found.pop(line["part"], None)
        elif "ended" in line and line["ended"] != "cut off":
            found[line["part"]] = line["ended"]
    return found


def add(out: Path, line: dict) -> None:
    """Adds a line to the results, and shows it."""
    ended(out)  # takes off half a line of a part that was killed
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def run(part: Part, seconds: float, out: Path, logs: Path, variables: dict[str, str]) -> None:
    """Runs a part for at most so many seconds, which may be fewer than it asks for; writes how it ended."""
    add(out, {"part": part.name, "began": time.strftime("%Y-%m-%d %H:%M:%S")})
    began, log = time.monotonic(), logs / f"{part.name.replace(' ', '_')}.log"
    with log.open("wb") as file:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", DIE_WITH_PARENT, *words],
                env=os.environ | variables | part.variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=HERE.parent,
                start_new_session=True,  # so that it ends with all that it started
            )
            for words in (part.words, *part.beside)
        ]
        try:
            left = (began + seconds - time.monotonic() for _ in processes)
            codes = [each.wait(max(0, next(left))) for each in processes]
            how = next((f"exit code {code}" for code in codes if code), OK)
        except subprocess.TimeoutExpired:
            how = TOO_LONG if seconds >= part.seconds else "cut off"
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    line = {"part": part.name, "ended": how, "seconds": round(time.monotonic() - began, 1)}
    if how != OK:
        line["log"] = log.read_text(errors="replace").strip()[-600:]
    add(out, line)


def _unneeded(part: Part, done: Mapping[str, str], again: bool) -> bool:
    """Whether all that a part is for has ended: well, if what did not is to run ``again``."""
    ends = [done.get(name) for name in part.only_for]
    return bool(ends) and all(end == OK if again else end for end in ends)


def missing(wheels: Path) -> list[Path]:
    """The wheels of what is not installed here, or is older than the wheel."""
    wanted = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version, *_ = wheel.name.split("-")
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there = ""
        if _numbers(there) < _numbers(version):
            wanted.append(wheel)
    return wanted


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def install(wheels: Path, site: Path) -> None:
    """Unpacks what is missing into a folder of its own; this environment stays as it is."""
    wanted = missing(wheels)
    names = sorted({wheel.name.split("-")[0] for wheel in wanted})
    if not names:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--disable-pip-version-check", "--upgrade"]
    pip += ["--find-links", str(wheels), "--target", str(site), *names]
    subprocess.run(pip, check=True)


def main(argv: list[str]) -> int:
    """Runs what is left to run; returns 1 if a part failed or time was short, else 0."""
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", allow_abbrev=False)
    add_flag = parser.add_argument
    add_flag("--seconds", type=float, default=600, help="for all parts together (default 600)")
    add_flag("--out", type=Path, help="results are added (results/gpu.jsonl)")
    add_flag("--wheels", type=Path, default=HERE.parent / ".wheels", help="of benchmarks/wheels.sh")
    add_flag("--scratch", type=Path, help="for 12 GB (default runs/gpu)")
    add_flag("--only", default="", help="some of the parts, by commas")
    add_flag("--again", action="store_true", help="also parts that did not end well")
    add_flag("--alone", action="store_true", help="without torch, even if it is there")
    add_flag("--tiny", action="store_true", help="sizes for CPUs, to try the script")
    flags = parser.parse_args(argv)
    until = time.monotonic() + flags.seconds
    if not (flags.tiny or Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi")):
        parser.error("this machine has no NVIDIA GPU; --tiny tries the script on CPU")
    # What --tiny measures must not count as measured.
    usual = HERE.parent / "runs" / ("gpu-tiny" if flags.tiny else "gpu")
    flags.scratch = (flags.scratch or usual).resolve()
    folder = flags.scratch if flags.tiny else HERE / "results"
    flags.out = (flags.out or folder / "gpu.jsonl").resolve()
    logs, site = flags.scratch / "logs", flags.scratch / "site"
    for folder in (logs, site, flags.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(site))
    install(flags.wheels, site)
    importlib.invalidate_caches()
    others = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers"))
    table = parts(flags, ["--against", "diffusers"] if others and not flags.alone else [])
    only = [name for name in flags.only.split(",") if name] or [part.name for part in table]
    if unknown := set(only) - {part.name for part in table}:
        parser.error(f"--only {min(unknown)} is none of {', '.join(part.name for part in table)}")
    variables = {
        "PYTHONPATH": os.pathsep.join(
            [str(site), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "JAX_PLATFORMS": "cpu" if flags.tiny else "cuda",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "HF_HUB_OFFLINE": "1",
    }
    done = ended(flags.out)
    for part in table:
        # A machine that is lent again comes without what was made on it.
        how = done.get(part.name) if (flags.scratch / part.makes).exists() else None
        is_needed = part.name in only and not _unneeded(part, done, flags.again)
        if not is_needed or how == OK or (how and not flags.again):
            continue
        left = until - time.monotonic()
        if left < LEAST:
            break
        run(part, min(part.seconds, left), flags.out, logs, variables)
        if part.only_for and ended(flags.out).get(part.name) in (None, TOO_LONG):
            # A program that was half written when its compiler was killed is never replaced.
            shutil.rmtree(flags.scratch / part.makes, ignore_errors=True)
    done = ended(flags.out)
    wanted = [part for part in table if part.name in only and not _unneeded(part, done, True)]
    left = [part.name for part in wanted if done.get(part.name) != OK]
    print(f"{flags.out}: " + (f"not finished: {', '.join(left)}" if left else "all is measured"))
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
