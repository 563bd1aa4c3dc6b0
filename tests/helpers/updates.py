"""Looks at single updates of a built run: what moved, by how much, and where it lies."""

import jax
import optax
from helpers.runs import copy

from sprint_jax.core.fingerprint import leaf_table
from sprint_jax.parallel import sharding

STUDENT, HEADS = ("params", "ema", "opt_state"), ("disc", "disc_opt_state")
FAKE = ("fake", "fake_opt_state")


def one_device():
    return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


def check_placement(built):
    """State lies as its shardings say, before and after an update, and a batch over data and fsdp."""
    state, _ = built.updates[0](copy(built.state), built.batch(0), built.frozen)
    wanted = sharding.state_shardings(built.mesh, state)
    for tree in (built.state, state):
        assert jax.tree.map(lambda leaf: leaf.sharding, tree) == wanted
    latents = built.batch(0)["latents"]
    rows = latents.shape[0] // sharding.batch_ways(built.mesh)
    assert {shard.data.shape[0] for shard in latents.addressable_shards} == {rows}


def changed(before, after) -> set[str]:
    """Names of the leaves that are not bit for bit the same."""
    table, other = leaf_table(before), leaf_table(after)
    return {name for name in table if table[name] != other[name]}


def after(built, which, state=None, batch=None, frozen=None, times=1):
    """The state (on the host) after an update; ``which`` counts `compile_updates`' list."""
    state = copy(built.state if state is None else state)
    for number in range(times):
        given = built.batch(number) if batch is None else batch
        state, metrics = built.updates[which](state, given, frozen or built.frozen)
    return jax.device_get(state), jax.device_get(metrics)


def moments(opt_state):
    """AdamW's first moments: after one update a tenth of the clipped gradients."""
    return optax.tree.get(opt_state, "mu")


def placed(built, state):
    """A state of the host on the devices of a run."""
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, built.state))


def relative_change(mine, other) -> float:
    """How far the trees lie apart, relative to the first."""
    return float(optax.tree.norm(optax.tree.sub(mine, other)) / optax.tree.norm(mine))
