"""A StructSA layer with kernels set by hand reads motion; without structure kernels or order it cannot."""

import sys

import av
import jax
import motion
import numpy as np
import pytest
from PIL import Image

from structvit_jax.utils.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def _optimised():
    """Compile with optimisations, which pay off for hundreds of clips."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_motion_is_read_from_structure_and_order_alone():
    read = dict(motion.trials(*motion.digits(64)))
    assert read["eight kernels, a line for each direction"] >= 0.98
    assert read["reversed in time, the opposite direction"] >= 0.98
    assert read["eight equal kernels (ConvSA)"] == pytest.approx(1 / 8, abs=0.05)
    assert 0.3 < read["frames shuffled"] < 0.6


def test_attention_sums_to_one_over_kernels_and_positions():
    (clip, _), _ = motion.digits(2)
    queries = motion.corners(clip)
    attention = np.asarray(motion.attend(clip, motion.line_kernels(), queries))
    assert attention.shape == (24, 8, *clip.shape) and set(np.asarray(queries) // clip[0].size) <= {3, 4}
    np.testing.assert_allclose(attention.sum(axis=(1, 2, 3, 4)), 1, rtol=1e-5)
    fractions = motion.kernel_fractions(clip[None], motion.line_kernels())[0]
    np.testing.assert_allclose(fractions, attention.sum(axis=(2, 3, 4)).mean(axis=0), rtol=1e-4)


def test_kernels_are_lines():
    kernels = motion.line_kernels()[..., 0, 0, :]
    assert kernels.shape == (3, 3, 3, 8) and (kernels.sum(axis=(1, 2)) == 1).all()
    assert (kernels[1, 1, 1] == 1).all()  # through the centre
    opposite = kernels[::-1, ..., :4]  # reversed in time
    np.testing.assert_array_equal(kernels[..., 4:], opposite)
    np.testing.assert_array_equal(kernels[2, :, :, 2], [[0, 1, 0], [0, 0, 0], [0, 0, 0]])  # 90 degrees is up


def save_clip(path, move, frames=30):
    """Save a video of noise in which a textured square moves by (down, right) pixels per frame."""
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
def test_motion_in_a_video_is_read(tmp_path, move, name):
    reading = motion.read_video(save_clip(tmp_path / "clip.mp4", move))
    assert reading.clip.shape == (8, 64, 85)
    assert f"moves at {name};" in reading.title and reading.fractions.max() > 0.5


def test_the_command_draws_a_digit(tmp_path, monkeypatch, capsys):
    path = tmp_path / "motion.png"
    monkeypatch.setattr(sys, "argv", ["motion.py", str(path), "--clips=8"])
    motion.main()
    assert "1.000 eight kernels" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.size == (1210, 572)
        assert len(picture.convert("P").getcolors()) > 50


def test_unreadable_files_are_refused(tmp_path):
    short = save_clip(tmp_path / "short.mp4", (0, 0), frames=5)
    with pytest.raises(UserError, match=r"short\.mp4: it has 5 frames; at least 8 are needed"):
        motion.read_video(short)
    with pytest.raises(UserError, match=r"no\\nfile.mp4: No such file"):
        motion.read_video("no\nfile.mp4")
