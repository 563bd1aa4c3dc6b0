"""`sprint_jax.encode` of pictures in memory, as a process of its own.

python tests/helpers/encode_worker.py --config configs/encode.py:digits --out DIR ...
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # instead of this script's own folder

from helpers.encoding import Pictures

from sprint_jax import encode
from sprint_jax.core import cli


def main(argv: list[str]) -> None:
    encode.open_source = lambda c: Pictures(40, (5, 21))
    encode.main(argv)


if __name__ == "__main__":
    cli.run_command(main)
