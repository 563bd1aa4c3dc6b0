"""A run of several processes without a network to train: steps of one collective, until told to end.

    python pod_worker.py [--steps N] [--mark DIR] [--fail INDEX:KIND] [--hang INDEX] --distributed ...
    python pod_worker.py --phases N [--stuck INDEX] [--workdir DIR] ...

Process INDEX fails or hangs in step 5; each makes a file of its number in DIR after step 3. Or the start has N
phases of a second, after which process INDEX is stuck for ever, where no signal reaches Python; then the files
are made there. With DIR the processes first prove that they see the same one.
"""

import contextlib
import time
from pathlib import Path

import jax
import numpy as np
from blocked import block
from jax.sharding import NamedSharding, PartitionSpec

from sprint_jax.core import cli
from sprint_jax.core.errors import UserError
from sprint_jax.parallel import distributed
from sprint_jax.parallel.interrupt import Stop, end_stopped
from sprint_jax.training.checks import hold_workdir


def fail(kind: str) -> None:
    if kind == "usage":
        raise UserError("a wrong key", exit_code=2)
    raise ZeroDivisionError("a bug")


def work(flags, peers) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    split = NamedSharding(mesh, PartitionSpec("all"))
    mean = jax.jit(lambda x: x.mean(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    held = hold_workdir(Path(flags.workdir), peers) if flags.workdir else contextlib.nullcontext()
    with Stop(peers) as stop, held:
        for phase in range(flags.phases):
            stop.phase(f"phase {phase}")
            time.sleep(1.0)
        if flags.stuck is not None and flags.mark:
            (Path(flags.mark) / str(jax.process_index())).touch()
        if flags.stuck == jax.process_index():
            block()
        peers.meet("started")
        stop.begin()
        run_steps(flags, stop, mean, split)


def run_steps(flags, stop, mean, split) -> None:
    step = 0
    while step < flags.steps:
        step += 1
        rows = np.full(jax.local_device_count(), jax.process_index(), np.float32)
        value = float(mean(jax.make_array_from_process_local_data(split, rows)))
        assert value == (jax.process_count() - 1) / 2
        if step == 3 and flags.mark:
            (Path(flags.mark) / str(jax.process_index())).touch()
        if step == 5 and flags.fail and int(flags.fail[0]) == jax.process_index():
            fail(flags.fail[2:])
        if step == 5 and flags.hang == jax.process_index():
            time.sleep(600)
        if number := stop.after(step):
            end_stopped(number, step)
        time.sleep(0.05)


def main(argv: list[str]) -> None:
    parser = cli.make_parser("pod_worker", __doc__)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--mark")
    parser.add_argument("--fail", default="")
    parser.add_argument("--hang", type=int)
    parser.add_argument("--phases", type=int, default=0)
    parser.add_argument("--stuck", type=int)
    parser.add_argument("--workdir")
    distributed.add_flags(parser)
    flags = parser.parse_args(argv)
    with distributed.joined(flags) as peers:
        work(flags, peers)


if __name__ == "__main__":
    cli.run_command(main)
