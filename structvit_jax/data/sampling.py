"""Rules that choose the frames of a clip from a video. They use frame numbers and ignore the frame rate.

`count` is the number of frames of the video, at least one. The chosen indices start at 0 and never decrease;
videos shorter than the clip repeat frames. In training, a rule draws from a random generator. In testing, it
returns clip number `view` of `views` clips. `dense` and `segment` are the rules of UniFormer's released code,
in exact arithmetic instead of float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from structvit_jax.utils.errors import check_choice

Draw = np.random.Generator | tuple[int, int]  # a random generator, or (view, views)
Rule = Callable[[int, int, int, Draw], np.ndarray]  # (count, frames, stride, draw) -> int64 [frames]


def dense(count: int, frames: int, stride: int, draw: Draw) -> np.ndarray:
    """Spread frames evenly over a window of frames * stride frames, from its first to its last.

    This is how SlowFast and UniFormer sample Kinetics: 16 frames with stride 4 span 64 frames, 4.2 apart.
    A random window may start between two frames. With slack = count - frames * stride, the window of test
    view `view` starts at view * floor(slack / (views - 1)), or at floor(slack / 2) if there is only one view.
    """
    span, gaps = frames * stride, max(frames - 1, 1)
    slack = max(count - span, 0)
    # `start` is in units of 1 / gaps frames: finer starts would give the same indices.
    if isinstance(draw, np.random.Generator):
        start = _random(draw, slack * gaps)
    else:
        start = gaps * _start(slack, draw)
    steps = np.arange(frames) * (span - 1 if frames > 1 else 0)
    return np.minimum((start + steps) // gaps, count - 1)


def strided(count: int, frames: int, stride: int, draw: Draw) -> np.ndarray:
    """Take every stride-th frame from a random start; in testing, from evenly spaced starts as in `dense`."""
    slack = max(count - ((frames - 1) * stride + 1), 0)
    start = _random(draw, slack + 1) if isinstance(draw, np.random.Generator) else _start(slack, draw)
    return np.minimum(start + np.arange(frames) * stride, count - 1)


def segment(count: int, frames: int, stride: int, draw: Draw) -> np.ndarray:
    """Take one frame from each of `frames` equal segments of the whole video; ignore the stride.

    This is how UniFormer samples Something-Something. With s = (count - 1) / frames, frame i is drawn from
    round(s i) to round(s (i + 1)), both inclusive; in testing it is
    round(s i) + floor(s (view + 1) / (views + 1)). Halves round to even.
    """
    edges = _round_half_even((count - 1) * np.arange(frames + 1), frames)
    if isinstance(draw, np.random.Generator):
        return draw.integers(edges[:-1], edges[1:], endpoint=True)
    view, views = draw
    return edges[:-1] + (count - 1) * (view + 1) // (frames * (views + 1))


RULES: dict[str, Rule] = {"dense": dense, "strided": strided, "segment": segment}


def rule(name: str) -> Rule:
    """Return the sampling rule of this name; raise a UserError if there is none."""
    return RULES[check_choice("config.data.sampling", name, RULES)]


def _random(generator: np.random.Generator, stop: int) -> int:
    return int(generator.integers(stop)) if stop else 0


def _start(slack: int, draw: tuple[int, int]) -> int:
    view, views = draw
    return slack // 2 if views == 1 else view * (slack // (views - 1))


def _round_half_even(numerator: np.ndarray, denominator: int) -> np.ndarray:
    whole, rest = np.divmod(numerator, denominator)
    return whole + ((2 * rest > denominator) | ((2 * rest == denominator) & (whole % 2 == 1)))
