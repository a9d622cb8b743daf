"""A StructSA layer whose kernels are set by hand reads motion, and nothing else about it could."""

import io

import av
import jax
import jax.numpy as jnp
import motion
import numpy as np
import pytest
from PIL import Image

from structvit_jax.utils.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def _optimised():
    """A program for thousands of clips is worth its compilation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def found():
    return dict(motion.trials(*motion.digits(160)))


def test_directions_are_read_without_training():
    clips, labels = motion.digits(600)
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
    clips, _ = motion.digits(2)
    picture = Image.open(io.BytesIO(motion.draw(clips[1], 1)))
    assert picture.size == (1210, 572)
    assert len(picture.convert("P").getcolors()) > 50


def save_clip(path, move, frames=30):
    """A video of noise in which a textured square moves (down, right) pixels from frame to frame."""
    rng = np.random.default_rng(0)
    ground, square = rng.integers(90, 110, (96, 128), np.uint8), rng.integers(0, 256, (4, 4), np.uint8)
    square = np.kron(square, np.ones((4, 4), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale:v": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for t in range(frames):
            frame = ground.copy()
            top, left = (at + round(by * (t - frames // 2)) for at, by in zip((40, 56), move, strict=True))
            frame[top : top + 16, left : left + 16] = square
            picture = av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, axis=-1), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize(("move", "name"), [((0, 1.5), "0 degrees"), ((1.5, 0), "270 degrees")])
def test_the_motion_in_a_file_is_read(tmp_path, move, name):
    moving = motion.read_clip(save_clip(tmp_path / "clip.mp4", move))
    assert moving.clip.shape == (8, 32, 32, 3) and moving.step in (1, 2, 4)
    assert f"moves at {name};" in moving.title and moving.shares.max() > 0.5
    assert Image.open(io.BytesIO(motion.draw_moving(moving))).size == (1210, 572)


def test_a_file_that_is_no_clip_is_refused(tmp_path):
    short = save_clip(tmp_path / "short.mp4", (0, 0), frames=5)
    with pytest.raises(UserError, match=r"short\.mp4: it has 5 frames, and 8 are needed"):
        motion.read_clip(short)
    with pytest.raises(UserError, match=r"no\\nfile.mp4: No such file"):
        motion.read_clip("no\nfile.mp4")
