"""The idea of StructSA in one picture: a layer that reads the direction of motion with no trained weight.

    python examples/motion.py [OUT.png] [--clips=200]
    python examples/motion.py OUT.png --clip=FILE

In the correlations of one position's patch with all positions of a clip, what moves leaves a line through
space and time, and the line's slope is the motion. Eight kernels of 3x3x3, a line for each direction, are
enough to read it: the attention that a pattern gets in all says how much moves that way. With no kernels, as
in plain self-attention, or with one, as in a convolutional projection, there is nothing to compare.

Prints how often the direction of a moving digit is read right: as it is, reversed in time (the answer turns
around), with the frames shuffled, and with eight equal kernels; and draws a clip. The digits are real scans,
their motion is synthetic.

--clip draws a video, or a folder of frames, instead: eight frames from its middle, scaled to a short side of
64 pixels, and a square around the position whose motion is read most clearly. The kernels read motion of
about a pixel per frame, so frames are 1, 2, 4 or 8 recorded frames apart, whichever is clearest; a ninth
kernel reads what is still.
"""

from __future__ import annotations

import contextlib
import io
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import click
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import ArrayLike

from structvit_jax import cli
from structvit_jax.cli import options
from structvit_jax.data.digits import MovingDigits
from structvit_jax.data.media import open_media
from structvit_jax.ops import StructAttentionMaps, convolve_patterns, struct_attention_maps
from structvit_jax.ops.attention import attention
from structvit_jax.runtime.devices import select_devices
from structvit_jax.runtime.storage import write
from structvit_jax.utils.errors import DecodeError, UserError, printable
from structvit_jax.utils.paths import parse_path, write_errors_as_user_error

DIRECTIONS = MovingDigits.class_names  # in steps of 45 degrees, counterclockwise from the right
_PATCH = 5  # pixels
_QUERIES = 24  # positions of a clip
_SHARPNESS = 20.0  # of the softmax, per unit of the cosine between two patches
_AT_ONCE = 4  # clips: their keys stay in a CPU's cache
_DRAWN = 1  # the clip that is drawn

_SHORT_SIDE, _SQUARE = 64, 32  # pixels, of a clip's frames and of what is drawn of them
_FRAMES = 8
_STEPS = (1, 2, 4, 8)  # recorded frames from one frame of a clip to the next


def line_kernels() -> np.ndarray:
    """[3, 3, 3, 1, 1, 8]: kernel d has three taps, where what moves in direction d is a frame before the
    window's centre, at it, and a frame after it."""
    kernels = np.zeros((3, 3, 3, 1, 1, len(DIRECTIONS)), np.float32)
    for d in range(len(DIRECTIONS)):
        angle = np.deg2rad(45 * d)
        down, right = round(-np.sin(angle)), round(np.cos(angle))
        for t in (-1, 0, 1):
            kernels[1 + t, 1 + t * down, 1 + t * right, 0, 0, d] = 1
    return kernels


def still_kernel() -> np.ndarray:
    """Return [3, 3, 3, 1, 1, 1]: a line along time."""
    kernel = np.zeros((3, 3, 3, 1, 1, 1), np.float32)
    kernel[:, 1, 1] = 1
    return kernel


def equal_kernels() -> np.ndarray:
    """As many, each the mean of all lines: D copies of one pattern, which is ConvSA."""
    lines = line_kernels()
    return np.broadcast_to(lines.mean(axis=-1, keepdims=True), lines.shape)


def patches(clips: jax.Array) -> jax.Array:
    """The pixels around each position, less their mean: [batch, time, height, width] -> [..., 25]."""
    edge = _PATCH // 2
    padded = jnp.pad(clips, [(0, 0), (0, 0), (edge, edge), (edge, edge)], mode="edge")
    height, width = clips.shape[2:]
    seen = [padded[:, :, y : y + height, x : x + width] for y in range(_PATCH) for x in range(_PATCH)]
    stacked = jnp.stack(seen, axis=-1)
    return stacked - stacked.mean(axis=-1, keepdims=True)


def normalised(features: jax.Array) -> jax.Array:
    """Scaled to length one, along the last axis; where there is next to nothing, to less."""
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-6)


