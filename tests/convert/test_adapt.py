"""Fit the weights of one model to another."""

import dataclasses

import numpy as np
import pytest
from convert_helpers import as_source, call, fit, random_model, relative, tiny

from structvit_jax import convert, create_model
from structvit_jax.convert import Action
from structvit_jax.models import weights
from structvit_jax.utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "frames"), [("uniformer_s", 4), ("structvit_s_2_1", 1), ("structvit_s_2_1", 5)]
)
def test_a_still_clip_gives_the_image_s_logits_when_centre_inflated(name, frames):
    model, arrays = random_model(name)
    video, _ = fit(as_source(name, arrays), f"{name}_video", rules=convert.Rules(inflate="centre"))
    image = np.random.default_rng(1).standard_normal((2, 64, 64, 3)).astype(np.float32)
    clip = np.repeat(image[:, None], frames, axis=1)
    assert relative(call(video, clip), call(model, image)) <= 1e-5


def test_rules_that_keep_the_function():
    """The logits stay when structure kernels are repeated, padded or copied, and layer scales are folded."""
    x = np.random.default_rng(2).standard_normal((1, 64, 64, 3)).astype(np.float32)
    cases = [
        ("structvit_s_2_1", {}, "structvit_s_4_1", {}, Action.REPEATED),
        ("structvit_s_2_1", {}, "structvit_s_2_1", {"key_window": 5, "value_window": 7}, Action.PADDED),
        ("structvit_s_2_1", {"key_kernels": "shared"}, "structvit_s_2_1", {}, Action.UNSHARED),
        ("structvit_s_2_1", {"aggregation": "element"}, "structvit_s_2_1", {}, Action.PADDED),
        ("uniformer_b_ls", {}, "uniformer_s", {}, Action.FOLDED),
        ("uniformer_l", {}, "structvit_s_3_1", {}, Action.FOLDED),
        ("uniformer_s", {}, "structvit_l_4_1", {}, Action.SET_TO_ONE),
    ]
    for name, given, to, wanted, action in cases:
        model, arrays = random_model(name, **given)
        fitted, adapted = fit(as_source(name, arrays, **given), to, **wanted)
        assert action in {outcome.action for outcome in adapted.outcomes.values()}, (name, to)
        assert relative(call(fitted, x), call(model, x)) <= 1e-5, (name, to)


def test_arrays_that_cannot_be_kept_are_reported():
    _, arrays = random_model("uniformer_s")
    source = as_source("uniformer_s", arrays, class_names=("a", "b", "c", "d", "e"))
    _, fitted = fit(source, "structvit_s_4_2")
    assert any("stride is 2 instead of 1" in line for line in fitted.lines())
    _, fitted = fit(source, "uniformer_s", num_classes=3)
    assert (
        "re-initialised, for 3 classes instead of 5: 2 arrays, 195 values: head.bias, head.kernel"
        in fitted.lines()
    )
    _, fitted = fit(source, "uniformer_s", class_names=("p", "q", "r", "s", "t"))
    assert any("re-initialised, for classes with other names" in line for line in fitted.lines())
    _, arrays = random_model("structvit_s_4_1")
    _, fitted = fit(as_source("structvit_s_4_1", arrays), "structvit_s_3_1")
    assert any("re-initialised, because (3, 3, 1, 32, 4) cannot become" in line for line in fitted.lines())
    _, fitted = fit(as_source("structvit_s_4_1", arrays), "uniformer_s")
    assert "dropped, because the model has no such arrays: 6 arrays" in fitted.lines()


def test_the_head_follows_class_names():
    model, arrays = random_model("uniformer_s")
    source = as_source("uniformer_s", arrays, class_names=("a", "b", "c", "d", "e"))
    reordered, _ = fit(source, "uniformer_s", class_names=("c", "a", "b", "e", "d"))
    x = np.random.default_rng(3).standard_normal((2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(call(reordered, x), call(model, x)[:, [2, 0, 1, 4, 3]], rtol=1e-4, atol=1e-5)


def test_a_released_head_takes_the_order_of_the_data(tmp_path):
    path = str(tmp_path / "released.safetensors")
    convert.weight_files.write(path, tiny("uniformer_tiny_video", 400))
    source = convert.read_released(path)
    assert any("Kinetics-400" in note for note in source.notes)
    model = create_model("uniformer_tiny_video", num_classes=400)
    fresh = weights.split(model)[1]
    own = fresh.params | fresh.batch_stats
    names = sorted(source.class_names)  # the order of structvit_jax.data.preparation
    adapted = convert.adapt(source, own, model.variant, names, convert.Rules())
    bias = dict(zip(source.class_names, source.arrays["head.bias"], strict=True))
    assert adapted.arrays["head.bias"].tolist() == [bias[name] for name in names]
    assert "reordered by class name: 2 arrays" in "\n".join(adapted.lines())
    adapted = convert.adapt(source, own, model.variant, None, convert.Rules())
    assert np.array_equal(adapted.arrays["head.bias"], source.arrays["head.bias"])
    unnamed = dataclasses.replace(source, class_names=None)
    numbers = tuple(map(str, range(400)))
    for kept, message in [
        (source, "warning: the head is not kept: the weights and the data have 400 classes with"),
        (unnamed, "does not name its 400 classes. To keep it, name them with"),
    ]:
        adapted = convert.adapt(kept, own, model.variant, numbers, convert.Rules())
        assert message in "\n".join(adapted.lines())
        assert np.array_equal(adapted.arrays["head.bias"], own["head.bias"])


def test_other_networks_are_refused():
    _, arrays = random_model("uniformer_s")
    source = as_source("uniformer_s", arrays)
    for name, overrides, phrase in [
        ("uniformer_s", {"depths": (1, 1, 2, 2)}, "depths is (1, 1, 2, 1), not (1, 1, 2, 2)"),
        ("uniformer_s", {"head_width": 16}, "head_width is 32, not 16"),
        ("uniformer_s_plus", {}, "stem is patch, not conv"),
    ]:
        with pytest.raises(UserError) as error:
            fit(source, name, **overrides)
        assert phrase in str(error.value)
    _, arrays = random_model("uniformer_s_video")
    with pytest.raises(UserError, match="holds a video model"):
        fit(as_source("uniformer_s_video", arrays), "uniformer_s")


def test_positions_of_deit_are_resized():
    """In the same way as the model resizes them for other inputs, so the logits stay."""
    small = {"depths": (1,), "widths": (32,), "head_width": 32, "patch": 8}
    model, arrays = random_model("deit_s", image_size=32, **small)
    fitted, adapted = fit(
        as_source("deit_s", arrays, image_size=32, **small), "deit_s", image_size=48, **small
    )
    assert any(line.startswith("positions resized") for line in adapted.lines())
    x = np.random.default_rng(4).standard_normal((1, 48, 48, 3)).astype(np.float32)
    assert relative(call(fitted, x), call(model, x)) <= 1e-5
