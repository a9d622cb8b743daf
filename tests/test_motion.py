"""A StructSA layer whose kernels are set by hand reads motion, and nothing else about it could."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from structvit_jax import motion


@pytest.fixture(scope="module", autouse=True)
def _optimised():
    """A program for thousands of clips is worth its compilation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def found():
    return dict(motion.trials(*motion.digits(320)))


def test_directions_are_read_without_training():
    clips, labels = motion.digits(2000)
    assert (motion.direction(motion.read(clips, motion.line_kernels())) == labels).mean() >= 0.98


def test_reversed_time_turns_the_answer_around(found):
    assert found["eight kernels, a line for each direction"] >= 0.98
    assert found["reversed in time, the opposite direction"] >= 0.98


def test_not_without_patterns_nor_without_order(found):
    assert found["eight equal kernels (ConvSA)"] == pytest.approx(1 / 8, abs=0.05)
    assert 0.3 < found["frames shuffled"] < 0.6


def test_the_fast_form_gives_the_attention_of_the_maps():
    """And lines that are the same for all patterns give each the same share."""
    clips, _ = motion.digits(2)
    grey = jnp.asarray(clips[..., 0], jnp.float32) / 255
    for kernels in (motion.line_kernels(), motion.equal_kernels()):
        shares = motion.read(clips, kernels)
        for clip, queries, share in zip(grey, motion.corners(grey), shares, strict=True):
            attention = motion.maps(clip[None], kernels, queries).attention[0, :, 0]
            np.testing.assert_allclose(attention.sum(axis=(1, 2, 3, 4)), 1, rtol=1e-5)
            np.testing.assert_allclose(share, attention.sum(axis=(2, 3, 4)).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(shares, 1 / 8, rtol=1e-4)


def test_kernels_are_lines():
    kernels = motion.line_kernels()[..., 0, 0, :]
    assert kernels.shape == (3, 3, 3, 8) and (kernels.sum(axis=(1, 2)) == 1).all()
    assert (kernels[1, 1, 1] == 1).all()  # through the centre
    np.testing.assert_array_equal(
        kernels[..., 4:], kernels[::-1, ..., :4]
    )  # reversed time, opposite direction
    np.testing.assert_array_equal(kernels[2, :, :, 2], [[0, 1, 0], [0, 0, 0], [0, 0, 0]])  # 90 degrees is up


def test_the_picture():
    clips, labels = motion.digits(2)
    picture = Image.open(io.BytesIO(motion.draw(clips[1], int(labels[1]))))
    assert picture.size == (1210, 572)
    assert len(picture.convert("P").getcolors()) > 50
