"""Recognition of released weights."""

import numpy as np
import pytest
from convert_helpers import call, relative, zeros

from structvit_jax import convert, create_model
from structvit_jax.convert import Action
from structvit_jax.convert.weight_files import StateDict
from structvit_jax.models import weights
from structvit_jax.utils.errors import UserError


@pytest.fixture
def read(monkeypatch):
    """Recognise a state dict as if it had been read from a file."""

    def read(state_dict, **arguments):
        read_file = lambda path, which: StateDict(state_dict)  # noqa: E731
        monkeypatch.setattr(convert.weight_files, "read", read_file)
        return convert.read_released("released.pth", **arguments)

    return read


@pytest.mark.parametrize(
    ("name", "classes", "given", "recognised", "channels"),
    [
        ("uniformer_s", 1000, {}, {"name": "uniformer_s"}, "rgb"),
        ("uniformer_s_video", 174, {}, {"name": "uniformer_s_video"}, "bgr"),
        ("uniformer_b_ls", 1000, {}, {"name": "uniformer_b_ls"}, "rgb"),
        ("uniformer_s_plus", 1000, {"head_width": 64}, {"name": "uniformer_s_plus", "head_width": 64}, "rgb"),
        ("uniformer_s_plus", 1000, {"head_width": 32}, {"name": "uniformer_s_plus"}, "rgb"),
        (
            "uniformer_s",
            1000,
            {"head_width": 32, "data": "imagenet_half"},
            {"name": "uniformer_s", "head_width": 32, "token_labels": True},
            "rgb",
        ),
        ("uniformer_l", 1000, {"data": "imagenet"}, {"name": "uniformer_l", "token_labels": True}, "rgb"),
    ],
)
def test_recognition(name, classes, given, recognised, channels, read):
    overrides = {"token_labels": True} if "token_labels" in recognised else {}
    source = read(zeros(name, classes, **overrides), **given)
    assert (source.model, source.num_classes, source.inputs.channels) == (recognised, classes, channels)
    assert source.inputs.mean[0] == (0.5 if given.get("data") == "imagenet_half" else source.inputs.mean[0])


@pytest.mark.parametrize(
    ("name", "classes", "overrides", "given", "message"),
    [
        ("uniformer_s_plus", 1000, {}, {}, "--head_width=32"),
        ("uniformer_s", 1000, {"token_labels": True}, {}, "--head_width=32"),
        ("uniformer_s", 1000, {"token_labels": True}, {"head_width": 64}, "--data=imagenet"),
        ("uniformer_s", 10, {}, {}, "--data=NAME"),
        ("uniformer_s", 1000, {}, {"data": "imagnet"}, "Did you mean 'imagenet'"),
        ("uniformer_s", 1000, {"depths": (3, 4, 8, 4)}, {}, "no model here has blocks"),
    ],
)
def test_errors_ask_for_what_shapes_do_not_determine(name, classes, overrides, given, message, read):
    with pytest.raises(UserError) as error:
        read(zeros(name, classes, **overrides), **given)
    assert message in str(error.value)


def test_layer_scales_that_no_model_has_are_folded(read):
    scaled = create_model("uniformer_tiny", num_classes=1000, layer_scale=0.5)
    params, stats = weights.split(scaled)[1]
    source = read(convert.to_torch({name: np.asarray(array) for name, array in (params | stats).items()}))
    assert source.model == {"name": "uniformer_tiny"}
    plain = create_model("uniformer_tiny", num_classes=1000)
    own = weights.split(plain)[1]
    adapted = convert.adapt(source, own.params | own.batch_stats, plain.variant, None, convert.Rules())
    assert Action.FOLDED in {outcome.action for outcome in adapted.outcomes.values()}
    weights.update(plain, weights.cast_like(own, adapted.arrays))
    x = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    assert relative(call(plain, x), call(scaled, x)) <= 1e-5
