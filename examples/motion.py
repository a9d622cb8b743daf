"""Read the direction of motion with one StructSA layer, without training it.

    python examples/motion.py motion.png
    python examples/motion.py motion.png --clip=CLIP.mp4

The correlation of a moving patch with the clip is high at the positions that the patch passes. These
positions form a line through space and time; the slope of the line is the velocity of the patch. The layer
has eight kernels of 3x3x3, each a line in one direction. The kernel whose line matches the motion gets the
most attention. Plain self-attention (no kernels) and a convolutional projection (one kernel) cannot compare
directions.

The first command prints the fraction of moving digits whose direction is read correctly, in four trials:
clips as recorded, clips reversed in time, clips with shuffled frames, and eight equal kernels. The digits are
real scans; their motion is synthetic.

The second command (--clip) reads and draws a video instead. It has a ninth kernel for patches that do not
move. The kernels read motion of about one pixel per frame, so the video is reduced to a short side of 64
pixels. Eight frames are used, which are 1, 2, 4 or 8 recorded frames apart; the spacing with the clearest
result is selected.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from structvit_jax.data.digits import MovingDigits
from structvit_jax.data.media import open_media
from structvit_jax.ops import struct_attention_maps
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError, printable

DIRECTIONS = MovingDigits.class_names  # in steps of 45 degrees, counterclockwise from the right
PATCH = 5  # pixels
NUM_CORNERS = 24  # corners per clip at which motion is read
SHARPNESS = 20.0  # logits per unit of cosine similarity between patches
FRAMES = 8  # frames of a video that are read
SHORT_SIDE = 64  # of a video, in pixels
FRAME_STEPS = (1, 2, 4, 8)  # distances to try between the frames that are read, in recorded frames


def line_kernels() -> np.ndarray:
    """Return kernels [3, 3, 3, 1, 1, 8], each a line of ones through space and time.

    A point that moves in direction d passes through the centre of the window in the middle frame. Kernel d is
    one at the positions of this point in the three frames, and zero elsewhere.
    """
    kernels = np.zeros((3, 3, 3, 1, 1, len(DIRECTIONS)), np.float32)
    for d, angle in enumerate(np.deg2rad(45 * np.arange(len(DIRECTIONS)))):
        down, right = round(-np.sin(angle)), round(np.cos(angle))
        for t in (-1, 0, 1):
            kernels[1 + t, 1 + t * down, 1 + t * right, 0, 0, d] = 1
    return kernels


def patches(clip: jax.Array) -> jax.Array:
    """Return the 5 x 5 pixels around each position of a clip [time, height, width], minus their mean.

    Returns:
      [time, height, width, 5, 5].
    """
    edge, (height, width) = PATCH // 2, clip.shape[1:]
    padded = jnp.pad(clip, [(0, 0), (edge, edge), (edge, edge)], mode="edge")
    pixels = [padded[:, y : y + height, x : x + width] for y in range(PATCH) for x in range(PATCH)]
    stacked = jnp.stack(pixels, axis=-1)
    return (stacked - stacked.mean(axis=-1, keepdims=True)).reshape(*clip.shape, PATCH, PATCH)


@jax.jit
def features(clip: jax.Array) -> jax.Array:
    """Return the patches of a clip [time, height, width] as unit vectors, so that dot products are cosines.

    Returns:
      [1, time, height, width, 1, 25]: a batch of one, with one head.
    """
    flat = patches(clip).reshape(*clip.shape, -1)
    unit = flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-6)
    return unit[None, ..., None, :]


@functools.partial(jax.jit, static_argnames="moving")
def corners(clip: jax.Array, *, moving: bool = False) -> jax.Array:
    """Return flat positions [24] of corners in the two middle frames (Shi and Tomasi, 1994).

    Motion along an edge is invisible. Therefore patches are ranked by their variation along the direction in
    which they vary least. With `moving`, this is multiplied by the change of the centre pixel over time.
    """
    first = (len(clip) - 1) // 2
    middle = patches(clip[first : first + 2])
    dy, dx = jnp.diff(middle, axis=-2)[..., :-1], jnp.diff(middle, axis=-1)[..., :-1, :]
    yy, yx, xx = (jnp.sum(a * b, axis=(-2, -1)) for a, b in ((dy, dy), (dy, dx), (dx, dx)))
    strength = (yy + xx) / 2 - jnp.sqrt(((yy - xx) / 2) ** 2 + yx**2)  # smaller eigenvalue
    if moving:
        strength *= jnp.abs(jnp.diff(clip, axis=0)).mean(axis=0)
    return jax.lax.top_k(strength.ravel(), NUM_CORNERS)[1] + first * clip[0].size


@jax.jit
def attend(clip: jax.Array, kernels: jax.Array, queries: jax.Array) -> jax.Array:
    """Return the attention [Q, D, time, height, width] of one StructSA layer with one head.

    Args:
      clip: grey, [time, height, width]; its features are the queries, keys and values.
      kernels: key kernels [3, 3, 3, 1, 1, D]; value kernels are ones (element aggregation, equation 4).
      queries: flat positions [Q].
    """
    x = features(clip)
    scaled = SHARPNESS * x.shape[-1] ** 0.5 * x  # attention divides by the root of the channels
    ones = jnp.ones((1, 1, 1, 1, 1, kernels.shape[-1]))
    return struct_attention_maps(scaled, x, x, kernels, ones, queries=queries).attention[0, :, 0]


def kernel_fractions(clips: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Return the fraction of the attention that each kernel gets, averaged over corners: [batch, D].

    Args:
      clips: grey, [batch, time, height, width].
      kernels: as for `attend`.
    """
    attention = (attend(clip, kernels, corners(clip)) for clip in clips)
    return np.stack([each.sum(axis=(2, 3, 4)).mean(axis=0) for each in attention])


