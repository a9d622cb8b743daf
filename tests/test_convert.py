"""Weights from elsewhere: parity with the released PyTorch UniFormer, files, recognition and fitting.

tests/data/parity/README.md says where the vectors are from.
"""

import functools
import json
import re
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from structvit_jax import convert, create_model
from structvit_jax.errors import UserError
from structvit_jax.models import get_variant, weights

PARITY = Path(__file__).parent / "data" / "parity"


@functools.cache
def state_dict(kind):
    """The deterministic weights that the vectors were computed with."""
    shapes = json.loads((PARITY / f"uniformer_s_{kind}_keys.json").read_text())
    return {key: _weight(key, shape) for key, shape in shapes.items()}


def _weight(key, shape):
    z = np.random.default_rng(zlib.crc32(key.encode("utf-8"))).standard_normal(shape)
    if key.endswith("num_batches_tracked"):
        return np.int64(0)
    if key.endswith("running_var"):
        z = 1 + 0.1 * np.abs(z)
    elif key.endswith(("running_mean", ".bias")):
        z = 0.1 * z
    elif z.ndim == 1:
        z = 1 + 0.1 * z
    else:
        gain = 2.0 if key.endswith("attn.qkv.weight") else 0.5 if key.endswith("pos_embed.weight") else 1.0
        z = z * gain / np.sqrt(np.prod(shape[1:]))
    return z.astype(np.float32)


def inputs(*shape):
    """PyTorch's [B, 3, ...] noise, channels last."""
    return np.moveaxis(np.random.default_rng(0).standard_normal(shape).astype(np.float32), 1, -1)


