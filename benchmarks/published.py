"""The published recipe on a small network: its curves, and what of it cannot work at this size.

    python benchmarks/published.py --root runs/published

`configs/sprint.py:600m` with all its values (batch-norm heads on blocks 2, 8, 14, 19, hinge, wrong captions as
fakes, CAME, bfloat16, times, weights, warm-ups, scale of guidance) but the width of the network, the batch and
the number of updates. Its data are digits scenes enlarged to 32x32 and 16x32 pixels, encoded once into latents
[16, 16, 12] and [8, 16, 12] of two buckets; its teacher is `configs/teacher.py:600m` on them. Writes
benchmarks/results/published.jsonl and benchmarks/pictures/published.png, the student's curves. Finished steps
are not repeated.
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from sprint_jax.benchmarking.scripts import config_words, run_command, write_lines
from sprint_jax.checkpoints.workdir import read_metrics

HERE = Path(__file__).parent
WORLDS = {"large": "32x32", "full": "16x32"}  # height and width of the pictures
# 20 blocks, since the published taps are among them.
SIZE = {"num_layers": 20, "num_attention_heads": 2, "num_cross_attention_heads": 2}
SIZE |= {"cross_attention_head_dim": 32, "caption_channels": 64, "in_channels": 12}
SIZE |= {"out_channels": 12, "sample_size": 16}
RUN = {f"model.{key}": value for key, value in SIZE.items()}
RUN |= {"data.batch_size": 16, "data.holdout": 32, "mesh.fsdp": 1, "log.every": 5}
RUN |= {"log.sample_every": 10**6, "log.checkpoint_every": 50}
# A network this narrow and new learns at 50 times the rate of a fine-tuning.
TEACHER = {"steps": 400, "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 50}
TEACHER |= {"optimizer.decay_steps": 400, "ema_decay": 0.99}
STUDENT = {"steps": 300, "log.diagnostics_every": 50}


def make(root: Path) -> None:
    """Encodes, and trains teacher and student."""
    teacher, student = root / "teacher", root / "student"
    for world, size in WORLDS.items():
        pictures = {"data.images": f"tfds:digits/{world}:train", "data.dir": root / "data"}
        words = config_words(pictures | {"data.sizes": size, "data.encoders": "digits"})
        words += ["--config", "configs/encode.py:digits", "--limit", 6000]
        run_command("encode", *words, "--out", root / "latents" / world)
    common = RUN | {"data.latents": ",".join(f"{root}/latents/{world}" for world in WORLDS)}
    for config, changes, workdir in (
        ("configs/teacher.py:600m", TEACHER, teacher),
        ("configs/sprint.py:600m", STUDENT | {"teacher": teacher}, student),
    ):
        run_command(
            "train", "--config", config, *config_words(common | changes), "--workdir", workdir
        )


def summarize(root: Path) -> list[dict]:
    """Of each logged number of the student: the first, the last tenth's mean, the least and the greatest."""
    records = read_metrics(root / "student" / "metrics.jsonl")
    lines = [{"updates": records[-1]["step"], "skipped": records[-1]["health/skipped"]}]
    lines[0]["nonfinite_samples"] = sum(record["health/nonfinite_samples"] for record in records)
    for name in sorted({name for record in records for name in record} - {"step"}):
        values = [record[name] for record in records if record.get(name) is not None]
        if name.startswith(("time/", "health/")) or not values:
            continue
        late = statistics.mean(values[-max(1, len(values) // 10) :])
        span = {"least": min(values), "greatest": max(values)}
        lines.append({"metric": name, "first": values[0], "late": late} | span)
    return lines


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("runs/published"))
    flags = parser.parse_args(argv)
    make(flags.root)
    command = {"command": "python benchmarks/published.py"}
    write_lines(HERE / "results" / "published.jsonl", [command, *summarize(flags.root)])
    shutil.copy(flags.root / "student" / "curves.png", HERE / "pictures" / "published.png")


if __name__ == "__main__":
    main(sys.argv[1:])
