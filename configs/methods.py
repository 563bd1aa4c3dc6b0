"""Students of one digits teacher by every method, and by the arms of the paper's ablations.

    python -m sprint_jax.train --config configs/digits.py:teacher --workdir runs/teacher
    python -m launch.sweep --config configs/methods.py --sweep updates --workdir runs/methods \\
        --config.teacher=runs/teacher
    python benchmarks/methods.py --runs runs/methods --teacher runs/teacher
    python -m sprint_jax.train --config configs/digits.py:teacher,small --workdir runs/small-teacher
    python -m launch.sweep --config configs/methods.py:small --sweep paper --workdir runs/paper \\
        --config.teacher=runs/small-teacher
    python benchmarks/claims.py --runs runs/paper --teacher runs/small-teacher

The same lines go on where they stopped. Word: ``full`` or ``small``, the world of `configs/digits.py`, whose
student of SANA-Sprint's losses these change; the teacher must be of the same world. Three seeds of each method,
five of each arm.
"""

from configs import digits
from sprint_jax.core.config import parse_arg

SEEDS = (0, 1, 2)
OFF = {f"{name}.weight": 0.0 for name in ("ladd", "dmd", "twinflow", "trajectory")}
OFF |= {"images.balance": False, "images.max_time_probability": 0.5}
BALANCED = {"images.balance": True, "images.max_time_probability": 1.0}
DMD = BALANCED | {"dmd.weight": 1.0, "dmd.fake_updates": 2}
TWINFLOW = BALANCED | {"twinflow.weight": 1.0}
PATHS = {"scm.weight": 0.0, "trajectory.weight": 1.0}
# As published: batch norm over images, wrong captions as fakes, hinge, noise (-0.6, 1).
PUBLISHED = {"ladd.weight": 0.5, "ladd.token_norm": False, "ladd.time_mean": -0.6}
CRITIC = {"ladd.loss": "relativistic", "ladd.paired": True, "ladd.misaligned": False}
CRITIC |= {"ladd.kernel": 1, "ladd.r1": 0.1, "ladd.r2": 0.1, "ladd.updates": 2}

METHODS = {
    "scm": OFF,
    "scm_ladd_published": OFF | PUBLISHED,
    "scm_ladd": OFF | {"ladd.weight": 1.0},
    "scm_critic": OFF | BALANCED | CRITIC | {"ladd.weight": 0.5},
    "rcm": OFF | DMD,
    "rcm_rollout": OFF | DMD | {"images.rollout": 2},
    "rcm_critic": OFF | DMD | CRITIC | {"ladd.weight": 0.5, "ladd.features": "fake"},
    "dmd": OFF | DMD | {"scm.weight": 0.0, "images.rollout": 2},
    "twinflow": OFF | TWINFLOW,
    "scm_trajectory_twinflow": OFF | PATHS | TWINFLOW | {"scm.weight": 1.0},
    "trajectory": OFF | PATHS,
    "trajectory_rcm": OFF | PATHS | DMD | {"images.rollout": 2},
    "meanflow": OFF | {"scm.weight": 0.0, "meanflow.weight": 1.0, "model.flow_map": True},
}

# Tables 3 to 6 of SANA-Sprint, each arm a change of "both", which has the published weights and share.
PAPER = {
    "both": {},
    "scm_alone": {"ladd.weight": 0.0},
    "ladd_alone": {"scm.weight": 0.0},
    "untold": {"scm.show_guidance": False},
    "ladd_whole": {"ladd.weight": 1.0},
    "ladd_tenth": {"ladd.weight": 0.1},
    "pure_0": {"images.max_time_probability": 0.0},
    "pure_70": {"images.max_time_probability": 0.7},
}
# Batches of half the size: all forty students in three hours of two cores.
PAPER = {arm: {"ladd.weight": 0.5, "data.batch_size": 32} | keys for arm, keys in PAPER.items()}


def get_config(arg=None):
    (world,) = parse_arg(arg, ("full", "small"))
    return digits.get_config(f"student,{world},sprint")


def sweep_updates():
    """Which method is best at one step, and at two and four, after as many updates?"""
    return _rows(METHODS, SEEDS)


def sweep_paper():
    """Which of the paper's claims about its losses hold here, with errors from seeds?"""
    return _rows(PAPER, range(5))


def _rows(arms, seeds):
    """All arms of one seed, then those of the next: what is finished can be compared seed by seed."""
    return [
        {"name": f"{arm}-{seed}", "seed": seed} | keys
        for seed in seeds
        for arm, keys in arms.items()
    ]
