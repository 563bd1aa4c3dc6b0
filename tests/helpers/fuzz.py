"""Fuzzing of all that reads what others wrote: `tests/faults/fuzz.py` is the command.

Case i of a seed is the same each time; its kind takes turns. A process of its own runs them. A finding is an
exception that is no refusal, a process that ends, one that answers nothing for LIMIT seconds though it is not
waiting for a processor, or one that takes GROWTH bytes more than before.
"""

import collections
import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from helpers.damage import damage_bytes, damage_json, damage_words

ROOT = Path(__file__).parents[2]
LIMIT = 120.0  # seconds; the machine may be busy, and no case computes anything
GROWTH = 1 << 30
KINDS = ("json", "weights", "tar", "image", "command")


class Done(Exception):
    """A command came to the point where it would compute."""


class Fuzz:
    """Whole files in a folder, and for each kind a function of a `random.Random` that damages and reads one."""

    def __init__(self, folder: Path):
        from helpers.image_sets import draw_image, make_samples, write_tars
        from helpers.pipeline_folder import write_pipeline
        from helpers.workdirs import make_workdir
        from numpy.random import default_rng

        from sprint_jax.core.ranges import RANGES

        self.folder = folder
        self.pipeline = write_pipeline(folder / "pipeline")
        self.workdirs = {s: make_workdir(folder / s, s) for s in ("flow", "distill")}
        self.tars = sorted(write_tars(folder / "tars", make_samples(12), shards=2).glob("*.tar"))
        self.images = [draw_image(default_rng(i), i)[1] for i in range(12)]
        self.tensors = sorted(self.pipeline.rglob("*.safetensors"))
        self.documents = sorted(self.pipeline.rglob("*.json"))
        self.keys = list(RANGES)
        self.documents += [path / "config.json" for path in self.workdirs.values()]
        self.commands, self.computing = commands(self.workdirs, self.pipeline)
        os.chdir(folder)

    def run(self, seed: int, number: int) -> tuple[str, str]:
        """Kind, and 'accepted', 'refused' or what is wrong."""
        from sprint_jax.core import cli
        from sprint_jax.core.errors import UserError
        from sprint_jax.core.storage import is_provider_error
        from sprint_jax.data.sources.records import Rejected

        case, kind = random.Random(f"{seed} {number}"), KINDS[number % len(KINDS)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            getattr(self, kind)(case)
            outcome = "accepted"
        except Done:
            outcome = "accepted"
        except (UserError, Rejected) as error:
            outcome = "refused" if str(error).strip() else "refused without a word"
        except OSError as error:
            known = error.errno in cli._MACHINE_ERRORS or is_provider_error(
                error.__cause__ or error
            )
            outcome = "refused" if known else describe(error)
        except Exception as error:
            outcome = "refused" if is_provider_error(error) else describe(error)
        except SystemExit as error:
            outcome = "accepted" if error.code in (0, None) else f"exit {error.code}"
        except BaseException as error:  # tokenizers' panics are no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = describe(error)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        return kind, f"{grown >> 20} MB taken" if grown > GROWTH else outcome

    def json(self, case: random.Random) -> None:
        path = case.choice(self.documents)
        with replaced(path, damage_json(case, path.read_text())):
            self.read(path)

    def weights(self, case: random.Random) -> None:
        path = case.choice(self.tensors)
        data = path.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        if case.random() < 0.5:  # a header that is JSON still
            header = damage_json(case, data[8:size].decode())
            data = len(header).to_bytes(8, "little") + header + data[size:]
        else:
            data = damage_bytes(case, data, size)
        with replaced(path, data):
            self.read(path)

    def read(self, path: Path) -> None:
        """Loads the pipeline or workdir that a file belongs to; one that loads must draw, or say why not."""
        from sprint_jax import SprintPipeline

        whose = [each for each in self.workdirs.values() if path.is_relative_to(each)]
        pipe = SprintPipeline.from_pretrained((whose or [self.pipeline])[0])
        pipe.latent_shape()
        pipe.check_steps()
        pipe.encode_text(["a red 3" if whose else "a red cat"])
        check_network(pipe)

    def tar(self, case: random.Random) -> None:
        from sprint_jax.data.sources.open import open_images
        from sprint_jax.data.sources.records import Rejected

        path = case.choice(self.tars)
        heads = [at for at in range(0, path.stat().st_size, 512)]
        data = bytearray(path.read_bytes())
        at = case.choice(heads)
        data[at : at + 512] = damage_bytes(case, bytes(data[at : at + 512]))
        damaged = self.folder / "damaged.tar"
        for old in self.folder.glob("damaged.tar*"):
            old.unlink()
        damaged.write_bytes(damage_bytes(case, bytes(data)) if case.random() < 0.2 else data)
        (source,) = open_images((str(damaged),))
        for index in range(len(source)):
            with contextlib.suppress(Rejected):
                source.measure(index)
                source[index]

    def image(self, case: random.Random) -> None:
        from sprint_jax.data.sources.images import decode_image, measure_image
        from sprint_jax.data.sources.records import Rejected

        data = damage_bytes(case, case.choice(self.images), case.choice((64, 256, None)))
        with contextlib.suppress(Rejected):
            measure_image(data, "image")
        decode_image(data, "image")

    def command(self, case: random.Random) -> None:
        main, words = case.choice(self.commands)
        words = damage_words(case, words, self.keys)
        with contextlib.ExitStack() as stack:
            stack.callback(self.clean)
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            for owner, name in self.computing:
                stack.enter_context(mock.patch.object(owner, name, side_effect=Done))
            main(words)

    def clean(self) -> None:
        """Removes what a command made."""
        for path in self.folder.iterdir():
            if path.name not in ("pipeline", "flow", "distill", "tars"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/sprint_jax/" in f.filename] or frames
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"


def answers(ours: Any, pid: int) -> bool:
    """Whether a process answers within LIMIT seconds, of a processor where others leave it little of one."""
    before = processor_seconds(pid)
    for turn in range(20):
        if ours.poll(LIMIT):
            return True
        used = processor_seconds(pid) - before
        # It computes for ever, or it sleeps.
        if used > LIMIT or used < (turn + 1) * LIMIT / 1000:
            return False
    return False


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check_network(pipe: Any) -> None:
    """Traces the network on its own parameters: they must be those of its config."""
    import jax

    from sprint_jax.interop.sana import example_inputs

    inputs = example_inputs(pipe.model)
    jax.eval_shape(lambda params: pipe.model.apply({"params": params}, *inputs), pipe.params)


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    """Another content of a file, for a while."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def commands(workdirs: dict[str, Path], pipeline: Path) -> tuple[list, list]:
    """Each command with words that are right; and what they compute by, as (owner, name)."""
    from sprint_jax import (
        encode,
        evaluate,
        export,
        plan,
        prepare_teacher,
        sample,
        teacher_check,
        train,
    )
    from sprint_jax.data import feed
    from sprint_jax.pipeline import SprintPipeline

    computing = [(feed, "open_data"), (SprintPipeline, "from_pretrained"), (plan, "open_topology")]
    computing += [(export, "export_diffusers"), (teacher_check, "check_teacher")]
    computing += [(prepare_teacher, "prepare"), (encode.encoding, "make_job")]
    teacher, student = str(workdirs["flow"]), str(workdirs["distill"])
    digits = str(ROOT / "configs/digits.py")
    tiny = ["--config.model.num_layers=2", "--config.model.num_attention_heads=1"]
    tiny += ["--config.model.num_cross_attention_heads=1"]
    distil = ["--config", f"{digits}:student,small,sprint", *tiny, "--config.ladd.taps=1,"]
    flow = ["--config", f"{digits}:teacher,small", *tiny]
    images = ["--config", str(ROOT / "configs/encode.py:digits"), "--config.data.images=tars"]
    lines = [
        (train.main, [*flow, "--workdir", "run"]),
        (train.main, [*distil, f"--config.teacher={teacher}", "--workdir", "run"]),
        (sample.main, ["--model", student, "--prompt", "a 3", "--seed", "1", "--out", "out"]),
        (sample.main, ["--model", str(pipeline), "--prompt", "a", "--size", "8x8", "--out", "out"]),
        (evaluate.main, ["--model", student, "--count", "20", "--out", "report.json"]),
        (export.main, ["--workdir", student, "--out", "out", "--format", "diffusers"]),
        (teacher_check.main, ["--model", teacher, "--count", "8", "--out", "report"]),
        (prepare_teacher.main, [*flow, "--model", teacher, "--workdir", "run"]),
        (plan.main, [*flow, "--topology", "v5e:2x2", "--out", "plan.json"]),
        (encode.main, [*images, "--limit", "3", "--out", "latents"]),
    ]
    return lines, computing


def work(folder: str, seed: int, numbers: range, pipe: Any) -> None:
    """Runs cases in this process and sends (number, None) before and (number, (kind, outcome)) after each."""
    # What libraries print on damaged files is no answer of ours.
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    fuzz = Fuzz(Path(folder))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 8 * GROWTH, resource.RLIM_INFINITY))
    for number in numbers:
        pipe.send((number, None))
        pipe.send((number, fuzz.run(seed, number)))


def run(
    cases: int, seconds: float, seed: int, first: int = 0
) -> tuple[collections.Counter, list[str]]:
    """Runs cases until their number or the time is reached.

    Returns:
      Counts of (kind, 'accepted' or 'refused'), and findings as text, with the numbers of their cases.
    """
    counts, findings, number, started = collections.Counter(), [], first, None
    context = multiprocessing.get_context("spawn")
    while number < first + cases and (started is None or time.monotonic() - started < seconds):
        ours, theirs = context.Pipe()
        with tempfile.TemporaryDirectory() as folder:
            arguments = folder, seed, range(number, first + cases), theirs
            process = context.Process(target=work, args=arguments)
            process.start()
            theirs.close()
            outcome = None
            try:
                while number < first + cases:
                    if not answers(ours, process.pid):
                        raise EOFError(f"no answer in {LIMIT} s")
                    number, outcome = ours.recv()
                    started = started or time.monotonic()
                    if outcome is None:
                        continue
                    kind, word = outcome
                    if word in ("accepted", "refused"):
                        counts[kind, word] += 1
                    else:
                        findings.append(f"case {number}, {kind}: {word}")
                    number += 1
                    if time.monotonic() - started > seconds:
                        break
            except EOFError as error:
                process.kill()
                process.join()
                end = str(error) or f"the process ended with {process.exitcode}"
                findings.append(f"case {number}, {KINDS[number % len(KINDS)]}: {end}")
                number += 1
            process.kill()
            process.join()
    return counts, findings
