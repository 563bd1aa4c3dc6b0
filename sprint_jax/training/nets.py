"""The networks and optimizers of a run, from its config and its teacher."""

import jax
import optax

from ..checkpoints.weights import Weights, find_weights
from ..checkpoints.workdir import read_workdir_config
from ..core.config import Config
from ..core.errors import UserError
from ..losses.adversarial import PAIRS
from ..models.discriminator import DiscriminatorHeads
from ..models.sana import SanaTransformer, from_fields
from ..parallel.sharding import Partition
from .optim import make_optimizer
from .stages import stage_of
from .state import Nets

# Fields of a network in which a student may differ from its teacher: it computes the same at step 0.
OWN = ("guidance_embeds", "flow_map", "logvar", "dtype", "remat", "scan", "partition")


def build_nets(c: Config, mesh: jax.sharding.Mesh, teacher_fields: dict | None = None) -> Nets:
    """Networks and optimizers of a run.

    Args:
      teacher_fields: SanaTransformer's fields of the teacher; by default those of ``c.teacher``.

    Raises:
      UserError: for an unknown stage, a distillation without a teacher or of another network than it, or
        taps out of range.
    """
    optimizer = _make_optimizer(c, c.optimizer, updates=1)
    partition = Partition(mesh) if mesh.size > 1 else None
    if not stage_of(c).distills:
        model = from_fields(c.model, guidance_embeds=False, partition=partition)
        _check_trunk(c, model, teacher_fields)
        return Nets(model, None, None, optimizer, None)
    planned = teacher_fields is not None
    if not planned:
        found = find_teacher(c)
        check_world(c, found, f"--config.teacher={c.teacher}")
        teacher_fields = found.fields
    # Frozen weights, but this run's own precision and memory choices.
    runtime = {key: c.model[key] for key in ("dtype", "remat", "scan")}
    teacher = from_fields(dict(teacher_fields) | runtime, partition=partition)
    model = from_fields(c.model, guidance_embeds=True, logvar=True, partition=partition)
    check_same(c, model, teacher, f"--config.teacher={c.teacher}")
    _check_trunk(c, model, teacher_fields if planned else None)
    if c.scm.jvp_dtype not in ("", "float32", "bfloat16"):
        raise UserError(
            f"config.scm.jvp_dtype '{c.scm.jvp_dtype}' is not one of float32, bfloat16, or empty",
            exit_code=2,
        )
    heads = disc_optimizer = fake = fake_optimizer = None
    if c.ladd.weight:
        _check_critic(c, teacher.num_layers)
        heads = DiscriminatorHeads(model.dtype, c.ladd.token_norm, c.ladd.kernel)
        disc_optimizer = _make_optimizer(c, c.ladd.optimizer, c.ladd.updates)
    if c.dmd.weight:
        # The images of each scale of guidance have a score of their own; without being told, the fake score
        # would learn that of their mixture, and DMD would drive the scales apart.
        fake = teacher.clone(guidance_embeds=True)
        fake_optimizer = _make_optimizer(c, c.dmd.optimizer, c.dmd.fake_updates)
    return Nets(model, teacher, heads, optimizer, disc_optimizer, fake_optimizer, fake)


def _check_trunk(c: Config, model: SanaTransformer, planned: dict | None) -> None:
    """Refuses a frozen trunk that is another network than the config's; it is not looked for in a plan."""
    if not c.trunk or planned is not None:
        return
    trunk = find_weights(c.trunk)
    check_world(c, trunk, f"--config.trunk={c.trunk}")
    if trunk.is_teacher == stage_of(c).distills:
        wanted = "a student, which embeds guidance" if trunk.is_teacher else "a teacher"
        raise UserError(f"--config.trunk={c.trunk}: stage '{c.stage}' takes {wanted}", 2)
    branch = {"control_blocks": model.control_blocks, "control_wiring": model.control_wiring}
    fields = dict(trunk.fields) | branch | {"dtype": "float32", "remat": "none"}
    check_same(c, model, from_fields(fields), f"--config.trunk={c.trunk}", OWN[2:])


def check_world(c: Config, weights: Weights, origin: str) -> None:
    """Refuses weights that were trained in another world of digits, whose pictures they never saw."""
    if weights.kind != "workdir" or c.data.source != "digits":
        return
    theirs = read_workdir_config(weights.path).data
    if theirs.source == "digits" and theirs.world != c.data.world:
        raise UserError(f"config.data.world={c.data.world}, but {theirs.world} in {origin}", 2)


def check_same(
    c: Config,
    model: SanaTransformer,
    teacher: SanaTransformer,
    origin: str,
    own: tuple[str, ...] = OWN,
) -> None:
    """Refuses a network that would be another than the one it starts from, though the weights may fit both."""
    for name in c.model:
        if name in own or (name == "sample_size" and not model.interpolation_scale):
            continue  # the size alone decides nothing without positions
        mine, theirs = getattr(model, name), getattr(teacher, name)
        if mine != theirs:
            made = {"num_layers": f" --prune {mine}", "timestep_scale": ""}
            made |= {"qk_norm": ""} if mine else {}
            how = f"set --config.model.{name}={0 if theirs is None else theirs}"
            if name in made:
                how += (
                    f", or make such a teacher: python -m sprint_jax.prepare_teacher --config CONFIG "
                    f"--config.model.{name}={mine} --model {origin.partition('=')[2]} --workdir DIR"
                    f"{made[name]}"
                )
            raise UserError(f"config.model.{name}={mine}, but {theirs} in {origin}: {how}", 2)


def _check_critic(c: Config, num_layers: int) -> None:
    """Refuses blocks that the teacher does not have, and words that the critic does not know."""
    taps = tuple(c.ladd.taps)
    if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < num_layers:
        raise UserError(
            f"config.ladd.taps={taps} must be increasing block indices below {num_layers}", 2
        )
    known = {"loss": tuple(PAIRS), "features": ("teacher", "fake", "copy")}
    for key, words in known.items():
        if c.ladd[key] not in words:
            raise UserError(
                f"config.ladd.{key} '{c.ladd[key]}' is not one of {', '.join(words)}", 2
            )
    if c.ladd.features == "fake" and not c.dmd.weight:
        raise UserError("config.ladd.features=fake needs the fake score: set config.dmd.weight", 2)


def find_teacher(c: Config) -> Weights:
    """The frozen teacher of a distillation, ``c.teacher``, not read yet.

    Raises:
      UserError: there is none, or it is a student.
    """
    if not c.teacher:
        raise UserError(
            "stage 'distill' needs --config.teacher=DIR, the workdir of a teacher, a diffusers folder of "
            "its pipeline or transformer, or a hub id",
            exit_code=2,
        )
    teacher = find_weights(c.teacher)
    if not teacher.is_teacher:
        raise UserError(
            f"--config.teacher={c.teacher} is no teacher: it is a student, which embeds guidance"
        )
    return teacher


def _make_optimizer(c: Config, section: Config, updates: int) -> optax.GradientTransformation:
    """The optimizer of a section, of a network that learns so many times a step."""
    fields = {key: section[key] for key in section if key != "name"}
    if section.decay_steps < 0:
        fields["decay_steps"] = c.steps * updates
    return make_optimizer(c.optimizer.name, **fields)
