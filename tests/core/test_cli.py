"""sprint_jax/core/cli.py: flags, one-line errors and exit codes, in this process and in a real one."""

import errno
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sprint_jax.core import cli
from sprint_jax.core.errors import UserError


def exit_of(main, argv, monkeypatch, capsys) -> tuple[int, str]:
    """Runs ``main`` as a command; (exit code, stderr)."""
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.run_command(main)
    return caught.value.code, capsys.readouterr().err


def make_parser() -> cli.Parser:
    parser = cli.make_parser("sample", "Writes pictures.\n\n  a line of its own")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts")
    parser.add_argument("--prompt")
    parser.add_argument("--steps", type=int, choices=(1, 2, 3, 4), default=2)
    return parser


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flags():
    flags = make_parser().parse_args(["--model", "runs/a", "--steps=4", "--prompt", "a - b --c"])
    assert (flags.model, flags.steps, flags.prompt) == ("runs/a", 4, "a - b --c")


def test_help_shows_the_description_as_written(capsys):
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "python -m sprint_jax.sample" in text and "\n  a line of its own\n" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        # Named before the missing --model, because it is the cause.
        (["--modle", "x"], ["--modle", "nearest is --model"]),
        (["--model", "x", "--stesp=4"], ["--stesp,", "nearest is --steps"]),
        (["--model", "x", "--mod", "y"], ["unknown flag --mod,"]),
        ([], ["--model", "required"]),
        (["--model", "x", "--steps", "5"], ["--steps", "5", "1, 2, 3, 4"]),
        (["--model", "x", "--steps", "two"], ["--steps", "two"]),
        (["--model"], ["--model", "expected one argument"]),
        (["--model", "x", "stray"], ["stray"]),
    ],
)
def test_wrong_usage_names_the_flag(argv, words):
    message = refusal(make_parser().parse_args, argv)
    assert all(word in message for word in words), message


def test_subcommands_behave_alike():
    parser = cli.make_parser("benchmark", None)
    train = parser.add_subparsers(dest="what", required=True).add_parser("train")
    train.add_argument("--steps", type=int)
    assert parser.parse_args(["train", "--steps", "3"]).steps == 3
    assert "nearest is --steps" in refusal(parser.parse_args, ["train", "--step", "3"])
    assert "'trian'" in refusal(parser.parse_args, ["trian"])


def test_split_overrides():
    argv = ["--config", "a.py", "--config.a=1", "--workdir", "w", "--config.b.c", "-1"]
    overrides, rest = cli.split_overrides(argv)
    assert overrides == ["--config.a=1", "--config.b.c=-1"]
    assert rest == ["--config", "a.py", "--workdir", "w"]
    assert "--config.a needs a value" in refusal(cli.split_overrides, ["--config.a"])
    assert "--config.a needs a value" in refusal(cli.split_overrides, ["--config.a", "--b"])


def test_parse_with_config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n    return ConfigDict({'steps': 1, 'arg': arg or ''})\n"
    )
    parser = cli.make_parser("train", None)
    cli.add_config(parser)
    parser.add_argument("--workdir", required=True)
    argv = ["--config", f"{path}:x", "--workdir", "w", "--config.steps", "5"]
    flags, config = cli.parse_with_config(parser, argv)
    assert flags.workdir == "w" and config.to_dict() == {"steps": 5, "arg": "x"}
    assert "nearest is 'steps'" in refusal(
        cli.parse_with_config, parser, [*argv, "--config.stpes=5"]
    )
    assert "--config" in refusal(cli.parse_with_config, parser, ["--workdir", "w"])


def test_run_command_passes_arguments_on(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["command", "--a", "b"])
    cli.run_command(seen.extend)
    assert seen == ["--a", "b"]


@pytest.mark.parametrize(
    ("exception", "code", "line"),
    [
        (UserError("no such file: x.py"), 1, "error: no such file: x.py\n"),
        (UserError("two\n  lines", exit_code=2), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left", "runs/a"), 1, "error: runs/a: No space left\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: /x: Permission"),
    ],
)
def test_exit_code_and_line(exception, code, line, monkeypatch, capsys):
    def main(argv):
        raise exception

    got, text = exit_of(main, [], monkeypatch, capsys)
    assert got == code
    assert text.startswith(line) and text.count("\n") == 1


@pytest.mark.parametrize("bug", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "a bug")])
def test_bugs_keep_their_traceback(bug, monkeypatch):
    def main(argv):
        raise bug

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(type(bug), match="a bug"):
        cli.run_command(main)


def test_as_a_process():
    script = """
from sprint_jax import cli
def main(argv):
    cli.make_parser("sample", None).parse_args(argv)
cli.run_command(main)
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, "--hlep"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown flag --hlep, nearest is --help")
    assert result.stderr.count("\n") == 1


def test_compiled_programs_are_kept_unless_the_user_decides(tmp_path, monkeypatch):
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        cli.use_compilation_cache()  # conftest.py has set the variable
        assert {name: getattr(jax.config, name) for name in names} == before
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cli.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "sprint_jax")
        assert jax.config.jax_compilation_cache_max_size > 0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
