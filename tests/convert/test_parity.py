"""Parity with the released PyTorch UniFormer, by vectors that it has computed."""

import functools
import re

import jax
import numpy as np
import pytest
import torch
from convert_helpers import PARITY, relative, state_dict

from structvit_jax import convert, create_model
from structvit_jax.models import weights
from structvit_jax.models.positions import resize_positions
from structvit_jax.utils.errors import UserError


def inputs(*shape):
    """Return noise of the shape [B, 3, ...] with channels last."""
    return np.moveaxis(np.random.default_rng(0).standard_normal(shape).astype(np.float32), 1, -1)


@functools.cache
def uniformer(kind, classes):
    name = "uniformer_s" + "_video" * (kind == "video")
    return convert.load_uniformer(create_model(name, num_classes=classes, seed=None), state_dict(kind))


@pytest.mark.parametrize(
    ("tag", "kind", "shape", "classes"),
    [
        ("small_224", "image", (1, 3, 224, 224), 1000),
        ("small_64", "image", (4, 3, 64, 64), 1000),
        ("small_8x64x96", "video", (2, 3, 8, 64, 96), 400),
    ],
)
def test_evaluation(tag, kind, shape, classes):
    vectors = np.load(PARITY / f"uniformer_{kind}.npz")
    structure, arrays = weights.split(uniformer(kind, classes))

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
    model = create_model("uniformer_s", num_classes=1000, seed=None, drop_path=0.0)
    convert.load_uniformer(model, state_dict("image")).train()
    structure, arrays = weights.split(model)

    @jax.jit
    def run(arrays, x):
        model = structure.model(arrays)
        return model(x), weights.batch_stats(model)

    logits, stats = run(arrays, inputs(4, 3, 64, 64))
    assert relative(logits, vectors["small_64_train/logits"]) <= 5e-5
    state = convert.to_torch({name: np.asarray(array) for name, array in (arrays.params | stats).items()})
    compared = {key: vectors[tag] for key in state if (tag := f"small_64_train/{key}") in vectors}
    assert len(compared) == 6
    for key, expected in compared.items():
        assert relative(state[key], expected) <= 5e-5, key


def test_all_misfits_are_reported_at_once_and_the_model_is_unchanged():
    model = create_model("uniformer_s", num_classes=1000, seed=None)
    before = weights.sha256(weights.split(model)[1])
    broken = dict(state_dict("image"))
    del broken["blocks3.0.attn.qkv.bias"]
    broken["aux_head.weight"] = np.zeros((1000, 512), np.float32)
    broken["head.weight"], broken["head.bias"] = np.zeros((400, 512), np.float32), np.zeros(400, np.float32)
    broken["blocks1.0.norm1.weight"] = np.zeros(32, np.float32)
    with pytest.raises(UserError) as error:
        convert.load_uniformer(model, broken)
    for phrase in (
        "arrays that do not fit (5): ",
        "missing blocks3.0.attn.qkv.bias",
        "extra aux_head.kernel",
        "head.kernel would be re-initialised, for 1000 classes instead of 400",
        "misshapen blocks1.0.norm1.scale: its shape is (32,), not (64,)",
    ):
        assert phrase in str(error.value)
    assert weights.sha256(weights.split(model)[1]) == before
    broken |= dict.fromkeys(["cls_token", "blocks1.0.attn.qkv.weight"], np.ones(3))
    with pytest.raises(UserError, match=r"no UniFormer has \(2\): cls_token, blocks1\.0\.attn\.qkv\.weight"):
        convert.load_uniformer(model, broken)


def test_a_loaded_model_shares_no_memory_with_the_state_dict():
    given = {key: np.array(array) for key, array in state_dict("image").items()}
    model = convert.load_uniformer(create_model("uniformer_s", num_classes=1000, seed=None), given)
    before = weights.sha256(weights.split(model)[1])
    for array in given.values():
        array[...] = 0
    assert weights.sha256(weights.split(model)[1]) == before


@pytest.mark.parametrize(
    ("kind", "name", "shape", "vector"),
    [
        ("image", "structvit_s_8_1", (4, 3, 64, 64), "small_64/logits"),
        ("video", "structvit_s_4_1_video", (2, 3, 8, 64, 96), "small_8x64x96/logits"),
    ],
)
def test_a_structvit_starts_as_the_uniformer_that_it_came_from(kind, name, shape, vector):
    x, vectors = inputs(*shape), np.load(PARITY / f"uniformer_{kind}.npz")[vector]
    structvit = create_model(name, num_classes=vectors.shape[-1], seed=None)
    structure, arrays = weights.split(convert.load_uniformer(structvit, state_dict(kind)))
    logits = jax.jit(lambda arrays, x: structure.model(arrays)(x))(arrays, x)
    assert relative(logits, vectors) <= 1e-5
    values = np.asarray(arrays.params["blocks3.0.attn.value_kernels"])
    assert np.ptp(values, axis=-1).max() > 0.1  # they are not equal
    np.testing.assert_allclose(values.sum(-1), values.shape[-1] * _delta(values.shape[:-1]), atol=1e-5)


def _delta(shape):
    delta = np.zeros(shape, np.float32)
    delta[tuple((n - 1) // 2 for n in shape[:-2])] = 1
    return delta


def test_a_warning_without_noise():
    model = create_model("structvit_s_4_1", num_classes=1000, seed=None)
    with pytest.warns(UserWarning, match="equal gradients"):
        convert.load_uniformer(model, state_dict("image"), noise=0)


@pytest.mark.parametrize("how", ["average", "centre"])
def test_inflation_weight_by_weight(how):
    """Kernels are repeated over time and divided by the number of frames, or put on the middle frame."""
    flat = state_dict("image")
    model = create_model("uniformer_s_video", num_classes=1000, seed=None)
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


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((14, 14), (7, 10)), ((1, 3), (4, 3))])
def test_positions_are_resized_as_in_torch(old, new):
    given = np.random.default_rng(0).standard_normal((*old, 8)).astype(np.float32)
    planes = torch.from_numpy(given).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(planes, size=new, mode="bicubic", align_corners=False)
    assert relative(resize_positions(given, new), theirs[0].permute(1, 2, 0).numpy()) <= 1e-5
