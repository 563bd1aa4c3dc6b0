"""The command lines: flags, one-line errors and exit codes.

A command is a module with ``main(argv)`` that ends with::

    if __name__ == "__main__":
        cli.run_command(main)

Exit codes: 0 success, 1 failure, 2 wrong usage, 4 not enough memory, 130 interrupted; training has 3, 75 and
143 as well (docs/clusters.md), and teacher_check 4 for a teacher that is not ready.
"""

import argparse
import difflib
import errno
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .config import Config, load_config
from .errors import OUT_OF_MEMORY, UserError, is_out_of_memory
from .schema import LOCAL, PLACE, check
from .storage import is_provider_error

# Flags with these for a value name a place.
_PLACES = ("DIR", "FILE", "FILE.json", "FOLDER", "PATH")

# Conditions of the machine, not of the code: they need no traceback.
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_MACHINE_ERRORS += (errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


def run_command(main: Callable[[list[str]], None], out_of_memory: int = OUT_OF_MEMORY) -> None:
    """Runs ``main(sys.argv[1:])`` and turns a user's mistake into one line and an exit code.

    `UserError` prints ``error: <line>`` on stderr and exits with its code, as do a full disk and a
    forbidden path (1), and memory that is not enough; Ctrl-C exits with 130, a reader of the output that has
    gone, such as ``| head``, with 141, as by SIGPIPE. Every other exception is a bug: its traceback stays.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error), error.exit_code, error.abrupt)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            sys.exit(141)
        if error.errno not in _MACHINE_ERRORS and not is_provider_error(error.__cause__ or error):
            raise
        path = f"{error.filename}: " if error.filename else ""
        _fail(f"{path}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if is_out_of_memory(error):
            what = f"out of memory ({str(error)[:200] or 'of the host'})"
            advice = "fewer or smaller pictures at once, `sample --low_memory` or `--int8`, or more devices"
            _fail(f"{what}: {advice}", out_of_memory)
        if not is_provider_error(error):
            raise
        _fail(f"the bucket's provider says: {type(error).__name__}: {error}", 1)


def _output_is_closed() -> bool:
    """Whether nobody reads stdout any more, which then goes nowhere: Python flushes it once more at its end."""
    output, closed = sys.stdout.fileno(), select.poll()
    closed.register(output, 0)
    if not any(event & select.POLLERR for _, event in closed.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _fail(message: str, exit_code: int, abrupt: bool = False) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    if abrupt:
        sys.stdout.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are `UserError` (exit code 2) and name the nearest flag.

    Flags cannot be abbreviated; places (``metavar="DIR"`` and the like) are no URLs. Subparsers made by
    ``add_subparsers`` behave alike.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        # argparse would complain of a missing flag first, though the cause is a misspelt one.
        if self._subparsers is None:
            for token in sys.argv[1:] if args is None else args:
                if token == "--":
                    break
                if token.startswith("--") and " " not in token:
                    self._require_known(token.partition("=")[0])
        namespace, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.metavar in _PLACES:
                flag, value = action.option_strings[0], getattr(namespace, action.dest, None)
                if value == "":
                    self.error(f"{flag} is empty")
                kind = LOCAL if action.type is Path else PLACE
                check({flag: str(value or "")}, {flag: kind}, "", exit_code=2)
        return namespace, rest

    def _require_known(self, flag: str) -> None:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if flag not in known:
            nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)[0]
            self.error(f"unknown flag {flag}, nearest is {nearest}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists all flags)", exit_code=2)


def make_parser(command: str, description: str | None) -> Parser:
    """Returns a parser for ``python -m sprint_jax.<command>``; ``--help`` shows the description as it is."""
    return Parser(prog=f"python -m sprint_jax.{command}", description=description)


def use_compilation_cache() -> None:
    """Keeps compiled programs in ``~/.cache/sprint_jax`` (or below ``XDG_CACHE_HOME``), up to 20 GB.

    The folder is made for its owner alone, since what lies in it is run; one that others own or write to is
    left alone, which a line says. Its entries are named by a hash of program, devices, options and versions,
    and hold no pickles. Where ``JAX_COMPILATION_CACHE_DIR`` is set, even to nothing, JAX's own settings hold.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax  # here, so that --help and wrong flags do not wait for it

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sprint_jax"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        print(f"compiled programs are not kept: others may write to {folder}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # With a limit JAX locks the folder, which commands that run side by side need.
    jax.config.update("jax_compilation_cache_max_size", 20 * 10**9)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def parse_size(text: str | None, flag: str = "--size") -> tuple[int | None, int | None]:
    """Returns (height, width) of a ``--size HxW``, Nones where it is not given; else a UserError."""
    if text is None:
        return None, None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserError(f"{flag} {text} must be HEIGHTxWIDTH, such as 16x16", exit_code=2)
    return int(match[1]), int(match[2])


def parse_counts(text: str) -> tuple[int, ...]:
    """Returns the whole numbers of ``1,2,4``, each at least 1, as a flag's ``type``."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' must be numbers of at least 1, such as 1,2,4")
    return tuple(map(int, text.split(",")))


def add_config(parser: Parser, required: bool = True) -> None:
    """Adds the flag ``--config FILE.py[:WORDS]``, for `parse_with_config`."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE.py[:WORDS]",
        help="a config file and the words its get_config takes, such as configs/digits.py:teacher;"
        " --config.key=value sets one key of it (nested: --config.a.b=value)",
    )


def parse_with_config(parser: Parser, argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Parses ``argv`` and loads the config that ``--config`` and ``--config.key=value`` describe.

    Args:
      parser: one that `add_config` was called on.
      argv: the command's arguments; ``--config.key=value`` may also be written in two words.

    Raises:
      UserError: with exit code 2 for a wrong flag, file, key or value.
    """
    overrides, rest = split_overrides(argv)
    flags = parser.parse_args(rest)
    return flags, load_config(flags.config, overrides)


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits ``argv`` into ``--config.key=value`` words (two-word forms joined) and all others."""
    overrides, rest, words = [], [], iter(argv)
    for word in words:
        if word.startswith("--config.") and "=" not in word:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE", exit_code=2)
            word = f"{word}={value}"
        (overrides if word.startswith("--config.") else rest).append(word)
    return overrides, rest
