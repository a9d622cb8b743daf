"""Weights from elsewhere: parity with the released PyTorch UniFormer, files, recognition and fitting.

tests/fixtures/parity/README.md says where the vectors are from.
"""

import dataclasses
import functools
import io
import json
import os
import re
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT, structvit
from PIL import Image

from structvit_jax import convert, create_model, data
from structvit_jax.models import get_variant, weights
from structvit_jax.models.positions import resize_positions
from structvit_jax.training import loop
from structvit_jax.training.card import from_card
from structvit_jax.training.compatibility import adopt_classes
from structvit_jax.training.restore import open_checkpoint
from structvit_jax.utils import class_names
from structvit_jax.utils.errors import UserError

PARITY = ROOT / "tests" / "fixtures" / "parity"


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
        "head.kernel would be re-initialised, for 1000 classes instead of 400",
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
    weights.update(model, weights.cast_like(weights.Weights(params, stats), arrays))
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


def test_the_weights_that_the_release_evaluates_are_taken(tmp_path):
    """The image program evaluates "model", the token-labelling scripts "state_dict": never the average."""
    tensors = as_tensors(state_dict("image"))
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in tensors.items()}
    bias = state_dict("image")["head.bias"]
    for raw, average in [("model", "model_ema"), ("state_dict", "state_dict_ema")]:
        path = write_pth(tmp_path / "both.pth", {average: averaged, raw: tensors})
        source = convert.read_released(path)
        assert source.where.endswith(f"({raw})") and np.array_equal(source.arrays["head.bias"], bias)
        assert f"{raw!r}, the raw ones; the file also holds {average!r}" in source.notes[0]
        source = convert.read_released(path, which="ema")
        assert source.where.endswith(f"({average})") and np.array_equal(source.arrays["head.bias"], bias + 1)
    alone = write_pth(tmp_path / "alone.pth", {"model_ema": averaged})
    assert np.array_equal(convert.read_released(alone).arrays["head.bias"], bias + 1)
    with pytest.raises(UserError, match=r"has no raw weights \(it has 'model_ema'\)"):
        convert.read_released(alone, which="raw")


def test_a_loaded_model_shares_no_memory_with_the_state_dict():
    given = {key: np.array(array) for key, array in state_dict("image").items()}
    model = convert.load_uniformer(create_model("uniformer_s", num_classes=1000), given)
    before = weights.sha256(weights.split(model)[1])
    for array in given.values():
        array[...] = 0
    assert weights.sha256(weights.split(model)[1]) == before


