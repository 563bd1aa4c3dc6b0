"""Time that the training loop adds to its updates, as JSON lines on the digits config.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/loop.py > benchmarks/results/loop.jsonl

Two questions, for the teacher and for the student that is distilled from it:
  shares    `train` itself runs some dozens of steps in a temporary folder: the fractions of the wall
            clock that its host spent on data, steps, logs and checkpoints, [minimum, median, maximum]
            over the logged lines without the first, whose steps fill the queues. "data_over_step"
            is the wait for data over the time for steps.
  sharding  the same updates as the loop compiles them, on a mesh of one device with shardings for
            the whole state, against plain `jax.jit` of the same functions: milliseconds per step
            (all its updates), and their ratio round by round, arms in turns
            (`benchmarking.timing.paired_rounds`). Rounds with other processes about are dropped, except
            from "ratio_of_all_rounds", which says less.
The data set is built on the first run, in --data.
"""

import contextlib
import functools
import json
import math
import signal
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from sprint_jax import train
from sprint_jax.benchmarking.timing import header, paired_rounds, spread, summarize
from sprint_jax.checkpoints.workdir import read_metrics
from sprint_jax.core import cli
from sprint_jax.core.config import load_config
from sprint_jax.core.errors import UserError
from sprint_jax.data import feed
from sprint_jax.parallel import sharding
from sprint_jax.training import setup, stages
from sprint_jax.training.clock import PARTS

DIGITS = Path(__file__).resolve().parent.parent / "configs" / "digits.py"
STAGES = ("teacher", "student")
SHARDED, PLAIN = "sharded", "plain"


def measure_shares(c, workdir: Path) -> dict:
    """Runs `train` and reads what it logged about itself."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the JSON lines
            train.train(c, workdir)
    finally:
        signal.signal(signal.SIGTERM, handler)  # `train` only remembers that it came
    # The first line fills queues, and the last has pictures and a checkpoint before it.
    records = read_metrics(workdir / "metrics.jsonl")[1:-1]
    line = {name: spread(record[f"time/{name}"] for record in records) for name in PARTS}
    over = [record["time/data_wait"] / record["time/step"] for record in records]
    for name in ("step_seconds", "images_per_second"):
        line[name] = spread(record[f"time/{name}"] for record in records)
    return line | {"data_over_step": spread(over), "lines": len(records)}


def step_arms(c) -> dict:
    """{arm: call} that makes one step, all its updates, of a state of the arm's own, and waits."""
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    nets, data = setup.build_nets(c, mesh), feed.open_data(c, mesh)
    frozen, _ = setup.load_frozen(c, data, mesh)
    batch = sharding.to_devices(mesh, data.batches(0))
    state = setup.init_state(c, nets, batch, frozen, mesh)
    lowered = stages.lower_updates(c, nets, state, batch, frozen)
    functions = stages.stage_of(c).updates(c)
    # Copies, so that neither arm sees the buffers that the other donates, on no mesh.
    plain_state, plain_batch, plain_frozen = jax.tree.map(
        lambda leaf: jnp.asarray(jax.device_get(leaf)), (state, batch, frozen)
    )
    plain = [jax.jit(functools.partial(f, nets, c), donate_argnums=0) for f in functions]
    arms = {
        SHARDED: ([program.compile() for program in lowered], state, batch, frozen),
        PLAIN: (plain, plain_state, plain_batch, plain_frozen),
    }
    return {name: _stepper(*arm) for name, arm in arms.items()}


def _stepper(updates, state, batch, frozen):
    def step():
        nonlocal state
        for update in updates:
            state, metrics = update(state, batch, frozen)
        return jax.block_until_ready((state, metrics))

    return step


def main(argv):
    parser = cli.Parser(prog="python benchmarks/loop.py", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="of each run (default 60)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every arm (default 15)")
    parser.add_argument("--world", default="full", help="full (default), small or large")
    parser.add_argument("--data", default="data", metavar="DIR", help="where the data set lies")
    words, rest = cli.split_overrides(argv)
    flags = parser.parse_args(rest)
    if flags.steps < 30 or flags.rounds < 1:
        raise UserError("--steps must be at least 30, --rounds at least 1", exit_code=2)
    command = " ".join(["python benchmarks/loop.py", *argv])
    print(json.dumps(header(command, devices=jax.device_count())), flush=True)
    for line in report(flags, words):
        print(json.dumps(line), flush=True)


def report(flags, words):
    """Yields the lines after the first."""
    seldom = {"log.every": 5, "log.sample_every": 10**6, "log.checkpoint_every": 10**6}
    seldom |= {"log.diagnostics_every": 10**6, "steps": flags.steps, "data.dir": flags.data}
    options = [f"--config.{key}={value}" for key, value in seldom.items()]
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            if stage == "student":
                options.append(f"--config.teacher={folder}/teacher")
            c = load_config(f"{DIGITS}:{stage},{flags.world}", [*options, *words])
            shares = measure_shares(c, Path(folder) / stage)
            yield {"what": "shares", "stage": stage} | shares
            taken = paired_rounds(step_arms(c), flags.rounds)
            every = summarize(taken, PLAIN, limit=math.inf)["ratio"]
            line = {"what": "sharding", "stage": stage, "batch": c.data.batch_size}
            yield line | summarize(taken, PLAIN) | {"ratio_of_all_rounds": every}


if __name__ == "__main__":
    cli.run_command(main)
