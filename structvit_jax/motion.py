"""The idea of StructSA in one picture: a layer that reads the direction of motion with no trained weight.

    python -m structvit_jax.motion [OUT.png] [--clips=200]

In the correlations of one position's patch with all positions of a clip, what moves leaves a line through
space and time, and the line's slope is the motion. Eight kernels of 3x3x3, a line for each direction, are
enough to read it: the attention that a pattern gets in all says how much moves that way. With no kernels, as
in plain self-attention, or with one, as in a convolutional projection, there is nothing to compare.

Prints how often the direction of a moving digit is read right: as it is, reversed in time (the answer turns
around), with the frames shuffled, and with eight equal kernels; and draws a clip. The digits are real scans,
their motion is synthetic.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax.typing import ArrayLike

from structvit_jax.command import parse_flags, run_command
from structvit_jax.data.digits import MovingDigits
from structvit_jax.errors import UserError
from structvit_jax.ops import StructAttentionMaps, convolve_patterns, struct_attention_maps
from structvit_jax.ops.attention import attention
from structvit_jax.training.mesh import select_devices

DIRECTIONS = MovingDigits.class_names  # in steps of 45 degrees, counterclockwise from the right
_PATCH = 5  # pixels
_QUERIES = 24  # positions of a clip
_SHARPNESS = 20.0  # of the softmax, per unit of the cosine between two patches
_AT_ONCE = 4  # clips: their keys stay in a CPU's cache
_DRAWN = 1  # the clip that is drawn

_CLIPS = flags.DEFINE_integer("clips", 200, "How many test clips to read.", lower_bound=8)


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


def corners(clips: jax.Array) -> jax.Array:
    """The positions [batch, 24] in the two middle frames whose patches vary most in the direction in which
    they vary least (Shi and Tomasi, 1994): how an edge moves along itself cannot be seen."""
    first, positions = (clips.shape[1] - 1) // 2, clips[0, 0].size
    seen = patches(clips[:, first : first + 2])
    seen = seen.reshape(*seen.shape[:-1], _PATCH, _PATCH)
    down = (seen[..., 1:, :] - seen[..., :-1, :])[..., :-1]
    right = (seen[..., 1:] - seen[..., :-1])[..., :-1, :]
    yy, yx, xx = (jnp.sum(a * b, axis=(-2, -1)) for a, b in ((down, down), (down, right), (right, right)))
    smaller = (yy + xx) / 2 - jnp.sqrt(((yy - xx) / 2) ** 2 + yx**2)  # eigenvalue of [[yy, yx], [yx, xx]]
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
    """The attention [batch, D] that each pattern gets at all positions together, from 0 to 1: the mean over
    queries at corners. The fast form of the layer, with values that are the patterns' numbers."""
    features = normalised(patches(clips))[..., None, :]
    rows = features.reshape(len(clips), -1, *features.shape[-2:])
    query = jnp.take_along_axis(rows, corners(clips)[..., None, None], axis=1)
    keys = convolve_patterns(features, kernels)
    planes = keys.shape[1]
    keys = keys.reshape(len(clips), -1, *features.shape[-2:])
    numbers = jnp.repeat(jnp.eye(planes, features.shape[-1]), rows.shape[1], axis=0)[:, None]
    values = jnp.broadcast_to(numbers, keys.shape)
    return attention(_scale(features) * query, keys, values)[..., 0, :planes].mean(axis=1)


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


def draw(clip: np.ndarray, label: int) -> bytes:
    """What the layer does with a clip, [time, height, width, 3] uint8; a PNG."""
    from matplotlib.figure import Figure  # here: half a second, for those who draw

    grey = jnp.asarray(clip[None, ..., 0], jnp.float32) / 255
    query = corners(grey)[0, :1]
    weights = maps(grey, line_kernels(), query).attention[0, 0, 0].sum(axis=1)  # of all frames
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    figure.suptitle(
        f"One StructSA layer, kernels set by hand, nothing trained. The digit moves at {DIRECTIONS[label]}"
    )
    upper, lower = cast(Any, figure.subfigures(2, 1, height_ratios=(2, 1.15)))
    _draw_correlations(upper.subplots(2, len(clip)), clip, grey, int(query[0]))
    _draw_patterns(
        lower.subplots(1, len(DIRECTIONS)), np.asarray(weights), read(clip[None], line_kernels())[0]
    )
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
    for d, (place, name) in enumerate(zip(axes, DIRECTIONS, strict=True)):
        place.imshow(weights[d], cmap="viridis", vmin=0, vmax=weights.max())
        bold = "bold" if d == found.argmax() else None
        place.set_title(f"{name}\n{found[d]:.0%}", fontsize=8, weight=bold)
    axes[0].set_ylabel("attention of each\npattern, all frames", fontsize=8)


def main(argv: Sequence[str]) -> None:
    paths = parse_flags(argv)
    if len(paths) > 1:
        raise UserError("it takes at most OUT.png, and --clips=N; see --help")
    select_devices("auto")
    clips, labels = digits(_CLIPS.value)
    print(f"{len(clips)} clips of one of {len(DIRECTIONS)} directions, nothing trained; right:")
    for name, share in trials(clips, labels):
        print(f"  {share:.3f} {name}")
    for path in paths:
        epath.Path(path).write_bytes(draw(clips[_DRAWN], int(labels[_DRAWN])))
        print(path)


if __name__ == "__main__":
    run_command(main)