def test_safetensors_both_ways(tmp_path):
    path = str(tmp_path / "image.safetensors")
    convert.files.write(path, state_dict("image"))
    source = convert.read_released(path)
    expected = convert.from_torch(state_dict("image"))
    assert all(np.array_equal(source.arrays[name], array) for name, array in expected.items())
    umask = os.umask(0)
    os.umask(umask)
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_describe_themselves(suffix, tmp_path):
    """What a checkpoint knows comes back from the file without a flag."""
    options = {"value_window": 1, "head_width": 16}
    model, arrays = random_model("structvit_s_4_2", depths=(3, 4, 8, 3), **options)
    inputs = convert.Inputs((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bgr")
    names = ("one", "zwei", "trois", "四", "<b>")
    arguments = {"name": "structvit_s_4_2", "widths": (8, 8, 32, 64), **options, "remat": "full"}
    description = convert.Description(arguments, names, inputs)
    path = str(tmp_path / f"weights{suffix}")
    convert.files.write(path, convert.to_torch(arrays), description.as_plain("1.2.3"))
    source = convert.read_released(path)
    assert source.variant == model.variant and source.inputs == inputs and source.class_names == names
    assert "remat" not in source.model  # how a program runs is not the file's to decide
    assert all(np.array_equal(source.arrays[name], array) for name, array in arrays.items())


def test_a_description_is_validated(tmp_path):
    _, arrays = random_model("structvit_s_4_2", depths=(3, 4, 8, 3))
    arguments = {"name": "structvit_s_4_2", "widths": (8, 8, 32, 64), "head_width": 32}
    good = convert.Description(arguments, None, None).as_plain("1")
    path = str(tmp_path / "weights.safetensors")
    for change, phrase in [
        ([], "is no mapping"),
        ({"model": {"name": 3}}, "no string"),
        ({"model": {"name": "x" * 1000}}, "no number, word or short list"),
        ({"model": {**arguments, "name": "structvit_s_8_2"}}, "structure_dim 8, and its arrays have 4"),
        ({"model": {**arguments, "patch": 10**9}}, "patch is 1000000000; it takes a positive integer up to"),
        ({"model": {**arguments, "key_window": [999] * 2}}, r"key_window \(999, 999\)"),
        ({"model": {**arguments, "widths": [[]]}}, "no number, word or short list"),
        ({"class_names": ["a"]}, "1 class names for 5 classes"),
        ({"class_names": ["a"] * 5}, "'a' is there more than once"),
        ({"class_names": {"a": 1}}, "no list of strings"),
        ({"inputs": {"mean": [0, 0, 0], "std": [0, 1, 1], "channels": "rgb"}}, "needs mean, std"),
        ({"inputs": {"mean": [0, 0, 0], "std": [1, 1, 1], "channels": "/etc"}}, "needs mean, std"),
        ({"inputs": 3}, "needs mean, std"),
    ]:
        plain = {**good, **change} if isinstance(change, dict) else change
        convert.files.write(path, convert.to_torch(arrays), plain)
        with pytest.raises(UserError, match=phrase) as error:
            convert.read_released(path)
        assert "weights.safetensors: " in str(error.value) and "\n" not in str(error.value)


def test_the_command_names_classes(tmp_path):
    path, labels = released("uniformer_tiny", 10, tmp_path), tmp_path / "labels.txt"
    labels.write_bytes("\ufeffa\r\nb \n\n".encode() + "".join(f"class {i}\n" for i in range(8)).encode())
    named, again = (str(tmp_path / name) for name in ("named.safetensors", "again.pth"))
    structvit("convert", path, named, "--data=imagenet", f"--labels={labels}")
    structvit("convert", named, again)  # without a flag
    names = convert.read_released(again).class_names
    assert names is not None and names[:3] == ("a", "b", "class 0")
    for content, phrase in [
        (b"a\nb\n", "labels.txt does not fit .*: there are 2 class names for 10 classes"),
        (b"a\n" * 10, "'a' is there more than once"),
        (b"\xff\xfea", "labels.txt is not UTF-8 text"),
    ]:
        labels.write_bytes(content)
        with pytest.raises(UserError, match=phrase):
            structvit("convert", named, str(tmp_path / "x.pth"), f"--labels={labels}")
    with pytest.raises(UserError, match="cannot read --labels"):
        structvit("convert", named, str(tmp_path / "x.pth"), f"--labels={tmp_path}")
    for taken in (named, "/dev/null"):  # refused before the source is opened
        with pytest.raises(UserError, match="already exists"):
            structvit("convert", str(tmp_path / "nothing.pth"), taken)


def test_what_is_created_appears_whole_or_not_at_all(tmp_path):
    new = tmp_path / "folder" / "new"
    left = tmp_path / "folder" / ".part-new"
    left.mkdir(parents=True)
    (left / "of_a_killed_process").touch()
    with convert.files.create(str(new)) as place:
        assert not left.exists()
        Path(place).mkdir()
        (Path(place) / "file").touch()
        assert not new.exists()
    assert [path.name for path in new.iterdir()] == ["file"] and not left.exists()
    with pytest.raises(ZeroDivisionError), convert.files.create(str(tmp_path / "other.pth")) as place:
        Path(place).touch()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "nothing")
    for taken in (str(new), "/dev/null", str(tmp_path / "dangling.pth")):
        with pytest.raises(UserError, match="already exists; choose another"), convert.files.create(taken):
            raise AssertionError
    for unwritable in (str(new / "file" / "x.pth"), "/proc/x.pth", str(tmp_path / ("x" * 300))):
        with pytest.raises(UserError, match="cannot be written"), convert.files.create(unwritable):
            raise AssertionError


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
    (tmp_path / "text.pth").write_text("Not found")
    (tmp_path / "packed.pth").write_bytes(packed(whole))
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "script.pth")
    deit = {"model": {"cls_token": torch.zeros(1), "blocks.0.attn.qkv.weight": torch.zeros(3, 1)}}
    one = torch.zeros(4, 4)
    odd = {
        "keys": ({3: one}, "its keys are not strings, as '3'"),
        "sparse": ({"a": one.to_sparse()}, "a holds a sparse tensor; save dense tensors"),
        "quantised": (
            {"a": torch.quantize_per_tensor(one, 1.0, 0, torch.qint8)},
            "a holds quantised numbers",
        ),
        "meta": ({"a": one.to("meta")}, "a holds a tensor without numbers"),
        "tiny": ({"a": one.to(torch.float8_e4m3fn)}, "a holds float8_e4m3fn numbers"),
        "complex": ({"a": one.to(torch.complex64)}, "a holds complex64 numbers"),
        "integers": ({"head.weight": one.to(torch.int8)}, "head.weight holds int8 numbers"),
        "expanded": ({"a": torch.zeros(1).expand(10**7, 10**7)}, "more than the file"),
        "object": ({"a": 3}, "a is no tensor"),
    }
    malice = write_pth(tmp_path / "malice.pth", {"model": Malice(touched)})
    old = str(tmp_path / "old.pth")
    torch.save({"model": Malice(touched)}, old, _use_new_zipfile_serialization=False)
    cases = {
        malice: "it holds more than weights, which is not loaded: getattr",
        old: "it holds more than weights, which is not loaded: getattr",
        str(tmp_path / "half.pth"): "half.pth cannot be read: it is damaged",
        str(tmp_path / "text.pth"): "it is damaged, or not a file of PyTorch weights alone",
        str(tmp_path / "packed.pth"): "a compressed archive",
        str(tmp_path / "script.pth"): "or a TorchScript program; save a state_dict()",
        str(tmp_path / "none.pth"): "no file",
        write_pth(tmp_path / "empty.pth", {"model": {}}): "holds no weights",
        write_pth(tmp_path / "list.pth", [1, 2]): "holds no weights: a list",
        write_pth(tmp_path / "deit.pth", deit): "2 keys that no UniFormer has: cls_token",
        write_pth(tmp_path / "part.pth", {"model": {"head.weight": torch.zeros(2, 2)}}): "not a UniFormer",
    } | {write_pth(tmp_path / f"{name}.pth", content): said for name, (content, said) in odd.items()}
    for path, phrase in cases.items():
        with pytest.raises(UserError) as error:
            convert.read_released(path)
        assert phrase in str(error.value) and "\n" not in str(error.value), error.value
        assert Path(path).name in str(error.value) and "weights_only" not in str(error.value)
    assert not touched.exists()


