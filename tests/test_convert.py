"""Parity with the released PyTorch UniFormer; tests/data/parity/README.md says where the vectors are from."""

import functools
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from structvit_jax import convert, create_model
from structvit_jax.errors import UserError
from structvit_jax.models import weights

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
    return f"small_64_train/{convert.torch_key(name.split('.'))}"


def test_every_misfit_is_reported_at_once_and_changes_nothing():
    model = create_model("uniformer_s", num_classes=1000)
    before = weights.sha256(weights.split(model)[1])
    broken = dict(state_dict("image"))
    del broken["blocks3.0.attn.qkv.bias"]
    broken["aux_head.weight"] = np.zeros((1000, 512), np.float32)
    broken["head.weight"] = np.zeros((400, 512), np.float32)
    with pytest.raises(UserError) as error:
        convert.load_uniformer(model, broken)
    for phrase in (
        "3 keys",
        "missing blocks3.0.attn.qkv.bias",
        "extra aux_head.weight",
        "misshapen head.weight",
    ):
        assert phrase in str(error.value)
    assert weights.sha256(weights.split(model)[1]) == before


def test_conv_stem_and_layer_scale_keys():
    """The keys of variants for which no vectors exist, against the facts of the released code."""
    plus = {convert.torch_key(name.split(".")) for name in _names("uniformer_s_plus")}
    assert {f"patch_embed1.proj.{i}.weight" for i in (0, 1, 3, 4)} <= plus
    assert {"patch_embed2.proj.0.bias", "patch_embed4.proj.1.running_var", "patch_embed1.proj.4.bias"} <= plus
    assert not any(key.startswith("patch_embed") and ".norm." in key for key in plus)
    scaled = {convert.torch_key(name.split(".")) for name in _names("uniformer_b_ls")}
    assert "blocks4.6.gamma_2" in scaled and "blocks1.0.gamma_1" not in scaled
    assert "blocks1.0.gamma_1" in {convert.torch_key(name.split(".")) for name in _names("uniformer_l")}


def test_scales_of_the_token_labelling_model_are_flattened():
    small = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "head_width": 8}
    model = create_model("uniformer_l", num_classes=3, **small)
    arrays = weights.split(model)[1]
    torch = {
        convert.torch_key(n.split(".")): _to_torch(n, a)
        for n, a in (arrays.params | arrays.batch_stats).items()
    }
    torch["blocks1.0.gamma_1"] = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1)
    convert.load_uniformer(model, torch)
    assert (np.asarray(model.blocks1[0].gamma_1[...]) == np.arange(8)).all()


def _to_torch(name, array):
    array = np.asarray(array)
    if array.ndim > 1:
        array = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    if ".fc" in name and ("blocks1" in name or "blocks2" in name) and array.ndim == 2:
        array = array[:, :, None, None]
    return array


def _names(name):
    arrays = weights.split(create_model(name, num_classes=10, widths=(8, 8, 64, 64), head_width=32))[1]
    return [*arrays.params, *arrays.batch_stats]