def mean_direction(fractions: np.ndarray) -> np.ndarray:
    """Return the mean of the kernels' directions, weighted by their attention [batch, 8], as indices [batch].

    Directions are averaged as unit vectors, because slow diagonal motion falls between pixels: the kernels of
    both neighbouring directions respond to it.
    """
    angles = 2 * np.pi * np.arange(len(DIRECTIONS)) / len(DIRECTIONS)
    return (fractions @ np.cos(angles[:, None] - angles)).argmax(axis=1)


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first test clips [count, time, height, width], grey from 0 to 1, and directions [count]."""
    source = MovingDigits("test", count, seed=0)
    clips, labels = zip(*map(source.open, range(count)), strict=True)
    pixels = np.stack([clip.frames(range(clip.count))[..., 0] for clip in clips])
    return pixels.astype(np.float32) / 255, np.array(labels)


def trials(clips: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yield the description of each trial, and the fraction of clips whose direction was read correctly."""
    lines, rng = line_kernels(), np.random.default_rng(0)
    equal = np.broadcast_to(lines.mean(axis=-1, keepdims=True), lines.shape)
    shuffled = np.stack([clip[rng.permutation(len(clip))] for clip in clips])
    for name, shown, kernels, expected in (
        ("eight kernels, a line for each direction", clips, lines, labels),
        ("reversed in time, the opposite direction", clips[:, ::-1], lines, (labels + 4) % 8),
        ("frames shuffled", shuffled, lines, labels),
        ("eight equal kernels (ConvSA)", clips, equal, labels),
    ):
        yield name, float((mean_direction(kernel_fractions(shown, kernels)) == expected).mean())


class Reading(NamedTuple):
    """A clip, and the attention of the query at one of its positions."""

    title: str
    clip: np.ndarray  # grey, [time, height, width]
    query: int  # flat position
    kernels: np.ndarray  # as for `attend`
    fractions: np.ndarray  # [D]: the fraction of the attention that each kernel gets


def read_digit(clip: np.ndarray, label: int) -> Reading:
    """Read a clip of a digit. The marked query is the first corner; the fractions are means over corners."""
    fractions = kernel_fractions(clip[None], line_kernels())[0]
    return Reading(
        f"the digit moves at {DIRECTIONS[label]}", clip, int(corners(clip)[0]), line_kernels(), fractions
    )