def packed(archive):
    """The same archive with its records compressed."""
    target = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as source,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as copy,
    ):
        for record in source.namelist()[:3]:
            copy.writestr(record, source.read(record))
    return target.getvalue()


def tensor(dtype, shape, end):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


@pytest.mark.parametrize(
    ("header", "data", "phrase"),
    [
        (b"{", 0, "cannot be read"),
        (b"[" * 10**5 + b"]" * 10**5, 0, "cannot be read"),
        (tensor("F32", [10**6, 10**6], 16), 16, "cannot be read"),
        (tensor("F32", [2**40, 2**40], 16), 16, "cannot be read"),
        (tensor("F32", [4], 16), 8, "cannot be read"),
        (tensor("F8_E4M3", [4], 4), 4, "a holds F8_E4M3 numbers; save dense tensors"),
        (tensor("F4", [8], 4), 4, "a holds F4 numbers"),
        (tensor("F6_E2M3", [4], 3), 3, "a holds F6_E2M3 numbers"),
        (tensor("C64", [1], 8), 8, "a holds C64 numbers"),
        (tensor("F32", [10**12, 0], 0), 0, "no UniFormer has: a"),
        ({}, 0, "it is empty"),
        ({"__metadata__": {"structvit_jax": "[" * 10**5}, **tensor("F32", [1], 4)}, 4, "is not valid JSON"),
    ],
)
def test_bad_headers_of_safetensors(header, data, phrase, tmp_path):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    with pytest.raises(UserError) as error:
        convert.read_released(str(path))
    assert phrase in str(error.value) and "\n" not in str(error.value), error.value
    assert "bad.safetensors" in str(error.value)


