"""Depth pruning: importance, choice, and the pruned network."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.workdirs import random_params, tiny_config

from sprint_jax.models.sana import from_fields
from sprint_jax.teacher import pruning

FIELDS = tiny_config("flow")["model"] | {"num_layers": 4}


@pytest.fixture(scope="module")
def params():
    return random_params(FIELDS, 3)


def without_effect(params, block: int):
    """Parameters whose block adds nothing: its output projections are zero."""

    def silence(path, leaf):
        name = jax.tree_util.keystr(path)
        outputs = ("to_out_0", "conv_point")
        return leaf.at[block].set(0) if any(each in name for each in outputs) else leaf

    blocks = jax.tree_util.tree_map_with_path(silence, params["transformer_blocks"])
    return params | {"transformer_blocks": blocks}


def test_importance_is_one_minus_the_cosine_of_a_blocks_input_and_output(params, batches):
    """Against the network's own taps, whose last value of block i is the input of block i + 1; block 2 of
    four changes nothing."""
    model, silent, expected = from_fields(FIELDS), without_effect(params, 2), []
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(0), number)
        x = 0.5 * batch["latents"] + 0.5 * jax.random.normal(key, batch["latents"].shape)
        inputs = x, jnp.full(4, 0.5), batch["text"], batch["mask"]
        taps = model.apply({"params": silent}, *inputs, taps=(0, 1, 2, 3))
        taps = [np.asarray(tap, np.float64) for tap in taps]
        sizes = [np.linalg.norm(tap, axis=-1) for tap in taps]
        dots = [(taps[i - 1] * taps[i]).sum(-1) / (sizes[i - 1] * sizes[i]) for i in (1, 2, 3)]
        expected.append([1 - cosine.mean() for cosine in dots])
    found = pruning.block_importance(model, silent, batches, times=1)
    np.testing.assert_allclose(found[1:], np.mean(expected, 0), atol=1e-5)
    assert found.shape == (4,) and abs(found[2]) < 1e-6 and min(found[[0, 1, 3]]) > 1e-3


@pytest.mark.parametrize(
    ("count", "protect", "kept"),
    [
        (2, 0, (1, 3)),
        (3, 0, (1, 3, 4)),
        (3, 1, (0, 1, 5)),
        (4, 1, (0, 1, 3, 5)),
        (1, 1, (1,)),  # no place for both ends
        (6, 1, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_the_most_important_blocks_are_kept_in_their_order(count, protect, kept):
    assert pruning.choose_blocks([0.1, 0.9, 0.2, 0.8, 0.7, 0.05], count, protect) == kept


def test_a_pruned_network_has_the_kept_blocks(params):
    fields, pruned = pruning.prune_blocks(FIELDS, params, (0, 3))
    assert fields == FIELDS | {"num_layers": 2}
    by_hand = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[3]]), params["transformer_blocks"])
    chex.assert_trees_all_equal(pruned, params | {"transformer_blocks": by_hand})
