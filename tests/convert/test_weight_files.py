"""Read, refuse and create files of PyTorch weights."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_helpers import as_tensors, random_model, tiny, write_pth

from structvit_jax import convert
from structvit_jax.utils.errors import UserError


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
def test_weights_in_every_published_layout_of_a_file(kind, place, tmp_path):
    name, classes = ("uniformer_tiny_video", 400) if kind == "video" else ("uniformer_tiny", 1000)
    state_dict = tiny(name, classes)
    tensors = as_tensors(state_dict)
    extra = {"epoch": 300, "optimizer": {"state": {}}}
    path = write_pth(tmp_path / "released.pth", {place: tensors, **extra} if place else tensors)
    source = convert.read_released(path)
    assert source.model == {"name": name}
    assert source.inputs.mean == ((0.45,) * 3 if kind == "video" else (0.485, 0.456, 0.406))
    expected = convert.from_torch(state_dict)
    assert all(np.array_equal(source.arrays[name], array) for name, array in expected.items())
    assert source.arrays.keys() == expected.keys()


def test_the_weights_that_the_release_evaluates_are_taken(tmp_path):
    """The image program evaluates "model", the token-labelling scripts "state_dict"; neither the average."""
    state_dict = tiny("uniformer_tiny")
    tensors = as_tensors(state_dict)
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in tensors.items()}
    bias = state_dict["head.bias"]
    for raw, average in [("model", "model_ema"), ("state_dict", "state_dict_ema")]:
        path = write_pth(tmp_path / "both.pth", {average: averaged, raw: tensors})
        source = convert.read_released(path)
        assert source.where.endswith(f"({raw})") and np.array_equal(source.arrays["head.bias"], bias)
        assert f"{raw!r} (raw); the file also holds {average!r} (averaged)" in source.notes[0]
        source = convert.read_released(path, which="ema")
        assert source.where.endswith(f"({average})") and np.array_equal(source.arrays["head.bias"], bias + 1)
    alone = write_pth(tmp_path / "alone.pth", {"model_ema": averaged})
    assert np.array_equal(convert.read_released(alone).arrays["head.bias"], bias + 1)
    with pytest.raises(UserError, match=r"has no raw weights \(it holds 'model_ema'\)"):
        convert.read_released(alone, which="raw")


def test_safetensors_both_ways(tmp_path):
    path = str(tmp_path / "image.safetensors")
    state_dict = tiny("uniformer_tiny")
    convert.weight_files.write(path, state_dict)
    source = convert.read_released(path)
    expected = convert.from_torch(state_dict)
    assert all(np.array_equal(source.arrays[name], array) for name, array in expected.items())
    umask = os.umask(0)
    os.umask(umask)
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_describe_themselves(suffix, tmp_path):
    """Model, class names and inputs come back from the file without an option."""
    options = {"value_window": 1, "head_width": 16}
    model, arrays = random_model("structvit_s_4_2", depths=(3, 4, 8, 3), **options)
    inputs = convert.Inputs((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bgr")
    names = ("one", "zwei", "trois", "四", "<b>")
    arguments = {"name": "structvit_s_4_2", "widths": (8, 8, 32, 64), **options, "remat": "full"}
    description = convert.Description(arguments, names, inputs)
    path = str(tmp_path / f"weights{suffix}")
    convert.weight_files.write(path, convert.to_torch(arrays), description.as_plain("1.2.3"))
    source = convert.read_released(path)
    assert source.variant == model.variant and source.inputs == inputs and source.class_names == names
    assert "remat" not in source.model  # a file does not decide how a program runs
    assert all(np.array_equal(source.arrays[name], array) for name, array in arrays.items())


def test_a_description_is_validated(tmp_path):
    _, arrays = random_model("structvit_s_4_2", depths=(3, 4, 8, 3))
    arguments = {"name": "structvit_s_4_2", "widths": (8, 8, 32, 64), "head_width": 32}
    good = convert.Description(arguments, None, None).as_plain("1")
    path = str(tmp_path / "weights.safetensors")
    for change, phrase in [
        ([], "is not a mapping"),
        ({"model": {"name": 3}}, "is not a string"),
        ({"model": {"name": "x" * 1000}}, "not a number, short string or short list"),
        (
            {"model": {**arguments, "name": "structvit_s_8_2"}},
            "structure_dim is 8 in its description, but 4 in its arrays",
        ),
        ({"model": {**arguments, "patch": 10**9}}, "patch is 1000000000; it takes a positive integer up to"),
        ({"model": {**arguments, "key_window": [999] * 2}}, r"key_window is \(999, 999\)"),
        ({"model": {**arguments, "widths": [[]]}}, "not a number, short string or short list"),
        ({"class_names": ["a"]}, "1 class names for 5 classes"),
        ({"class_names": ["a"] * 5}, "'a' occurs more than once"),
        ({"class_names": {"a": 1}}, "not a list of strings"),
        ({"inputs": {"mean": [0, 0, 0], "std": [0, 1, 1], "channels": "rgb"}}, "need mean, std"),
        ({"inputs": {"mean": [0, 0, 0], "std": [1, 1, 1], "channels": "/etc"}}, "need mean, std"),
        ({"inputs": 3}, "need mean, std"),
    ]:
        plain = {**good, **change} if isinstance(change, dict) else change
        convert.weight_files.write(path, convert.to_torch(arrays), plain)
        with pytest.raises(UserError, match=phrase) as error:
            convert.read_released(path)
        assert "weights.safetensors: " in str(error.value) and "\n" not in str(error.value)


def test_files_are_created_completely_or_not_at_all(tmp_path):
    new = tmp_path / "folder" / "new"
    left = tmp_path / "folder" / ".part-new"
    left.mkdir(parents=True)
    (left / "of_a_killed_process").touch()
    with convert.weight_files.create(str(new)) as place:
        assert not left.exists()
        Path(place).mkdir()
        (Path(place) / "file").touch()
        assert not new.exists()
    assert [path.name for path in new.iterdir()] == ["file"] and not left.exists()
    with pytest.raises(ZeroDivisionError), convert.weight_files.create(str(tmp_path / "other.pth")) as place:
        Path(place).touch()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "nothing")
    for taken in (str(new), "/dev/null", str(tmp_path / "dangling.pth")):
        with (
            pytest.raises(UserError, match="already exists; choose another"),
            convert.weight_files.create(taken),
        ):
            raise AssertionError
    for unwritable in (str(new / "file" / "x.pth"), "/proc/x.pth", str(tmp_path / ("x" * 300))):
        with pytest.raises(UserError, match="cannot be written"), convert.weight_files.create(unwritable):
            raise AssertionError


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_files(tmp_path):
    """Each gives one line, and no code in a file is run."""
    touched = tmp_path / "touched"
    tensors = as_tensors(tiny("uniformer_tiny"))
    whole = Path(write_pth(tmp_path / "whole.pth", {"model": tensors})).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("Not found")
    (tmp_path / "packed.pth").write_bytes(packed(whole))
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "script.pth")
    deit = {"model": {"cls_token": torch.zeros(1), "blocks.0.attn.qkv.weight": torch.zeros(3, 1)}}
    one = torch.zeros(4, 4)
    odd = {
        "keys": ({3: one}, "its keys are not strings, such as '3'"),
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
        "object": ({"a": 3}, "a is not a tensor"),
    }
    malice = write_pth(tmp_path / "malice.pth", {"model": Malice(touched)})
    old = str(tmp_path / "old.pth")
    torch.save({"model": Malice(touched)}, old, _use_new_zipfile_serialization=False)
    cases = {
        malice: "it holds objects other than weights, which are not loaded: getattr",
        old: "it holds objects other than weights, which are not loaded: getattr",
        str(tmp_path / "half.pth"): "half.pth cannot be read: it is damaged",
        str(tmp_path / "text.pth"): "it is damaged, or holds something other than PyTorch weights",
        str(tmp_path / "packed.pth"): "a compressed archive",
        str(tmp_path / "script.pth"): "or a TorchScript program; save a state_dict()",
        str(tmp_path / "none.pth"): "no file",
        write_pth(tmp_path / "empty.pth", {"model": {}}): "holds no weights",
        write_pth(tmp_path / "list.pth", [1, 2]): "holds no weights: a list",
        write_pth(tmp_path / "deit.pth", deit): "keys that no UniFormer has (2): cls_token",
        write_pth(tmp_path / "part.pth", {"model": {"head.weight": torch.zeros(2, 2)}}): "not a UniFormer",
        write_pth(tmp_path / "stem.pth", {"model": tensors | {"patch_embed1.proj.weight": one}}): (
            "not a UniFormer"
        ),
    } | {write_pth(tmp_path / f"{name}.pth", content): message for name, (content, message) in odd.items()}
    for path, phrase in cases.items():
        with pytest.raises(UserError) as error:
            convert.read_released(path)
        assert phrase in str(error.value) and "\n" not in str(error.value), error.value
        assert Path(path).name in str(error.value) and "weights_only" not in str(error.value)
    assert not touched.exists()


def packed(archive):
    """Return the same archive with compressed records."""
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
        (tensor("F32", [10**12, 0], 0), 0, "no UniFormer has (1): a"),
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
    (array,) = convert.weight_files.read(str(path)).arrays.values()
    assert array.dtype == np.float32 and array.tolist() == [1.0, -2.0]