def test_half_precision_is_read_as_single(tmp_path):
    path = tmp_path / "half.safetensors"
    header = json.dumps(tensor("BF16", [2], 4)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f\x00\xc0")
    (array,) = convert.files.read(str(path)).arrays.values()
    assert array.dtype == np.float32 and array.tolist() == [1.0, -2.0]


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
        (("a", "A"), ("a", "(a)")),  # not distinct but for spelling
        (("-1", "1"), ("(1)", "1")),
    ]:
        assert class_names.match(names, others) is None
    assert class_names.match(("a", "A"), ("A", "a")) == [1, 0]
    assert class_names.difference(("a b", "c"), ("A_b", "d")) == ("'d'", "'c'")


def released(name, classes, tmp_path, random=False, **overrides):
    """A file of a released size, all zeros or random numbers."""
    model = create_model(name, num_classes=classes, **overrides)
    params, stats = weights.split(model)[1]
    path, rng = str(tmp_path / "released.safetensors"), np.random.default_rng(0)
    fill = rng.standard_normal if random else np.zeros
    arrays = {n: fill(a.shape).astype(np.float32) for n, a in (params | stats).items()}
    convert.files.write(path, convert.to_torch(arrays))
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
    weights.update(model, weights.cast_like(own, fitted.arrays))
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
    x = np.random.default_rng(2).standard_normal((1, 64, 64, 3)).astype(np.float32)
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
        "re-initialised, for 3 classes instead of 5: 2 arrays, 195 values: head.bias, head.kernel"
        in fitted.lines()
    )
    _, fitted = fit(source, "uniformer_s", class_names=("p", "q", "r", "s", "t"))
    assert any("re-initialised, for classes of other names" in line for line in fitted.lines())
    _, arrays = random_model("structvit_s_4_1")
    _, fitted = fit(as_source("structvit_s_4_1", arrays), "structvit_s_3_1")
    assert any("re-initialised, since (3, 3, 1, 32, 4) cannot become" in line for line in fitted.lines())
    _, fitted = fit(as_source("structvit_s_4_1", arrays), "uniformer_s")
    assert any("left out" in line for line in fitted.lines())


