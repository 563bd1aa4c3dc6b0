"""Misaligned pairs: which captions are wrong, and what the critic makes of those that are not."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import tiny

from sprint_jax import trigflow
from sprint_jax.training import draws, updates


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_captions_are_wrong_unless_empty_or_those_of_the_row_before(dtype):
    random = np.random.default_rng(0)
    cats, dogs, null = (random.standard_normal((4, 8)).astype(np.float32) for _ in range(3))
    captions = {"": (null, 1), "cat": (cats, 3), "dog": (dogs, 3), "cats": (cats, 4)}

    def wrong(*names):
        text = np.stack([captions[name][0] for name in names])
        # Encoded in other batches; what the mask leaves out is anything.
        text = text * (1 + 0.004 * random.standard_normal(text.shape))
        mask = np.array([[k < captions[name][1] for k in range(4)] for name in names], np.int32)
        text = np.where(mask[..., None], text, random.standard_normal(text.shape))
        frozen = {"null_text": null, "null_mask": mask[0] * 0 + np.eye(4, dtype=np.int32)[0]}
        return jax.jit(draws.wrong_captions)(frozen, text.astype(dtype), mask).tolist()

    assert wrong("cat", "dog", "cat", "cats") == [True] * 4
    assert wrong("cat", "cat", "", "dog", "dog", "cat") == [False, False, False, True, False, True]
    assert wrong("", "") == [False] * 2 and wrong("dog") == [False]


def test_pairs_of_an_image_and_its_own_caption_do_not_count_for_the_critic(tmp_path):
    c = tiny("configs/digits.py:student,small", tmp_path, ladd__misaligned=True)
    random = np.random.default_rng(0)
    real, fake = (random.standard_normal((4, 4, 4, 2)).astype(np.float32) for _ in range(2))
    keys = draws.split(draws.DiscriminatorKeys, jax.random.key(0))

    def loss(misaligned, wrong=None):
        changed = c.override({"ladd.misaligned": misaligned})
        discriminate = lambda x, t: x.mean((1, 2, 3))[:, None] + jnp.cos(t)[:, None]  # noqa: E731
        value, _ = updates.critic_loss(changed, discriminate, real, fake, keys, wrong)
        return float(value)

    assert loss(True, jnp.zeros(4, bool)) == pytest.approx(loss(False), rel=1e-6)
    assert loss(True, jnp.ones(4, bool)) == loss(True) != pytest.approx(loss(False), rel=1e-3)


def test_a_clean_image_reaches_the_critic_as_it_is(tmp_path, monkeypatch):
    """The transform to flow matching, by which all networks are called, would scale it by its angle."""
    c = tiny("configs/digits.py:student,small,sprint", tmp_path, ladd__clean=True)
    seen = lambda *_, **__: lambda x, t: trigflow.flow_inputs(x, t)[0].reshape(len(x), -1)  # noqa: E731
    monkeypatch.setattr(draws.functions, "features", seen)
    monkeypatch.setattr(draws, "in_use", lambda _, params: params)
    heads = SimpleNamespace(apply=lambda _, features, __: features)
    nets = SimpleNamespace(teacher=None, model=None, heads=heads)
    x, t = jax.random.normal(jax.random.key(0), (4, 2, 2, 3)), jnp.array([0.1, 0.7, 1.2, 1.5])
    network = {"params": {}}, None, None, {"teacher": None}, None, None, jnp.full(4, 3.0)
    for clean, expected in ((True, x), (False, trigflow.flow_inputs(x, t)[0])):
        critic = draws.critic_of(nets, c.override({"ladd.clean": clean}), *network)
        np.testing.assert_allclose(critic(x, t), expected.reshape(4, -1), rtol=1e-6)


def test_a_student_that_is_not_told_the_scale_is_shown_the_middle_one(tmp_path):
    c = tiny("configs/digits.py:student,small", tmp_path)
    scales = jnp.array([2.5, 3.5, 3.0])
    assert draws.shown_guidance(c, scales).tolist() == [2.5, 3.5, 3.0]
    shown = draws.shown_guidance(c.override({"scm.show_guidance": False}), scales)
    assert shown.tolist() == [3.0, 3.0, 3.0] and c.scm.guidance == (2.5, 3.0, 3.5)


def test_the_empty_prompt_has_its_own_mask_or_the_captions(tmp_path):
    c = tiny("configs/digits.py:student,small", tmp_path)
    frozen = {"null_text": jnp.ones((3, 2)), "null_mask": jnp.array([1, 0, 0])}
    mask = jnp.array([[1, 1, 0], [1, 1, 1]])
    text, own = draws.null_prompt(c, frozen, mask)
    assert text.shape == (1, 3, 2) and own.tolist() == [[1, 0, 0]]
    text, captions = draws.null_prompt(c.override({"data.null_mask": "caption"}), frozen, mask)
    assert text.shape == (1, 3, 2) and captions.tolist() == mask.tolist()
