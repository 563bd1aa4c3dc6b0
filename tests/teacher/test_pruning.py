"""Depth pruning: importance, choice, and the network that is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import quick_compilation
from helpers.workdirs import random_params, tiny_config
from PIL import Image

from sprint_jax.models.sana import from_fields
from sprint_jax.teacher import pruning
from sprint_jax.teacher.watch import watched

FIELDS = tiny_config("flow")["model"] | {"num_layers": 4}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def params():
    return random_params(FIELDS, 3)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return {
        "latents": jnp.asarray(random.normal(size=(4, 4, 4, 12)), jnp.float32),
        "text": jnp.asarray(random.normal(size=(4, 5, 64)), jnp.float32),
        "mask": jnp.ones((4, 5), jnp.int32),
    }


def without_effect(params, block: int):
    """Parameters whose block adds nothing: its output projections are zero."""

    def silence(path, leaf):
        name = jax.tree_util.keystr(path)
        outputs = ("to_out_0", "conv_point")
        return leaf.at[block].set(0) if any(each in name for each in outputs) else leaf

    blocks = jax.tree_util.tree_map_with_path(silence, params["transformer_blocks"])
    return params | {"transformer_blocks": blocks}


def test_importance_of_a_block_that_changes_nothing_is_zero(params, batch):
    found = pruning.block_importance(
        from_fields(FIELDS), without_effect(params, 2), [batch], times=2
    )
    assert found.shape == (4,)
    assert abs(found[2]) < 1e-6
    assert min(found[[0, 1, 3]]) > 1e-3


def test_importance_is_one_minus_the_cosine_of_what_a_block_gets_and_gives(params, batch):
    """Against the network's own taps, whose last value of block i is the input of block i + 1."""
    model = from_fields(FIELDS)
    found = pruning.block_importance(model, params, [batch], times=1)
    t = jnp.full(4, 0.5)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), batch["latents"].shape)
    x = 0.5 * batch["latents"] + 0.5 * noise
    taps = model.apply({"params": params}, x, t, batch["text"], batch["mask"], taps=(0, 1, 2, 3))
    taps = [np.asarray(tap, np.float64) for tap in taps]
    for i in (1, 2, 3):
        a, b = taps[i - 1], taps[i]
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        np.testing.assert_allclose(found[i], 1 - cosine.mean(), atol=1e-5)


def test_watching_a_network_does_not_change_it_and_sees_each_module_once(params, batch):
    inputs = batch["latents"], jnp.full(4, 0.3), batch["text"], batch["mask"]
    model = from_fields(FIELDS)
    names = []

    @jax.jit
    def outputs(params):
        def look(module, _, result):
            names.append(module.name)
            return result if module.name is None else None

        return watched(model, params, inputs, look)[-1]

    found = outputs(params)
    assert names.count("attn1") == names.count("attn2") == 4
    assert names.count("to_q") == 8 and names.count("proj_out") == 1
    expected = jax.jit(model.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(jnp.abs(expected).max()))


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
    importance = [0.1, 0.9, 0.2, 0.8, 0.7, 0.05]
    assert pruning.choose_blocks(importance, count, protect) == kept


@pytest.mark.parametrize("count", [0, 7])
def test_a_count_that_cannot_be_kept_is_refused(count):
    with pytest.raises(ValueError, match="between 1 and 6"):
        pruning.choose_blocks([1.0] * 6, count)


def test_a_pruned_network_is_the_one_built_by_hand_of_the_kept_blocks(params, batch):
    fields, pruned = pruning.prune_blocks(FIELDS, params, (0, 3))
    assert fields == FIELDS | {"num_layers": 2}
    by_hand = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[3]]), params["transformer_blocks"])
    inputs = batch["latents"], jnp.full(4, 0.3), batch["text"], batch["mask"]

    def run(fields, params):
        return np.asarray(jax.jit(from_fields(fields).apply)({"params": params}, *inputs))

    np.testing.assert_array_equal(
        run(fields, pruned), run(fields, params | {"transformer_blocks": by_hand})
    )
    # Blocks that add nothing can be left out without a difference.
    silent = without_effect(without_effect(params, 1), 2)
    expected = run(FIELDS, silent)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        run(*pruning.prune_blocks(FIELDS, silent, (0, 3))), expected, atol=1e-5 * scale
    )


@pytest.mark.parametrize("keep", [(), (1, 0), (0, 0), (0, 4), (-1, 2)])
def test_wrong_blocks_are_refused(params, keep):
    with pytest.raises(ValueError, match="increasing block indices below 4"):
        pruning.prune_blocks(FIELDS, params, keep)


def test_picture_of_importance_has_a_bar_for_each_block(tmp_path):
    path = tmp_path / "importance.png"
    pruning.draw_importance(path, [0.5, 0.1, 0.2], (0, 2))
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours = {tuple(pixel) for pixel in pixels.tolist()}
    assert {(31, 119, 180), (211, 211, 211)} <= colours  # kept and left out