def test_the_head_follows_class_names():
    model, arrays = random_model("uniformer_s")
    source = as_source("uniformer_s", arrays, class_names=("a", "b", "c", "d", "e"))
    turned, _ = fit(source, "uniformer_s", class_names=("c", "a", "b", "e", "d"))
    x = np.random.default_rng(3).standard_normal((2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(call(turned, x), call(model, x)[:, [2, 0, 1, 4, 3]], rtol=1e-4, atol=1e-5)


def test_a_released_head_takes_the_order_of_the_data(tmp_path):
    path = released("uniformer_tiny_video", 400, tmp_path, random=True)
    source = convert.read_released(path)
    assert any("Kinetics-400" in note for note in source.notes)
    model = create_model("uniformer_tiny_video", num_classes=400)
    fresh = weights.split(model)[1]
    own = fresh.params | fresh.batch_stats
    names = sorted(source.class_names)  # as structvit_jax.data.prepare has them
    adapted = convert.adapt(source, own, model.variant, names, convert.Rules())
    bias = dict(zip(source.class_names, source.arrays["head.bias"], strict=True))
    assert adapted.arrays["head.bias"].tolist() == [bias[name] for name in names]
    assert "reordered by class name: 2 arrays" in "\n".join(adapted.lines())
    adapted = convert.adapt(source, own, model.variant, None, convert.Rules())
    assert np.array_equal(adapted.arrays["head.bias"], source.arrays["head.bias"])
    unnamed = dataclasses.replace(source, class_names=None)
    numbers = tuple(map(str, range(400)))
    for kept, said in [
        (source, "warning: the head is not kept: the weights have 400 classes of other names than the data"),
        (unnamed, "does not name its 400 classes. To keep it, name them with"),
    ]:
        adapted = convert.adapt(kept, own, model.variant, numbers, convert.Rules())
        assert said in "\n".join(adapted.lines())
        assert np.array_equal(adapted.arrays["head.bias"], own["head.bias"])


def test_a_released_head_scores_on_prepared_data(tmp_path, capsys):
    """Each clip of a class has a colour of its own, and the head names it in the released order."""
    names = list(convert.RELEASED["something"].class_names())
    colours = np.random.default_rng(0).permutation(np.stack(np.mgrid[:6, :6, :6], -1).reshape(-1, 3) * 51)
    labels = [f'"{name}"' if "," in name else name for name in reversed(names)]
    stem = tmp_path / "something-something-v1"
    Path(f"{stem}-labels.csv").write_text("".join(f"{label}\n" for label in labels))
    rows = "".join(f"{number};{label}\n" for number, label in enumerate(labels))
    for split in ("train", "validation"):
        Path(f"{stem}-{split}.csv").write_text(rows)
    for number in range(174):
        folder = tmp_path / "frames" / str(number)
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), tuple(map(int, colours[number]))).save(folder / "00001.png")
    frames, out = str(tmp_path / "frames"), str(tmp_path / "lists")
    assert structvit("prepare", "something_v1", str(tmp_path), frames, "--out", out) == 0

    model = create_model("uniformer_tiny_video", num_classes=174)
    pixels = np.broadcast_to(colours[:174, None, None, None, ::-1], (174, 2, 32, 32, 3))
    features = np.asarray(model.pooled(((pixels / 255 - 0.45) / 0.225).astype(np.float32)))[::-1]
    centre, scale = features.mean(0), 1e4 / features.std()
    features = scale * (features - centre)  # the nearest class by squared distance
    params, stats = weights.split(model)[1]
    params["head.kernel"] = (scale * features).T
    params["head.bias"] = -scale * features @ centre - (features**2).sum(1) / 2
    path, folder = str(tmp_path / "released.safetensors"), tmp_path / "converted"
    convert.files.write(path, convert.to_torch({n: np.asarray(a) for n, a in (params | stats).items()}))
    structvit("convert", path, str(folder))
    assert "class names: those of Something-Something" in capsys.readouterr().out

    with open_checkpoint(str(folder)) as (checkpoints, step):
        config = from_card(checkpoints.card(step)["config"], "card")
    config.data.update(root=out, size=32, short_side=0, frames=2, test_clips=1, test_crops=1, workers=0)
    config.eval.batch_size = 88
    loop.evaluate(config, folder, tmp_path / "out", data.load(config.data, config.augment))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["top1"] == 1
    card = checkpoints.card(step) | {"class_names": None}
    with pytest.raises(UserError, match="the checkpoint does not name its classes"):
        adopt_classes(data.load(config.data, config.augment), card)


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


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((14, 14), (7, 10)), ((1, 3), (4, 3))])
def test_positions_are_resized_as_in_torch(old, new):
    given = np.random.default_rng(0).standard_normal((*old, 8)).astype(np.float32)
    planes = torch.from_numpy(given).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(planes, size=new, mode="bicubic", align_corners=False)
    assert relative(resize_positions(given, new), theirs[0].permute(1, 2, 0).numpy()) <= 1e-5


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