def corners(clips: jax.Array, *, moving: bool = False) -> jax.Array:
    """Return the positions [batch, 24] in the two middle frames whose patches vary most in the direction in
    which they vary least (Shi and Tomasi, 1994): how an edge moves along itself cannot be seen. With
    `moving`, this counts in proportion to how much their pixels change over time."""
    first, positions = (clips.shape[1] - 1) // 2, clips[0, 0].size
    seen = patches(clips[:, first : first + 2])
    seen = seen.reshape(*seen.shape[:-1], _PATCH, _PATCH)
    down = (seen[..., 1:, :] - seen[..., :-1, :])[..., :-1]
    right = (seen[..., 1:] - seen[..., :-1])[..., :-1, :]
    yy, yx, xx = (jnp.sum(a * b, axis=(-2, -1)) for a, b in ((down, down), (down, right), (right, right)))
    smaller = (yy + xx) / 2 - jnp.sqrt(((yy - xx) / 2) ** 2 + yx**2)  # eigenvalue of [[yy, yx], [yx, xx]]
    if moving:
        smaller *= jnp.abs(jnp.diff(clips, axis=1)).mean(axis=1, keepdims=True)
    return jax.lax.top_k(smaller.reshape(len(clips), -1), _QUERIES)[1] + first * positions


def maps(clip: jax.Array, kernels: ArrayLike, queries: ArrayLike) -> StructAttentionMaps:
    """One StructSA layer with one head: queries, keys and values are the patches, scaled to length one.

    Args:
      clip: [1, time, height, width], grey.
      kernels: [3, 3, 3, 1, 1, D], of the keys; values have none (element aggregation, equation 4).
      queries: [Q], flat positions.

    Returns:
      See `struct_attention_maps`.
    """
    keys = normalised(patches(clip))[..., None, :]
    kernels = jnp.asarray(kernels)
    ones = jnp.ones((1, 1, 1, 1, 1, kernels.shape[-1]))
    return struct_attention_maps(_scale(keys) * keys, keys, keys, kernels, ones, queries=queries)


def _scale(features):
    return _SHARPNESS * features.shape[-1] ** 0.5  # by whose root attention divides


@jax.jit
def shares(clips: jax.Array, kernels: jax.Array) -> jax.Array:
    """Return the attention [batch, D] that each pattern gets at all positions together, from 0 to 1: the mean
    over queries at corners."""
    return query_shares(clips, kernels, corners(clips)).mean(axis=1)


@jax.jit
def query_shares(clips: jax.Array, kernels: jax.Array, queries: jax.Array) -> jax.Array:
    """Return the same for each of the queries at flat positions [batch, Q]: [batch, Q, D]. Computed by the
    fast form of the layer, with values that are the patterns' numbers."""
    features = normalised(patches(clips))[..., None, :]
    rows = features.reshape(len(clips), -1, *features.shape[-2:])
    query = jnp.take_along_axis(rows, queries[..., None, None], axis=1)
    keys = convolve_patterns(features, kernels)
    planes = keys.shape[1]
    keys = keys.reshape(len(clips), -1, *features.shape[-2:])
    numbers = jnp.repeat(jnp.eye(planes, features.shape[-1]), rows.shape[1], axis=0)[:, None]
    values = jnp.broadcast_to(numbers, keys.shape)
    return attention(_scale(features) * query, keys, values)[..., 0, :planes]


