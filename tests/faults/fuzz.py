"""Fuzzing: damaged files and command lines, each of which must be taken, or refused in one line.

    PYTHONPATH=.:tests python tests/faults/fuzz.py --cases 2000
    PYTHONPATH=.:tests python tests/faults/fuzz.py --seconds 3600 --seed 1
    PYTHONPATH=.:tests python tests/faults/fuzz.py --seed 1 --first 77 --cases 1

Prints counts and findings, with the number by which a case runs again; exit code 1 if there is any.
"""

import argparse
import sys

from helpers.fuzz import KINDS, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    flags = parser.parse_args()
    counts, findings = run(flags.cases, flags.seconds, flags.seed, flags.first)
    for kind in KINDS:
        print(f"{kind:8} accepted {counts[kind, 'accepted']:6} refused {counts[kind, 'refused']:6}")
    print(*findings, f"{len(findings)} findings", sep="\n")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
