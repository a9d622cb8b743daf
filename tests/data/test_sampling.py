"""Sampling rules against indices computed by hand and the released rules, for all lengths up to 400."""

import math
from fractions import Fraction

import numpy as np
import pytest

from structvit_jax.data import sampling
from structvit_jax.utils.errors import UserError

COUNTS = range(1, 401)


def test_golden_dense():
    """UniFormer's Kinetics rule: 16 x 4 spans 64 frames, spaced 63 / 15 = 4.2."""
    steps = [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    assert sampling.dense(300, 16, 4, (0, 1)).tolist() == [118 + step for step in steps]  # (300 - 64) // 2
    for view, start in enumerate([0, 78, 156, 234]):  # slack 236, 236 // 3 = 78
        assert sampling.dense(300, 16, 4, (view, 4)).tolist() == [start + step for step in steps]
    assert sampling.dense(10, 8, 8, (0, 1)).tolist() == [0, 9, 9, 9, 9, 9, 9, 9]  # 63 / 7 = 9
    assert sampling.dense(40, 8, 8, (3, 4)).tolist() == [0, 9, 18, 27, 36, 39, 39, 39]
    assert sampling.dense(7, 1, 8, (0, 1)).tolist() == [0]


def test_golden_strided():
    assert sampling.strided(300, 4, 8, (0, 1)).tolist() == [137, 145, 153, 161]  # slack 275
    assert sampling.strided(300, 4, 8, (1, 2)).tolist() == [275, 283, 291, 299]
    assert sampling.strided(20, 4, 8, (0, 1)).tolist() == [0, 8, 16, 19]


def test_golden_segment():
    """UniFormer's Something-Something rule: 49 / 8 = 6.125; 4 x 6.125 = 24.5 rounds to 24."""
    assert sampling.segment(50, 8, 1, (0, 1)).tolist() == [3, 9, 15, 21, 27, 34, 40, 46]
    # Three views: + floor(6.125 / 4 * (v + 1)) = 1, 3, 4.
    for view, add in enumerate([1, 3, 4]):
        golden = [edge + add for edge in [0, 6, 12, 18, 24, 31, 37, 43]]
        assert sampling.segment(50, 8, 1, (view, 3)).tolist() == golden
    assert sampling.segment(1, 8, 1, (0, 1)).tolist() == [0] * 8
    assert sampling.segment(3, 4, 1, (0, 1)).tolist() == [0, 0, 1, 2]  # 0, .5, 1, 1.5 -> 0, 0, 1, 2


@pytest.mark.parametrize("frames, stride, views", [(16, 4, 4), (8, 8, 1), (32, 2, 3), (1, 4, 2), (5, 1, 10)])
def test_test_views_are_the_released_rules_in_exact_arithmetic(frames, stride, views):
    for count in COUNTS:
        for view in range(views):
            slack = max(count - frames * stride, 0)
            start = slack // 2 if views == 1 else view * (slack // (views - 1))
            spread = [Fraction((frames * stride - 1) * i, max(frames - 1, 1)) for i in range(frames)]
            expected = [min(math.floor(start + step), count - 1) for step in spread]
            assert sampling.dense(count, frames, stride, (view, views)).tolist() == expected
            part = Fraction(count - 1, frames)
            middle = math.floor(part * (view + 1) / (views + 1))
            expected = [round(part * i) + middle for i in range(frames)]
            assert sampling.segment(count, frames, stride, (view, views)).tolist() == expected


@pytest.mark.parametrize("rule", sampling.RULES.values(), ids=sampling.RULES)
@pytest.mark.parametrize("frames, stride", [(16, 4), (8, 8), (1, 1), (3, 1), (32, 2)])
def test_indices_are_in_range_and_ascending(rule, frames, stride):
    for count in COUNTS:
        draws = [np.random.default_rng((count, i)) for i in range(3)] + [(v, 4) for v in range(4)]
        for draw in draws:
            indices = rule(count, frames, stride, draw)
            assert indices.shape == (frames,)
            assert indices[0] >= 0 and indices[-1] < count
            assert (np.diff(indices) >= 0).all()


@pytest.mark.parametrize("name, enough", [("dense", 64 + 3), ("strided", 61 + 3), ("segment", 1 + 16 * 5)])
def test_distinct_views_give_distinct_frames(name, enough):
    """If the video is long enough: one spare frame, or one of the segment, per further view."""
    for count in range(enough, 401):
        views = [sampling.RULES[name](count, 16, 4, (view, 4)) for view in range(4)]
        assert all((a != b).all() for i, a in enumerate(views) for b in views[:i]), count


def test_random_starts_cover_the_video_evenly():
    rng = np.random.default_rng(0)
    starts = [sampling.strided(12, 2, 2, rng)[0] for _ in range(4000)]
    counts = np.bincount(starts, minlength=10)
    assert len(counts) == 10 and counts.min() > 330 and counts.max() < 470  # 400 each
    spread = np.array([sampling.dense(14, 4, 3, rng) for _ in range(6000)])  # slack 2, gaps of 11 / 3
    # Starts 0, 1/3, ..., 5/3; from each the indices floor(start + i * 11 / 3).
    expected = {tuple(math.floor(Fraction(s, 3) + Fraction(11 * i, 3)) for i in range(4)) for s in range(6)}
    found, counts = np.unique(spread, axis=0, return_counts=True)
    assert {tuple(row) for row in found.tolist()} == expected
    assert counts.min() > 850 and counts.max() < 1150  # 1000 each


def test_random_segments_draw_uniformly_from_each_segment():
    rng = np.random.default_rng(0)
    drawn = np.array([sampling.segment(25, 4, 1, rng) for _ in range(3000)])  # edges 0, 6, 12, 18, 24
    for i in range(4):
        values, counts = np.unique(drawn[:, i], return_counts=True)
        assert values.tolist() == list(range(6 * i, 6 * i + 7))  # both edges belong to the segment
        assert counts.min() > 340 and counts.max() < 520  # 3000 / 7 = 429 each


def test_unknown_rules_are_rejected():
    with pytest.raises(UserError, match="'segment'"):
        sampling.rule("segments")