def relative(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def call(model, x):
    """The model's logits through one compiled function."""
    structure, arrays = weights.split(model)
    return np.asarray(jax.jit(lambda arrays, x: structure.model(arrays)(x))(arrays, x))


@pytest.mark.parametrize(
    ("tag", "name", "shape", "classes"),
    [
        ("small_224", "uniformer_s", (1, 3, 224, 224), 1000),
        ("small_64", "uniformer_s", (4, 3, 64, 64), 1000),
        ("small_8x64x96", "uniformer_s_video", (2, 3, 8, 64, 96), 400),
    ],
)
def test_evaluation(tag, name, shape, classes):
    kind = "video" if "video" in name else "image"
    vectors = np.load(PARITY / f"uniformer_{kind}.npz")
    model = convert.load_uniformer(create_model(name, num_classes=classes), state_dict(kind))
    structure, arrays = weights.split(model)

    @jax.jit
    def run(arrays, x):
        model = structure.model(arrays)
        return model(x), model.features(x)

    logits, features = run(arrays, inputs(*shape))
    assert relative(logits, vectors[f"{tag}/logits"]) <= 1e-5
    for stage, feature in enumerate(features, 1):
        tokens = np.asarray(feature[0]).reshape(-1, feature.shape[-1])
        assert relative(tokens.mean(axis=0), vectors[f"{tag}/stage{stage}_mean"]) <= 1e-5
        assert relative(tokens[len(tokens) // 3], vectors[f"{tag}/stage{stage}_tok"]) <= 1e-5


def test_training_mode():
    vectors = np.load(PARITY / "uniformer_image.npz")
    model = create_model("uniformer_s", num_classes=1000, drop_path=0.0)
    convert.load_uniformer(model, state_dict("image")).train()
    structure, arrays = weights.split(model)

    @jax.jit
    def run(arrays, x):
        model = structure.model(arrays)
        return model(x), weights.batch_stats(model)

    logits, stats = run(arrays, inputs(4, 3, 64, 64))
    assert relative(logits, vectors["small_64_train/logits"]) <= 5e-5
    compared = {name: vectors[key] for name in stats if (key := _tag(name)) in vectors}
    assert len(compared) == 6
    for name, expected in compared.items():
        assert relative(stats[name], expected) <= 5e-5, name


def _tag(name):
    return f"small_64_train/{convert.torch_key(name)}"


def test_every_misfit_is_reported_at_once_and_changes_nothing():
    model = create_model("uniformer_s", num_classes=1000)
    before = weights.sha256(weights.split(model)[1])
    broken = dict(state_dict("image"))
    del broken["blocks3.0.attn.qkv.bias"]
    broken["aux_head.weight"] = np.zeros((1000, 512), np.float32)
    broken["head.weight"], broken["head.bias"] = np.zeros((400, 512), np.float32), np.zeros(400, np.float32)
    broken["blocks1.0.norm1.weight"] = np.zeros(32, np.float32)
    with pytest.raises(UserError) as error:
        convert.load_uniformer(model, broken)
    for phrase in (
        "5 arrays",
        "missing blocks3.0.attn.qkv.bias",
        "extra aux_head.kernel",
        "head.kernel would be made new, for 1000 classes instead of 400",
        "misshapen blocks1.0.norm1.scale: (32,) for (64,)",
    ):
        assert phrase in str(error.value)
    assert weights.sha256(weights.split(model)[1]) == before
    with pytest.raises(UserError, match=r"2 keys that no UniFormer has: cls_token, blocks1\.0\.attn\.qkv"):
        convert.load_uniformer(
            model, broken | dict.fromkeys(["cls_token", "blocks1.0.attn.qkv.weight"], np.ones(3))
        )


# Tiny models of every released kind, by the name of their variant.
SMALL = {"depths": (1, 1, 2, 1), "widths": (8, 8, 32, 64), "head_width": 32}
KINDS = {
    "uniformer_s": {},
    "uniformer_s_plus": {},
    "uniformer_b_ls": {},
    "uniformer_l": {"token_labels": True},
    "uniformer_s_video": {},
}


def random_model(name, seed=0, **overrides):
    """A model with random numbers in all its arrays, statistics included."""
    model = create_model(name, num_classes=5, **(SMALL | overrides))
    rng = np.random.default_rng(seed)
    params, stats = weights.split(model)[1]
    arrays = {n: rng.normal(0, 0.3, a.shape).astype(np.float32) for n, a in (params | stats).items()}
    arrays |= {n: 1 + 0.1 * np.abs(a) for n, a in arrays.items() if n.endswith((".scale", ".var"))}
    weights.update(model, weights.like(weights.Weights(params, stats), arrays))
    return model, arrays


@pytest.mark.parametrize("name", KINDS)
def test_round_trip_to_torch_s_keys(name):
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
    """Those of variants for which no vectors exist, against the facts of the released code."""
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


def write_pth(path, content):
    torch.save(content, path)
    return str(path)


def as_tensors(arrays):
    return {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("image", "model"),
        ("video", "model_state"),
        ("image", "state_dict"),
        ("image", "state_dict_ema"),
        ("video", ""),
    ],
)
def test_vectors_through_torch_files(kind, place, tmp_path):
    """Each published shape of a file gives exactly the arrays that went in."""
    tensors = as_tensors(state_dict(kind))
    extra = {"epoch": 300, "optimizer": {"state": {}}}
    path = write_pth(tmp_path / "released.pth", {place: tensors, **extra} if place else tensors)
    source = convert.read_released(path)
    assert source.model == {"name": "uniformer_s" + "_video" * (kind == "video")}
    assert source.inputs.mean == ((0.45,) * 3 if kind == "video" else (0.485, 0.456, 0.406))
    expected = convert.from_torch(state_dict(kind))
    assert all(np.array_equal(source.arrays[name], array) for name, array in expected.items())
    assert source.arrays.keys() == expected.keys()


def test_averaged_weights_are_preferred(tmp_path):
    tensors = as_tensors(state_dict("image"))
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in tensors.items()}
    path = write_pth(tmp_path / "both.pth", {"state_dict": tensors, "state_dict_ema": averaged})
    source = convert.read_released(path)
    assert source.where.endswith("(state_dict_ema)")
    assert np.array_equal(source.arrays["head.bias"], state_dict("image")["head.bias"] + 1)


def test_safetensors_both_ways(tmp_path):
    path = str(tmp_path / "image.safetensors")
    convert.files.write(path, state_dict("image"))
    source = convert.read_released(path)
    expected = convert.from_torch(state_dict("image"))
    assert all(np.array_equal(source.arrays[name], array) for name, array in expected.items())
    with pytest.raises(UserError, match="is there already"):
        convert.files.write(path, state_dict("image"))


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_files(tmp_path):
    """One clear line each, and no code of a file runs."""
    touched = tmp_path / "touched"
    tensors = as_tensors(state_dict("image"))
    whole = Path(write_pth(tmp_path / "whole.pth", {"model": tensors})).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    deit = {"model": {"cls_token": torch.zeros(1), "blocks.0.attn.qkv.weight": torch.zeros(3, 1)}}
    cases = {
        write_pth(
            tmp_path / "malice.pth", {"model": Malice(touched)}
        ): "more than weights, which is not loaded",
        str(tmp_path / "half.pth"): "half.pth cannot be read",
        str(tmp_path / "half.safetensors"): "half.safetensors cannot be read",
        str(tmp_path / "none.pth"): "no file",
        write_pth(tmp_path / "empty.pth", {"model": {}}): "holds no weights",
        write_pth(tmp_path / "list.pth", [1, 2]): "holds no weights: a list",
        write_pth(tmp_path / "deit.pth", deit): "2 keys that no UniFormer has: cls_token",
        write_pth(tmp_path / "part.pth", {"model": {"head.weight": torch.zeros(2, 2)}}): "not a UniFormer",
    }
    for path, phrase in cases.items():
        with pytest.raises(UserError) as error:
            convert.read_released(path)
        assert phrase in str(error.value) and "\n" not in str(error.value), error.value
        assert Path(path).name in str(error.value)
    assert not touched.exists()


def released(name, classes, tmp_path, **overrides):
    """A file of a released size, all zeros."""
    model = create_model(name, num_classes=classes, **overrides)
    params, stats = weights.split(model)[1]
    path = str(tmp_path / "zeros.safetensors")
    zeros = {n: np.zeros(a.shape, np.float32) for n, a in (params | stats).items()}
    convert.files.write(path, convert.to_torch(zeros))
    return path


@pytest.mark.parametrize(
    ("name", "classes", "said", "recognised", "channels"),
    [
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
def test_recognition(name, classes, said, recognised, channels, tmp_path):
    overrides = {"token_labels": True} if "token_labels" in recognised else {}
    path = released(name, classes, tmp_path, **overrides)
    source = convert.read_released(path, **said)
    assert (source.model, source.num_classes, source.inputs.channels) == (recognised, classes, channels)
    assert source.inputs.mean[0] == (0.5 if said.get("data") == "imagenet_half" else source.inputs.mean[0])


@pytest.mark.parametrize(
    ("name", "classes", "overrides", "said", "asked"),
    [
        ("uniformer_s_plus", 1000, {}, {}, "--head_width=32"),
        ("uniformer_s", 1000, {"token_labels": True}, {}, "--head_width=32"),
        ("uniformer_s", 1000, {"token_labels": True}, {"head_width": 64}, "--data=imagenet"),
        ("uniformer_s", 10, {}, {}, "--data=NAME"),
        ("uniformer_s", 1000, {}, {"data": "imagnet"}, "Did you mean 'imagenet'"),
        ("uniformer_s", 1000, {"depths": (3, 4, 8, 4)}, {}, "no model here has blocks"),
    ],
)
def test_what_shapes_cannot_tell_is_asked_for(name, classes, overrides, said, asked, tmp_path):
    path = released(name, classes, tmp_path, **overrides)
    with pytest.raises(UserError) as error:
        convert.read_released(path, **said)
    assert asked in str(error.value)


def as_source(name, arrays, class_names=None, **overrides):
    model = {"name": name, **SMALL, **overrides}
    return convert.Source(arrays, get_variant(**model), model, 5, class_names, None, "there")


def fit(source, name, class_names=None, rules=None, num_classes=5, **overrides):
    """A model of ours with fitted weights, and what was said."""
    model = create_model(name, num_classes=num_classes, **(SMALL | overrides))
    own = weights.split(model)[1]
    fitted = convert.adapt(
        source, own.params | own.batch_stats, model.variant, class_names, rules or convert.Rules()
    )
    weights.update(model, weights.like(own, fitted.arrays))
    return model, fitted


@pytest.mark.parametrize("how", ["average", "centre"])
def test_inflation_weight_by_weight(how):
    """Every key of a rank above two is repeated over time and divided by its frames, or put on the middle."""
    flat = state_dict("image")
    model = create_model("uniformer_s_video", num_classes=1000)
    convert.load_uniformer(model, flat, inflate=how)
    params, stats = weights.split(model)[1]
    inflated = convert.to_torch({n: np.asarray(a) for n, a in (params | stats).items()})
    assert inflated.keys() == flat.keys()
    frames = {"patch_embed1.proj.weight": 3}
    for key, value in flat.items():
        if np.ndim(value) == 4:
            pointwise = re.fullmatch(r"patch_embed[234].*|.*(conv[12]|fc[12]).weight", key)
            count = 5 if key.endswith(".attn.weight") else frames.get(key, 1 if pointwise else 3)
            expected = np.zeros((*value.shape[:2], count, *value.shape[2:]), np.float32)
            for frame in range(count) if how == "average" else [count // 2]:
                expected[:, :, frame] = value / np.float32(count) if how == "average" else value
            value = expected
        assert np.array_equal(inflated[key], value), key


@pytest.mark.parametrize(
    ("name", "frames"), [("uniformer_s", 4), ("structvit_s_2_1", 1), ("structvit_s_2_1", 5)]
)
def test_a_still_clip_gives_the_image_s_logits_when_centre_inflated(name, frames):
    model, arrays = random_model(name)
    video, _ = fit(as_source(name, arrays), f"{name}_video", rules=convert.Rules(inflate="centre"))
    image = np.random.default_rng(1).standard_normal((2, 64, 64, 3)).astype(np.float32)
    clip = np.repeat(image[:, None], frames, axis=1)
    assert relative(call(video, clip), call(model, image)) <= 1e-5


@pytest.mark.parametrize("patterns", [4, 8])
@pytest.mark.parametrize(
    ("kind", "shape"), [("", (4, 64, 64, 3)), ("_video", (2, 8, 64, 96, 3))], ids=["image", "video"]
)
def test_a_structvit_starts_as_the_uniformer_that_it_came_from(kind, shape, patterns):
    key, classes = ("video", 400) if kind else ("image", 1000)
    x = inputs(shape[0], 3, *shape[1:-1])
    structvit = create_model(f"structvit_s_{patterns}_1{kind}", num_classes=classes)
    vectors = np.load(PARITY / f"uniformer_{key}.npz")["small_8x64x96/logits" if kind else "small_64/logits"]
    structure, arrays = weights.split(convert.load_uniformer(structvit, state_dict(key)))
    logits = jax.jit(lambda arrays, x: structure.model(arrays)(x))(arrays, x)
    assert relative(logits, vectors) <= 1e-5
    values = np.asarray(arrays.params["blocks3.0.attn.value_kernels"])
    assert np.ptp(values, axis=-1).max() > 0.1  # they are not equal
    np.testing.assert_allclose(values.sum(-1), patterns * _delta(values.shape[:-1]), atol=1e-5)


def _delta(shape):
    delta = np.zeros(shape, np.float32)
    delta[tuple((n - 1) // 2 for n in shape[:-2])] = 1
    return delta


def test_no_noise_is_warned_of():
    with pytest.warns(UserWarning, match="equal gradients"):
        convert.load_uniformer(
            create_model("structvit_s_4_1", num_classes=1000), state_dict("image"), noise=0
        )


def test_rules_that_keep_the_function():
    """D repeated, windows grown, kernels spread, layer scales folded or set to one: the same logits."""
    x = np.random.default_rng(2).standard_normal((2, 64, 64, 3)).astype(np.float32)
    cases = [
        ("structvit_s_2_1", {}, "structvit_s_4_1", {}, "patterns repeated, 2 to 4"),
        ("structvit_s_2_1", {}, "structvit_s_2_1", {"key_window": 5, "value_window": 7}, "larger windows"),
        ("structvit_s_2_1", {"key_kernels": "shared"}, "structvit_s_2_1", {}, "larger windows"),
        ("structvit_s_2_1", {"aggregation": "element"}, "structvit_s_2_1", {}, "larger windows"),
        ("uniformer_b_ls", {}, "uniformer_s", {}, "multiplied into the layers before them"),
        ("uniformer_l", {}, "structvit_s_3_1", {}, "multiplied into the layers before them"),
        ("uniformer_s", {}, "structvit_l_4_1", {}, "set to one"),
    ]
    for name, given, to, wanted, said in cases:
        model, arrays = random_model(name, **given)
        fitted, adapted = fit(as_source(name, arrays, **given), to, **wanted)
        assert said in " ".join(adapted.lines()), (name, to, adapted.lines())
        assert relative(fitted(x), np.asarray(model(x))) <= 1e-5, (name, to)


def test_what_cannot_be_kept_is_said():
    _, arrays = random_model("uniformer_s")
    source = as_source("uniformer_s", arrays, class_names=("a", "b", "c", "d", "e"))
    _, fitted = fit(source, "structvit_s_4_2")
    assert any("stride 2 for 1" in line for line in fitted.lines())
    _, fitted = fit(source, "uniformer_s", num_classes=3)
    assert (
        "made new, for 3 classes instead of 5: 2 arrays, 195 values: head.bias, head.kernel" in fitted.lines()
    )
    _, fitted = fit(source, "uniformer_s", class_names=("p", "q", "r", "s", "t"))
    assert any("made new, for classes of other names" in line for line in fitted.lines())
    _, arrays = random_model("structvit_s_4_1")
    _, fitted = fit(as_source("structvit_s_4_1", arrays), "structvit_s_3_1")
    assert any("made new, since (3, 3, 1, 32, 4) cannot become" in line for line in fitted.lines())
    _, fitted = fit(as_source("structvit_s_4_1", arrays), "uniformer_s")
    assert any("left out" in line for line in fitted.lines())


def test_the_head_follows_class_names():
    model, arrays = random_model("uniformer_s")
    source = as_source("uniformer_s", arrays, class_names=("a", "b", "c", "d", "e"))
    turned, _ = fit(source, "uniformer_s", class_names=("c", "a", "b", "e", "d"))
    x = np.random.default_rng(3).standard_normal((2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(call(turned, x), call(model, x)[:, [2, 0, 1, 4, 3]], rtol=1e-4, atol=1e-5)


def test_other_networks_are_refused():
    _, arrays = random_model("uniformer_s")
    source = as_source("uniformer_s", arrays)
    for name, overrides, phrase in [
        ("uniformer_s", {"depths": (1, 1, 2, 2)}, "depths (1, 1, 2, 1) for (1, 1, 2, 2)"),
        ("uniformer_s", {"head_width": 16}, "head_width 32 for 16"),
        ("uniformer_s_plus", {}, "stem patch for conv"),
    ]:
        with pytest.raises(UserError) as error:
            fit(source, name, **overrides)
        assert phrase in str(error.value)
    _, arrays = random_model("uniformer_s_video")
    with pytest.raises(UserError, match="holds a video model"):
        fit(as_source("uniformer_s_video", arrays), "uniformer_s")


def test_positions_of_deit_are_resized():
    """As the model itself does for other sizes than its own, so the logits stay."""
    small = {"depths": (1,), "widths": (32,), "head_width": 32, "patch": 8}
    model, arrays = random_model("deit_s", image_size=32, **small)
    fitted, adapted = fit(
        as_source("deit_s", arrays, image_size=32, **small), "deit_s", image_size=48, **small
    )
    assert any(line.startswith("positions resized") for line in adapted.lines())
    x = np.random.default_rng(4).standard_normal((1, 48, 48, 3)).astype(np.float32)
    assert relative(call(fitted, x), call(model, x)) <= 1e-5