def read_video(path: str) -> Reading:
    """Read the motion at the corner of a video where it is clearest.

    Raises:
      UserError: the file cannot be read or has fewer than eight frames.
    """
    still = np.zeros((3, 3, 3, 1, 1, 1), np.float32)
    still[:, 1, 1] = 1
    kernels, readings = np.concatenate([line_kernels(), still], axis=-1), []
    try:
        with contextlib.closing(open_media(path)) as media:
            if media.count < FRAMES:
                raise DecodeError(f"it has {media.count} frames; at least {FRAMES} are needed")
            for step in (step for step in FRAME_STEPS if (FRAMES - 1) * step < media.count):
                start = (media.count - 1 - (FRAMES - 1) * step) // 2
                frames = media.frames([start + step * i for i in range(FRAMES)], SHORT_SIDE)
                clip = frames.mean(axis=-1).astype(np.float32) / 255
                queries = corners(clip, moving=True)
                fractions = np.asarray(attend(clip, kernels, queries).sum(axis=(2, 3, 4)))
                best = int(fractions[:, :-1].max(axis=1).argmax())
                motion = (*(f"moves at {name}" for name in DIRECTIONS), "is still")[fractions[best].argmax()]
                title = f"the marked patch {motion}; frames are {step} recorded frames apart"
                readings.append(Reading(title, clip, int(queries[best]), kernels, fractions[best]))
    except DecodeError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    return max(readings, key=lambda reading: reading.fractions[:-1].max())


def draw(reading: Reading) -> Figure:
    """Draw the clip, the correlations of the query, and the attention of each kernel, summed over frames."""
    clip = reading.clip
    frame, row, column = np.unravel_index(reading.query, clip.shape)
    x = features(clip)[0, ..., 0, :]
    correlation = np.asarray(x @ x[frame, row, column])
    attention = np.asarray(attend(clip, reading.kernels, np.array([reading.query]))[0].sum(axis=1))
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    figure.suptitle(f"One StructSA layer, nothing trained: {reading.title}")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1.15))
    shots, correlations = upper.subplots(2, len(clip))
    for t in range(len(clip)):
        shots[t].imshow(clip[t], cmap="gray", vmin=0, vmax=1)
        shots[t].set_title(f"frame {t}", fontsize=8)
        correlations[t].imshow(correlation[t], cmap="RdBu_r", vmin=-1, vmax=1)
    for axes in (shots[frame], correlations[frame]):
        axes.plot(column, row, "s", color="#d95f02", markersize=9, markerfacecolor="none")
    maps = lower.subplots(1, len(attention))
    for d, (axes, name) in enumerate(zip(maps, (*DIRECTIONS, "still"), strict=False)):
        axes.imshow(attention[d], cmap="viridis", vmin=0, vmax=attention.max())
        weight = "bold" if d == reading.fractions.argmax() else None
        axes.set_title(f"{name}\n{reading.fractions[d]:.0%}", fontsize=8, weight=weight)
    labels = ("clip, query marked", "its correlations", "attention of each\nkernel, all frames")
    for axes, label in zip((shots[0], correlations[0], maps[0]), labels, strict=True):
        axes.set_ylabel(label, fontsize=8)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Read motion with one StructSA layer, without training.")
    parser.add_argument("out", nargs="?", metavar="OUT.png", help="file for a drawing of one clip")
    parser.add_argument("--clip", metavar="FILE", help="read and draw this video or folder of frames")
    parser.add_argument("--clips", type=int, default=200, help="number of clips of digits to read")
    options = parser.parse_args()
    if options.clip:
        reading = read_video(options.clip)
        print(reading.title)
    else:
        clips, labels = digits(max(options.clips, 2))
        print(f"{len(clips)} clips, {len(DIRECTIONS)} directions, no training. Fraction read correctly:")
        for name, fraction in trials(clips, labels):
            print(f"  {fraction:.3f} {name}")
        reading = read_digit(clips[1], labels[1])
    if options.out:
        draw(reading).savefig(options.out, dpi=110)
        print(options.out)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
