"""Trains until a phase begins, and stands still there: ``blocked.py PHASE MARK PATIENCE WORDS OF train``.

The file MARK is made then. A signal gets PATIENCE seconds, in place of minutes, for the end of a step.
"""

import ctypes
import sys
from pathlib import Path


def block() -> None:
    """Waits for a mutex that this thread holds: as in a driver, no signal ends the wait."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def main() -> None:
    from sprint_jax import train
    from sprint_jax.core import cli
    from sprint_jax.parallel import interrupt

    phase, mark, patience = sys.argv[1:4]
    sys.argv[1:4] = []
    interrupt.PATIENCE = float(patience)
    original = interrupt.Stop.phase, interrupt.Stop.after

    def stand_still(doing):
        if doing == phase:
            Path(mark).touch()
            block()

    def at_phase(self, doing):
        original[0](self, doing)
        stand_still(doing)

    def after(self, step):
        stand_still(f"step {step}")
        return original[1](self, step)

    interrupt.Stop.phase, interrupt.Stop.after = at_phase, after
    cli.run_command(train.main)


if __name__ == "__main__":
    main()
