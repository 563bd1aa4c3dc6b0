"""sprint_jax/core/cli.py: flags, one-line errors and exit codes."""

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from helpers.refusals import refuse
from helpers.runs import ROOT

from sprint_jax.core import cli
from sprint_jax.core.errors import UserError


@pytest.fixture
def parser():
    parser = cli.make_parser("sample", "Writes pictures.\n\n  a line of its own")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--prompts", metavar="FILE")
    parser.add_argument("--prompt")
    parser.add_argument("--steps", type=int, choices=(1, 2, 3, 4), default=2)
    return parser


def test_flags_and_help(parser, capsys):
    flags = parser.parse_args(["--model", "runs/a", "--steps=4", "--prompt", "s3://b - --c"])
    assert (flags.model, flags.steps, flags.prompt) == ("runs/a", 4, "s3://b - --c")
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "python -m sprint_jax.sample" in text and "\n  a line of its own\n" in text


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        # Named before the missing --model, because it is the cause.
        (["--modle", "x"], ["--modle", "--model"]),
        (["--model", "x", "--stesp=4"], ["--stesp,", "--steps"]),
        (["--model", "x", "--mod", "y"], ["--mod,"]),
        ([], ["--model"]),
        (["--model", "x", "--steps", "5"], ["--steps", "5", "1, 2, 3, 4"]),
        (["--model", "x", "--steps", "two"], ["--steps", "two"]),
        (["--model"], ["--model"]),
        (["--model", "x", "stray"], ["stray"]),
        (["--model", "az://bucket/run"], ["--model=", "az://bucket/run"]),
        (["--model", "x", "--prompts=ftp://host/p.txt"], ["--prompts=", "ftp://"]),
        (["--model="], ["--model", "empty"]),
    ],
)
def test_wrong_usage_names_the_flag(argv, parts, parser):
    refuse(parser.parse_args, argv, parts=parts)


def test_subcommands_behave_alike():
    parser = cli.make_parser("benchmark", None)
    train = parser.add_subparsers(dest="what", required=True).add_parser("train")
    train.add_argument("--steps", type=int)
    assert parser.parse_args(["train", "--steps", "3"]).steps == 3
    refuse(parser.parse_args, ["train", "--step", "3"], parts=["--step,", "--steps"])
    refuse(parser.parse_args, ["trian"], parts=["'trian'"])


def test_config_and_overrides(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n    return ConfigDict({'a': 1, 'b': {'c': 2}, 'arg': arg})\n"
    )
    parser = cli.make_parser("train", None)
    cli.add_config(parser)
    parser.add_argument("--workdir", required=True)
    argv = ["--config", f"{path}:x", "--config.a=5", "--workdir", "w", "--config.b.c", "-1"]
    flags, config = cli.parse_with_config(parser, argv)
    assert flags.workdir == "w" and config.to_dict() == {"a": 5, "b": {"c": -1}, "arg": "x"}
    refuse(cli.parse_with_config, parser, [*argv, "--config.b.d=5"], parts=["'b.d'", "'b.c'"])
    refuse(cli.parse_with_config, parser, [*argv, "--config.a"], parts=["--config.a "])
    refuse(cli.parse_with_config, parser, [*argv, "--config.a", "--b"], parts=["--config.a "])
    refuse(cli.parse_with_config, parser, ["--workdir", "w"], parts=["--config"])


@pytest.mark.parametrize(
    ("exception", "code", "line"),
    [
        (UserError("no such file: x.py"), 1, "error: no such file: x.py\n"),
        (UserError("two\n  lines", exit_code=2), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left", "runs/a"), 1, "error: runs/a: No space left\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: /x: Permission"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 4, "error: out of memory (RES"),
        (MemoryError(), 4, "error: out of memory (of the host)"),
    ],
)
def test_exit_code_and_line(exception, code, line, monkeypatch, capsys):
    def main(argv):
        assert argv == ["--a", "b"]
        raise exception

    monkeypatch.setattr(sys, "argv", ["command", "--a", "b"])
    with pytest.raises(SystemExit) as caught:
        cli.run_command(main)
    text = capsys.readouterr().err
    assert caught.value.code == code
    assert text.startswith(line) and text.count("\n") == 1


@pytest.mark.parametrize(("lines", "unbuffered"), [(1, "1"), (1, ""), (10_000, "")])
def test_a_reader_that_goes_ends_it_quietly(lines, unbuffered):
    script = "import sys; from sprint_jax.core import cli; sys.stdin.read()\n"
    script += f"cli.run_command(lambda argv: print('x\\n' * {lines}))"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=env, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 141)


BUGS = [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "a bug")]
BUGS += [jax.errors.JaxRuntimeError("INTERNAL: a bug")]


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_keep_their_traceback(bug, monkeypatch):
    def main(argv):
        raise bug

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(type(bug), match="a bug"):
        cli.run_command(main)


@pytest.mark.parametrize(
    "command",
    ["train", "sample", "encode", "evaluate", "export", "prepare_teacher", "teacher_check"],
)
def test_every_command_that_computes_keeps_its_programs(command):
    """`plan` and `benchmark` do not: they measure compiling."""
    assert "cli.use_compilation_cache()" in (ROOT / "sprint_jax" / f"{command}.py").read_text()


def test_compiled_programs_are_kept_unless_the_user_decides(tmp_path, monkeypatch):
    settings = {}
    monkeypatch.setattr(jax, "config", SimpleNamespace(update=settings.__setitem__))
    cli.use_compilation_cache()
    assert not settings  # conftest.py has set the variable
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.use_compilation_cache()
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "sprint_jax")
    assert settings["jax_compilation_cache_max_size"] > 0
    assert (tmp_path / "sprint_jax").stat().st_mode & 0o777 == 0o700
    settings.clear()
    # A folder that is there keeps its mode, and is used unless others may write to it, or own it.
    for mode, used in ((0o755, True), (0o2775, False)):
        (tmp_path / "sprint_jax").chmod(mode)
        cli.use_compilation_cache()
        assert (bool(settings), (tmp_path / "sprint_jax").stat().st_mode & 0o7777) == (used, mode)
        settings.clear()
    (tmp_path / "sprint_jax").chmod(0o700)
    monkeypatch.setattr(cli.os, "getuid", lambda: 2**31)  # the folder is now somebody else's
    cli.use_compilation_cache()
    assert not settings
