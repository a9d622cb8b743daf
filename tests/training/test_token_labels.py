"""Token labelling: the dense head's score, the losses, MixToken, and targets that follow the crop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structvit_jax import create_model
from structvit_jax.data import augment
from structvit_jax.training import losses, mixing

SMALL = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "head_width": 8}


def test_scores():
    """The score adds half of the highest dense logit; all else equals the model without a dense head."""
    plain, dense = (
        create_model("uniformer_s", num_classes=3, token_labels=on, **SMALL) for on in (False, True)
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 96, 3)), jnp.float32)
    logits, positions = dense.scores(x)
    np.testing.assert_allclose(logits, plain(x), rtol=1e-6)
    assert positions.shape == (2, 2, 3, 3)
    tokens = dense.norm(dense.features(x)[-1]).reshape(2, 6, 16)
    expected = tokens @ dense.aux_head.kernel[...] + dense.aux_head.bias[...]
    np.testing.assert_allclose(dense(x), logits + 0.5 * expected.max(axis=1), rtol=1e-5, atol=1e-5)
    assert plain.scores(x)[1] is None


def test_loss():
    """Both cross-entropies are means over unmasked examples, the dense one also over positions."""
    rng = np.random.default_rng(1)
    logits, dense = rng.standard_normal((3, 4)), rng.standard_normal((3, 2, 2, 4))
    whole, targets = rng.dirichlet(np.ones(4), 3), rng.dirichlet(np.ones(4), (3, 2, 2))
    mask = np.array([True, False, True])

    def entropy(logits, targets):
        return -(targets * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1)

    expected = (entropy(logits, whole) + 0.5 * entropy(dense, targets).mean((1, 2)))[mask].mean()
    found = losses.token_labelling(*map(jnp.asarray, (logits, dense, whole, targets, mask)), 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_mix_token(seed):
    """A box of the fine grid comes from the reversed batch; targets are mixed on the coarse grid."""
    x = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], (4, 16, 24, 1))
    mix = mixing.MixToken(jax.random.key(seed), 1.0)
    mixed = np.asarray(mix(x))[..., 0]
    swapped = mixed[0] == 3
    assert (mixed == np.where(swapped, np.arange(4)[::-1, None, None], np.arange(4)[:, None, None])).all()
    rows, columns = np.flatnonzero(swapped.any(1)), np.flatnonzero(swapped.any(0))
    coarse = np.zeros((2, 3), bool)
    if len(rows):
        assert swapped[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a box
        coarse[rows[0] // 8 : (rows[-1] + 1) // 8, columns[0] // 8 : (columns[-1] + 1) // 8] = True
    whole = jax.nn.one_hot(jnp.arange(4), 4)
    dense = jnp.broadcast_to(whole[:, None, None], (4, 2, 3, 4))
    whole_mixed, dense_mixed = map(np.asarray, mix.targets(whole, dense))
    assert (dense_mixed.argmax(-1)[0] == np.where(coarse, 3, 0)).all()
    np.testing.assert_allclose(
        whole_mixed[0], (1 - coarse.mean()) * whole[0] + coarse.mean() * whole[3], atol=1e-6
    )
    np.testing.assert_allclose(whole_mixed, dense_mixed.mean((1, 2)), atol=1e-6)  # each image has one class


def test_mix_token_draws_boxes_of_all_sizes():
    x = jnp.arange(2.0)[:, None, None, None] * jnp.ones((2, 8, 8, 1))
    mixed = [mixing.MixToken(jax.random.key(seed), 1.0)(x) for seed in range(60)]
    fractions = {float(np.mean(np.asarray(one)[0] == 1)) for one in mixed}
    assert min(fractions) < 0.1 and max(fractions) > 0.4 and len(fractions) > 10


def targets(pose, grid=(2, 2), side=4):
    """Return the targets from a label map in which each cell has a class of its own."""
    classes = np.arange(side * side).reshape(1, side, side, 1)
    batch = {"map_classes": classes, "map_scores": np.ones((1, side, side, 1), np.float16)}
    batch["pose"] = pose[None, :2].astype(np.float32)
    return np.asarray(mixing.dense_targets(jax.tree.map(jnp.asarray, batch), grid, side * side))[0]


def test_targets_follow_the_crop():
    """A position whose sampling points are the centres of cells has the classes of these cells."""
    whole = targets(np.eye(3))
    np.testing.assert_allclose(whole.sum(-1), 1, rtol=1e-5)
    cells = np.arange(16).reshape(4, 4)
    for row in range(2):
        for column in range(2):
            expected = np.zeros(16)
            expected[cells[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel()] = 0.25
            np.testing.assert_allclose(whole[row, column], expected, atol=1e-6)
    corner = np.array([[0.5, 0, 0.5], [0, 0.5, 0], [0, 0, 1]])  # the upper right quarter
    np.testing.assert_allclose(targets(corner, (1, 1))[0, 0, [2, 3, 6, 7]], 0.25, atol=0.11)
    mirrored = targets(augment.RandomCrop((1, 1), (0, 0, 1, 1), mirrored=True).affine())
    np.testing.assert_allclose(mirrored, whole[:, ::-1], atol=1e-6)
    away = np.array([[1, 0, 1.0], [0, 1, 0], [0, 0, 1]])  # the crop lies outside the image
    np.testing.assert_allclose(targets(away), 1 / 16, atol=1e-6)


def test_probability_missing_in_a_map_is_spread_evenly():
    batch = {"map_classes": [[[[0, 1]]]], "map_scores": [[[[0.5, 0.3]]]], "pose": [np.eye(3)[:2]]}
    batch = {key: jnp.asarray(value, jnp.float32) for key, value in batch.items()}
    batch["map_classes"] = batch["map_classes"].astype(jnp.uint16)
    found = mixing.dense_targets(batch, (1, 1), 4)[0, 0, 0]
    np.testing.assert_allclose(found, [0.55, 0.35, 0.05, 0.05], atol=1e-3)
