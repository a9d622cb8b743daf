"""Which frames of a video make a clip: integers from integers, independent of the frame rate.

`count` is the number of frames of the video, at least one; indices start at 0 and never decrease. In training
a rule draws from a generator; in testing it takes view v of `views` instead. Videos shorter than the clip
repeat frames. The rules are those of UniFormer's released code, in exact arithmetic instead of float32;
`strided` is an addition.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from structvit_jax.utils.errors import check_choice

# A rule: (count, frames, stride, generator or (view, views)) -> int64 [frames].
Draw = np.random.Generator | tuple[int, int]
Rule = Callable[[int, int, int, Draw], np.ndarray]


def dense(count: int, frames: int, stride: int, draw: Draw) -> np.ndarray:
    """Spread frames over a window of frames * stride, from its first to its last frame.

    16 x 4 spans 64 frames 4.2 apart, as SlowFast and UniFormer sample Kinetics. A random window starts
    anywhere in the video, also between two frames. With room = count - frames * stride, test windows start at
    v * floor(room / (views - 1)), a single one at floor(room / 2).
    """
    span, gaps = frames * stride, max(frames - 1, 1)
    room = max(count - span, 0)
    # Starts are multiples of 1 / gaps of a frame: finer ones give the same indices.
    start = _random(draw, room * gaps) if isinstance(draw, np.random.Generator) else gaps * _start(room, draw)
    steps = np.arange(frames) * (span - 1 if frames > 1 else 0)
    return np.minimum((start + steps) // gaps, count - 1)


def strided(count: int, frames: int, stride: int, draw: Draw) -> np.ndarray:
    """Take every stride-th frame from a start on, which is random, or evenly spaced as in `dense`."""
    room = max(count - ((frames - 1) * stride + 1), 0)
    start = _random(draw, room + 1) if isinstance(draw, np.random.Generator) else _start(room, draw)
    return np.minimum(start + np.arange(frames) * stride, count - 1)


def segment(count: int, frames: int, stride: int, draw: Draw) -> np.ndarray:
    """Take one frame from each of `frames` equal segments of the whole video; the stride is not used.

    With s = (count - 1) / frames, frame i is drawn from round(s i) to round(s (i + 1)), both inclusive;
    in testing it is round(s i) + floor(s (v + 1) / (views + 1)). Halves round to even, as UniFormer samples
    Something-Something.
    """
    edges = _round_half_even((count - 1) * np.arange(frames + 1), frames)
    if isinstance(draw, np.random.Generator):
        return draw.integers(edges[:-1], edges[1:], endpoint=True)
    view, views = draw
    return edges[:-1] + (count - 1) * (view + 1) // (frames * (views + 1))


RULES: dict[str, Rule] = {"dense": dense, "strided": strided, "segment": segment}


def rule(name: str) -> Rule:
    """Return a sampling rule by name.

    Raises:
      UserError: an unknown name.
    """
    return RULES[check_choice("config.data.sampling", name, RULES)]


def _random(generator: np.random.Generator, stop: int) -> int:
    return int(generator.integers(stop)) if stop else 0


def _start(room: int, draw: tuple[int, int]) -> int:
    view, views = draw
    return room // 2 if views == 1 else view * (room // (views - 1))


def _round_half_even(numerator: np.ndarray, denominator: int) -> np.ndarray:
    whole, rest = np.divmod(numerator, denominator)
    return whole + ((2 * rest > denominator) | ((2 * rest == denominator) & (whole % 2 == 1)))
