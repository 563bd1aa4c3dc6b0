"""Depth pruning on digits: six blocks to four, by importance against blocks at random.

    python benchmarks/pruning.py --root runs/pruning

A teacher of six blocks is trained (1,800 steps), pruned to four, and fine-tuned for a tenth of that. The blocks
are those that `prepare_teacher` chooses, and several random choices with the same fine-tuning. Prompt accuracy
is of the digits judge: held-out prompts, 20 steps of DPM-Solver++ with guidance. Writes
benchmarks/results/pruning.jsonl. Finished steps are not repeated.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np

from sprint_jax.benchmarking.scripts import (
    config_words,
    digits_accuracy,
    run_command,
    write_lines,
)
from sprint_jax.checkpoints.weights import find_weights
from sprint_jax.interop.diffusers import save_transformer
from sprint_jax.teacher.pruning import prune_blocks

HERE = Path(__file__).parent
KEEP, RANDOM = 4, 4  # blocks left; random choices
TUNE = {"steps": 180, "optimizer.decay_steps": 180, "optimizer.warmup_steps": 20}
SOLVER = {"steps": 20, "solver": "dpm"}
CONFIG = ["--config", "configs/digits.py:teacher,small"]


def choices(kept: tuple[int, ...], layers: int) -> list[tuple[int, ...]]:
    """Random sets of blocks in their order, other than ``kept``, from a fixed seed."""
    every = [c for c in itertools.combinations(range(layers), KEEP) if c != kept]
    picked = np.random.default_rng(0).permutation(len(every))[:RANDOM]
    return [every[i] for i in picked]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--count", type=int, default=400, help="prompts (default 400)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate of the tuning")
    flags = parser.parse_args(argv)
    root = flags.root
    quiet = {"data.dir": root / "data", "log.sample_every": 10000}
    tune = quiet | TUNE | {"optimizer.learning_rate": flags.rate}
    run_command("train", *CONFIG, *config_words(quiet), "--workdir", root / "dense")
    chosen = root / f"pruned_{flags.rate:g}"
    where = ["--model", root / "dense", "--workdir", chosen, "--prune", KEEP]
    run_command("prepare_teacher", *CONFIG, *config_words(tune), *where)
    record = json.loads((chosen / "prepared" / "prepared.json").read_text())

    whole = digits_accuracy(root / "dense", flags.count, **SOLVER)
    lines = [
        {"command": f"python benchmarks/pruning.py --rate {flags.rate:g} --count {flags.count}"},
        {"what": "six blocks", "accuracy": whole, "importance": record["importance"]},
    ]
    source = find_weights(str(root / "dense"))
    params, _ = source.load(None)
    kept = tuple(record["kept"])
    for blocks in [kept, *choices(kept, len(record["importance"]))]:
        name = "important" if blocks == kept else "random"
        workdir = chosen
        if blocks != kept:
            folder = root / f"blocks_{'_'.join(map(str, blocks))}"
            fields, fewer = prune_blocks(source.fields, params, blocks)
            if not (folder / "config.json").is_file():
                save_transformer(folder, fields, fewer)
            workdir = root / f"{folder.name}_{flags.rate:g}"
            changes = {"init": folder, "model.num_layers": KEEP}
            run_command("train", *CONFIG, *config_words(tune | changes), "--workdir", workdir)
        found = digits_accuracy(workdir, flags.count, **SOLVER)
        line = {"what": name, "blocks": blocks, "accuracy": found, "regained": found / whole}
        lines.append(line)
        print(json.dumps(line), flush=True)
        jax.clear_caches()
    write_lines(HERE / "results" / "pruning.jsonl", lines)


if __name__ == "__main__":
    main(sys.argv[1:])
