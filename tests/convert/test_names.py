"""Names and layouts of PyTorch's arrays, and class names."""

import numpy as np
import pytest
from convert_helpers import random_model, state_dict

from structvit_jax import convert
from structvit_jax.utils import class_names
from structvit_jax.utils.errors import UserError

KINDS = {
    "uniformer_s": {},
    "uniformer_s_plus": {},
    "uniformer_b_ls": {},
    "uniformer_l": {"token_labels": True},
    "uniformer_s_video": {},
}


@pytest.mark.parametrize("name", KINDS)
def test_round_trip_through_pytorch_keys(name):
    _, arrays = random_model(name, **KINDS[name])
    torch = convert.to_torch(arrays)
    back = convert.from_torch(torch)
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
    assert convert.to_torch(back).keys() == torch.keys()


@pytest.mark.parametrize("kind", ["image", "video"])
def test_round_trip_of_the_released_keys_is_exact(kind):
    released = state_dict(kind)
    back = convert.to_torch(convert.from_torch(released))
    assert back.keys() == released.keys()
    for key, value in released.items():
        assert back[key].shape == np.shape(value) and back[key].dtype == np.asarray(value).dtype, key
        assert np.array_equal(back[key], value), key


def test_keys_of_stem_scales_and_dense_head():
    """Keys of variants without parity vectors, taken from the released code."""
    plus, scaled, large = (
        convert.to_torch(random_model(name, **KINDS[name])[1])
        for name in ("uniformer_s_plus", "uniformer_b_ls", "uniformer_l")
    )
    assert {f"patch_embed1.proj.{i}.weight" for i in (0, 1, 3, 4)} <= plus.keys()
    assert {"patch_embed2.proj.0.bias", "patch_embed4.proj.1.running_var"} <= plus.keys()
    assert not any(key.startswith("patch_embed") and ".norm." in key for key in plus)
    assert "blocks4.0.gamma_2" in scaled and "blocks1.0.gamma_1" not in scaled
    assert large["blocks1.0.gamma_1"].shape == (1, 8, 1, 1) and large["blocks3.0.gamma_1"].shape == (32,)
    assert large["aux_head.weight"].shape == (5, 64)


def test_arrays_that_no_uniformer_has():
    for state, phrase in [
        ({"cls_token": np.ones(3), "x": np.ones(3)}, r"keys that no UniFormer has \(2\): cls_token, x"),
        ({f"k{i}": np.ones(3) for i in range(9)}, "k4 and 4 more"),
        ({"blocks1.0.attn.qkv.weight": np.ones((3, 3))}, r"\(1\): blocks1\.0\.attn\.qkv\.weight"),
        ({"head.weight": np.ones(3)}, r"head\.weight has shape \(3,\), which is not that of a kernel"),
        ({"head.bias": np.ones(3, np.int8)}, "head.bias holds int8 numbers"),
    ]:
        with pytest.raises(UserError, match=phrase):
            convert.from_torch(state)
    _, deit = random_model("deit_tiny", depths=(1,), widths=(32,))
    with pytest.raises(UserError, match="only UniFormers and StructViTs can be converted"):
        convert.to_torch(deit)


def test_class_orders_of_the_release():
    """Facts of the released lists; see convert/classes/SOURCES.md."""
    names = {key: release.class_names() for key, release in convert.RELEASED.items()}
    assert all(len(set(names[key])) == release.classes for key, release in convert.RELEASED.items())
    assert names["k400"][0] == "riding a bike" and names["k400"][341] == "abseiling"
    assert (
        names["k600"][0] == "feeding fish" and names["k600"][336] == "passing american football (not in game)"
    )
    assert names["something"][140] == "Spinning something that quickly stops spinning"
    assert list(names["something"]) == sorted(names["something"])
    assert list(names["imagenet"]) == sorted(names["imagenet"]) and names["imagenet"][0] == "n01440764"


def test_matching_class_names():
    released = (
        "Putting [something], [something] and [something] on the table",
        "passing American football (in game)",
    )
    assert class_names.match(released, released) == [0, 1]
    copies = (
        ' "passing_american_football_(in_game)" ',
        "Putting something something and something on the table",
    )
    assert class_names.match(released, copies) == [1, 0]
    assert class_names.match(("Cafe\u0301", "b"), ("b", "Café")) == [1, 0]
    for names, others in [
        (("a", "b"), ("a", "c")),
        (("a", "b"), ("a", "b", "c")),
        (("a", "A"), ("a", "(a)")),  # equal apart from spelling
        (("-1", "1"), ("(1)", "1")),
    ]:
        assert class_names.match(names, others) is None
    assert class_names.match(("a", "A"), ("A", "a")) == [1, 0]
    assert class_names.difference(("a b", "c"), ("A_b", "d")) == ("'d'", "'c'")
