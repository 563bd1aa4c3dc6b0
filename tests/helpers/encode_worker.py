"""`sprint_jax.encode` of pictures in memory as a process of its own, or as one after the other of a server.

    python tests/helpers/encode_worker.py --config configs/encode.py:digits --out DIR ...
    python tests/helpers/encode_worker.py serve

A server imports everything once and forks for each line of its input, a JSON list: words of the command,
a number of units that must be done, and seconds after which the process is killed then (null: never).
It answers with the exit status, negative for a signal.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # instead of this script's own folder

from helpers.encoding import Pictures  # noqa: E402

from sprint_jax import encode  # noqa: E402
from sprint_jax.core import cli  # noqa: E402

PATIENCE = 200  # seconds for one encoding


def main(argv: list[str]) -> None:
    encode.open_source = lambda c: Pictures(40, (5, 21))
    encode.main(argv)


def serve() -> None:
    for line in sys.stdin:
        words, units, seconds = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)  # one that hangs ends, and with it the test
            sys.argv[1:] = words
            os.dup2(2, 1)
            cli.run_command(main)
            os._exit(0)
        if seconds is not None:
            done = Path(words[words.index("--out") + 1]) / "units"
            while len(list(done.glob("*.json"))) < units and not _ended(child):
                time.sleep(0.0005)
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def _ended(child: int) -> bool:
    """Whether a child has ended; it is still to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        cli.run_command(main)