def read(clips: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """`shares` of clips [batch, time, height, width, 3], grey in uint8, some at once."""
    cut = range(0, len(clips), _AT_ONCE)
    grey = (jnp.asarray(clips[i : i + _AT_ONCE, ..., 0], jnp.float32) / 255 for i in cut)
    return np.concatenate([shares(part, kernels) for part in grey])


def direction(shares: np.ndarray) -> np.ndarray:
    """The direction [batch] that shares [batch, D] point to: the patterns' unit vectors, weighted.
    A slow diagonal is between two pixels in every frame, where both lines beside its own get their part."""
    angles = 2 * np.pi * np.arange(len(DIRECTIONS)) / len(DIRECTIONS)
    return (shares @ np.cos(angles[:, None] - angles)).argmax(axis=1)


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first test clips of the built-in data and their directions."""
    source = MovingDigits("test", count, seed=0)
    decoded, labels = zip(*map(source.open, range(count)), strict=True)
    return np.stack([clip.frames(range(clip.count)) for clip in decoded]), np.array(labels)


def trials(clips: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, float]]:
    """(what was tried, how often the direction that was read is the label), one by one."""
    lines, half = line_kernels(), len(DIRECTIONS) // 2
    rng = np.random.default_rng(0)
    shuffled = np.stack([clip[rng.permutation(len(clip))] for clip in clips])

    def right(clips, kernels, labels):
        return float((direction(read(clips, kernels)) == labels).mean())

    yield "eight kernels, a line for each direction", right(clips, lines, labels)
    yield (
        "reversed in time, the opposite direction",
        right(clips[:, ::-1], lines, (labels + half) % (2 * half)),
    )
    yield "frames shuffled", right(shuffled, lines, labels)
    yield "eight equal kernels (ConvSA)", right(clips, equal_kernels(), labels)


class Moving(NamedTuple):
    """A part of a recorded clip, and the position in it whose motion is read most clearly."""

    clip: np.ndarray  # uint8 [8, height, width, 3], grey
    query: int  # flat position
    shares: np.ndarray  # [9]: its attention to the lines of each direction and of what is still
    step: int  # recorded frames from one frame to the next

    @property
    def title(self) -> str:
        found = int(self.shares.argmax())
        answer = f"moves at {DIRECTIONS[found]}" if found < len(DIRECTIONS) else "is still"
        return f"The marked patch {answer}; frames are {self.step} recorded frames apart"


def read_clip(path: str) -> Moving:
    """Return what moves most clearly in a video; see the module's docstring.

    Raises:
      UserError: the file cannot be read, or has fewer than eight frames.
    """
    try:
        with contextlib.closing(open_media(path)) as media:
            steps = [step for step in _STEPS if (_FRAMES - 1) * step < media.count]
            if not steps:
                raise DecodeError(f"it has {media.count} frames, and {_FRAMES} are needed")
            starts = [(media.count - 1 - (_FRAMES - 1) * step) // 2 for step in steps]
            picked = [start + step * np.arange(_FRAMES) for start, step in zip(starts, steps, strict=True)]
            distinct = np.unique(np.concatenate(picked))
            frames = media.frames(distinct.tolist(), _SHORT_SIDE)
    except DecodeError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    grey = frames.mean(axis=-1).round().astype(np.uint8)
    found = [
        _clearest(grey[np.searchsorted(distinct, numbers)], step)
        for numbers, step in zip(picked, steps, strict=True)
    ]
    return max(found, key=lambda moving: moving.shares[: len(DIRECTIONS)].max())


def _clearest(frames: np.ndarray, step: int) -> Moving:
    """Of grey frames [8, height, width], the position whose attention is most on one direction."""
    clip = jnp.asarray(frames[None], jnp.float32) / 255
    kernels = np.concatenate([line_kernels(), still_kernel()], axis=-1)
    queries = corners(clip, moving=True)
    found = np.asarray(query_shares(clip, kernels, queries))[0]
    best = int(found[:, : len(DIRECTIONS)].max(axis=1).argmax())
    time, *place = map(int, np.unravel_index(int(queries[0, best]), frames.shape))
    sides = [min(_SQUARE, side) for side in frames.shape[1:]]
    top, left = (
        min(max(at - side // 2, 0), whole - side)
        for at, side, whole in zip(place, sides, frames.shape[1:], strict=True)
    )
    seen = frames[:, top : top + sides[0], left : left + sides[1]]
    query = np.ravel_multi_index((time, place[0] - top, place[1] - left), seen.shape)
    return Moving(np.repeat(seen[..., None], 3, axis=-1), int(query), found[best], step)


def draw(clip: np.ndarray, label: int) -> bytes:
    """Return a PNG of what the layer does with a clip of a digit, uint8 [time, height, width, 3]: the
    attention of the strongest corner, and each pattern's share over all corners."""
    query = int(corners(jnp.asarray(clip[None, ..., 0], jnp.float32) / 255)[0, 0])
    share = read(clip[None], line_kernels())[0]
    return _draw(clip, query, line_kernels(), share, f"The digit moves at {DIRECTIONS[label]}")


def draw_moving(moving: Moving) -> bytes:
    """Return a PNG of what the layer does with a part of a recorded clip."""
    kernels = np.concatenate([line_kernels(), still_kernel()], axis=-1)
    return _draw(moving.clip, moving.query, kernels, moving.shares, moving.title)


def _draw(clip: np.ndarray, query: int, kernels: np.ndarray, share: np.ndarray, title: str) -> bytes:
    from matplotlib.figure import Figure  # here: half a second, for those who draw

    grey = jnp.asarray(clip[None, ..., 0], jnp.float32) / 255
    weights = maps(grey, kernels, np.array([query])).attention[0, 0, 0].sum(axis=1)  # of all frames
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    title = f"One StructSA layer, kernels set by hand, nothing trained. {title}"
    figure.suptitle(textwrap.fill(title, 100))
    upper, lower = cast(Any, figure.subfigures(2, 1, height_ratios=(2, 1.15)))
    _draw_correlations(upper.subplots(2, len(clip)), clip, grey, query)
    _draw_patterns(lower.subplots(1, kernels.shape[-1]), np.asarray(weights), share)
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _draw_correlations(axes, clip, grey, query):
    """Frames above, the query's correlations with their positions below."""
    frame, row, column = np.unravel_index(query, grey.shape[1:])
    features = normalised(patches(grey))[0]
    correlation = np.asarray(features @ features[frame, row, column])
    for t, (above, below) in enumerate(axes.T):
        above.imshow(clip[t])
        above.set_title(f"frame {t}", fontsize=8)
        below.imshow(correlation[t], cmap="RdBu_r", vmin=-1, vmax=1)
    for place in axes[:, frame]:
        place.plot(column, row, "s", color="#d95f02", markersize=9, markerfacecolor="none")
    axes[0, 0].set_ylabel("clip, query marked", fontsize=8)
    axes[1, 0].set_ylabel("its correlations", fontsize=8)


def _draw_patterns(axes, weights, found):
    """The query's attention to each pattern, and the pattern's share over all queries."""
    for d, (place, name) in enumerate(zip(axes, (*DIRECTIONS, "still"), strict=False)):
        place.imshow(weights[d], cmap="viridis", vmin=0, vmax=weights.max())
        bold = "bold" if d == found.argmax() else None
        place.set_title(f"{name}\n{found[d]:.0%}", fontsize=8, weight=bold)
    axes[0].set_ylabel("attention of each\npattern, all frames", fontsize=8)


@options.plain_command()
@click.argument("out", metavar="[OUT.png]", required=False)
@click.option("--clip", metavar="FILE", help="A video, or a folder of frames, to draw.")
@click.option("--clips", type=click.IntRange(min=8), default=200, help="How many test clips to read.")
def command(out: str | None, clip: str | None, clips: int) -> None:
    """Read the direction of motion with one StructSA layer that has no trained weight.

    \b
    Example:
      python examples/motion.py motion.png
      python examples/motion.py motion.png --clip=CLIP.mp4
    """
    if clip and not out:
        raise UserError("--clip draws a picture: say where, as OUT.png")
    path = parse_path(out) if out else None
    select_devices("auto")
    if clip and path is not None:
        moving = read_clip(clip)
        print(moving.title)
        _save(path, draw_moving(moving))
        return
    pixels, labels = digits(clips)
    print(f"{len(pixels)} clips of one of {len(DIRECTIONS)} directions, nothing trained; right:")
    for name, share in trials(pixels, labels):
        print(f"  {share:.3f} {name}")
    if path is not None:
        _save(path, draw(pixels[_DRAWN], int(labels[_DRAWN])))


def _save(out: epath.Path, picture: bytes) -> None:
    with write_errors_as_user_error(out):
        write(out, picture)
    print(printable(str(out)))


if __name__ == "__main__":
    cli.run(command, sys.argv[1:], name="python examples/motion.py", trains=False)
