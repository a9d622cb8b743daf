"""Keys of the configuration: defaults, ranges and meanings. Durations are tested with training."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from structvit_jax.config import KEYS, automatic, check_config, default_config, get_value, keys_of, set_value
from structvit_jax.config import matching as match_patterns
from structvit_jax.utils.errors import UserError


def test_defaults_are_the_keys():
    config = default_config()
    assert dict(keys_of(config)) == {name: key.default for name, key in KEYS.items()}
    assert dict(keys_of(config.to_dict())).keys() == KEYS.keys()
    assert all(key.meaning for key in KEYS.values())
    check_config(config)
    with pytest.raises(AttributeError):
        config.data.nonsense = 1
    with pytest.raises(TypeError):
        config.data.channels = 3  # unset keys have types, too


# Values outside the range of a key, and the end of the error message.
OUTSIDE = {
    "train.max_skipped": [(0, "to be at least 1")],
    "data.workers": [(-2, "to lie from -1 to 1024"), (1025, "to lie from -1 to 1024")],
    "data.cache": [("yes", "to be auto, on or off")],
    "data.cache_gib": [(-0.5, "to lie from 0 to 2**20")],
    "data.max_pixels": [(0, "Pillow's limit"), (178956971, "Pillow's limit")],
    "data.max_frames": [(2**31, r"2**31 - 1")],
    "data.batch_size": [(0, "to lie from 1 to 2**24"), (2**24 + 1, "to lie from 1 to 2**24")],
    "data.frames": [(-1, "to lie from 0 to 2**14")],
    "data.channels": [("grb", "to be rgb or bgr")],
    "mesh.device": [("gpus", "to be auto, cpu, gpu or tpu")],
    "data.test_crops": [(2, "to be 1 or 3")],
    "augment.flip": [(1.1, "to lie from 0 to 1"), (float("nan"), "to lie from 0 to 1")],
    "data.crop_fraction": [(0.0, "to lie above 0, up to 1")],
    "train.label_smoothing": [(1.0, "to lie from 0 to below 1")],
    "augment.crop_area": [((1.0, 0.5), "two numbers"), ((0.5, 1.5), "up to 1"), (("a", 1), "two numbers")],
    "augment.crop_aspect": [((0.0, 1.0), "two numbers"), ((1.0,), "two numbers")],
    "optimizer.lr": [(0.0, "to be positive"), (float("inf"), "finite"), (1e39, "finite in float32")],
    "train.dense_weight": [(-1.0, "to be 0 or positive"), (float("nan"), "to be 0 or positive")],
    "train.seed": [(-1, "to lie from 0 to below 2**31")],
    "mesh.data": [(0, "to be -1 or at least 1")],
    "data.mean": [((0, 0), "three finite numbers"), ((0, 0, float("inf")), "three"), (("a",) * 3, "three")],
    "data.std": [((0.0, 1.0, 1.0), "three positive finite numbers, one per channel")],
    "mesh.compilation_cache": [("a\0b", "a path of printable characters")],
}


@pytest.mark.parametrize(("name", "value", "phrase"), [(n, v, p) for n in OUTSIDE for v, p in OUTSIDE[n]])
def test_values_outside_their_range(name, value, phrase):
    config = default_config()
    set_value(config, name, value)
    with pytest.raises(UserError) as error:
        check_config(config)
    assert str(error.value).startswith(f"config.{name} is ") and phrase in str(error.value)


def test_every_range_refuses_other_types():
    for key in KEYS.values():
        if key.range.phrase != "a value of its type":
            for value in (None, "x\0", (1, 2, 3, 4), {}, object(), np.nan):
                assert not key.range.contains(value), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 96, "short_side": 64}, "config.data.short_side is 64; it needs to be 0 or at least 96"),
        ({"frames": 0, "test_clips": 2}, "test_clips is more than 1, but an image has only one clip"),
        ({"size": 2**14, "batch_size": 2**20}, "GiB of pixels at a time; the limit is 256 GiB"),
        ({"size": 2**14, "batch_size": 1, "test_clips": 2**14}, "config.data.test_clips=16384, size=16384"),
    ],
)
def test_values_that_do_not_go_together(changes, message):
    config = default_config()
    config.data.update(changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_open_keys_keep_their_types_and_are_not_checked():
    config = default_config()
    automatic.leave_open(config, *automatic.OPEN)
    assert automatic.missing(config) == list(automatic.OPEN)
    automatic.check_given(config)
    with pytest.raises(TypeError):
        set_value(config, "data.size", "large")
    config.optimizer.lr = -1.0
    with pytest.raises(UserError, match=r"config\.optimizer\.lr is -1\.0"):
        automatic.check_given(config)
    assert get_value(config, "data.size") is None


def test_later_patterns_win():
    names = ["a.kernel", "a.bias", "b.kernel"]
    assert match_patterns("a.*", names, "") == {"a.kernel", "a.bias"}
    assert match_patterns("*, !*.bias", names, "") == {"a.kernel", "b.kernel"}
    assert match_patterns("*,!*.bias,a.*", names, "") == set(names)
    assert match_patterns("", names, "") == set()
    with pytest.raises(UserError, match=r"^no '!c' here$"):
        match_patterns("*,!c", names, "no {} here")


def test_keys_of_nested_and_plain_configurations():
    assert dict(keys_of(ConfigDict({"a": 1, "b": {"c": 2}}))) == {"a": 1, "b.c": 2}
