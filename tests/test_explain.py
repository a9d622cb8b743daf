"""Pictures show what the model computes: its own maps, which give the layer's output."""

import base64
import functools
import io
import json
import re

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from structvit_jax import create_model, data
from structvit_jax.config import default_config
from structvit_jax.errors import UserError
from structvit_jax.explain import layers, page, picture, query_maps
from structvit_jax.explain.maps import position_of, textured
from structvit_jax.models import StructAttention
from structvit_jax.training import loop

EXPLAIN = {"module": "structvit_jax.explain.__main__"}
SMALL = {"widths": (8, 8, 16, 16), "head_width": 8, "depths": (1, 1, 1, 1)}
MODELS = {
    "deit_tiny_struct_2_video": ({"widths": (16,), "head_width": 8}, (4, 24, 24)),
    "structvit_tiny_3_2_video": (SMALL | {"key_kernels": "shared"}, (4, 40, 48)),
    "structvit_tiny_2_1": (SMALL | {"aggregation": "element", "key_window": 5}, (48, 56)),
    "structvit_tiny_1_1": (SMALL | {"value_kernels": "shared"}, (48, 48)),
    "uniformer_tiny_video": (SMALL | {"depths": (1, 1, 2, 1), "scan_blocks": True}, (2, 32, 32)),
}


@functools.cache
def example(name):
    """A network, an input, and its layers."""
    network, shape = build(name), MODELS[name][1]
    x = jax.random.normal(jax.random.key(0), (1, *shape, 3))
    return network, x, layers(network, x)


def build(name, **more):
    return create_model(name, num_classes=3, seed=1, **(MODELS[name][0] | more))


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_given_what_the_network_gives_them(name, monkeypatch):
    _, x, found = example(name)
    network = build(name, scan_blocks=False)  # whose layers are called one by one
    inputs = []
    call = StructAttention.__call__

    def noting(self, x):
        inputs.append(x)
        return call(self, x)

    def given(x):
        network(x)
        return inputs

    monkeypatch.setattr(StructAttention, "__call__", noting)
    seen = jax.jit(given)(x)
    assert len(found) == len(seen) > 1
    for layer, array in zip(found.values(), seen, strict=True):
        np.testing.assert_allclose(layer.x, array, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_final_maps_give_the_output_and_attention_sums_to_one(name):
    """What is drawn, for all heads: applied to the values it is what the layer passes on."""
    _, _, found = example(name)
    for layer in found.values():
        output = np.asarray(jax.jit(layer.attention)(layer.x))[0]
        value = np.asarray(layer.operands()[2])
        for position in {(0,) * len(layer.grid), tuple(n - 1 for n in layer.grid)}:
            heads = []
            for head in range(layer.attention.heads):
                query = query_maps(layer, head, position)
                assert query.attention.shape == (layer.patterns, *layer.key_grid)
                assert query.attention.sum() == pytest.approx(1, abs=1e-5)
                heads.append((query.final * value[..., head, :]).reshape(-1, value.shape[-1]).sum(axis=0))
            passed = np.concatenate(heads) @ layer.attention.proj.kernel[...] + layer.attention.proj.bias[...]
            np.testing.assert_allclose(passed, output[position], rtol=1e-4, atol=1e-5)


def test_correlations_and_rank():
    _, _, found = example("structvit_tiny_3_2_video")
    layer = found["blocks3.0"]
    query = query_maps(layer, 1, (1, 2, 0))
    q, k, _ = map(np.asarray, layer.operands())
    np.testing.assert_allclose(query.correlation, k[..., 1, :] @ q[1, 2, 0, 1] / 8**0.5, rtol=1e-5, atol=1e-6)
    values = np.linalg.svd(query.kappa.reshape(np.prod(layer.key_grid), -1), compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 0]
    assert query.rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert 1 < query.rank <= 3


def test_kinds_have_the_papers_names():
    kinds = {name: {layer.kind for layer in example(name)[2].values()} for name in MODELS}
    assert kinds["uniformer_tiny_video"] == {"self-attention"}
    assert kinds["structvit_tiny_1_1"] == {"ConvSA"}
    assert kinds["structvit_tiny_3_2_video"] == {"StructSA, D = 3"}


@pytest.mark.parametrize("name", MODELS)
def test_the_picture_shows_the_maps(name):
    _, x, found = example(name)
    layer = list(found.values())[-2]
    query = query_maps(layer, 0, (0,) * len(layer.grid))
    shown = picture.rows(layer, query, 0)
    assert len(shown) == layer.patterns + 2
    sides = (1, *layer.grid)[-3:]
    assert shown[0].maps.shape == shown[-1].maps.shape == sides
    np.testing.assert_array_equal(
        [row.maps.ravel() for row in shown[1:-1]], query.attention.reshape(layer.patterns, -1)
    )
    np.testing.assert_allclose(shown[-1].maps.ravel(), query.final.mean(axis=-1).ravel())
    key_kernels, _ = layer.kernels()
    name, kernel = shown[-2].windows[0]
    np.testing.assert_allclose(kernel.ravel(), key_kernels[..., 0, :, -1].mean(axis=-1).ravel(), atol=1e-7)
    pixels = np.random.default_rng(0).integers(0, 256, x.shape[1:], np.uint8)
    drawn = Image.open(io.BytesIO(picture.draw(pixels, layer, query, 0, "a title")))
    assert len(drawn.convert("RGB").getcolors(10**6)) > 50


@pytest.mark.parametrize("name", MODELS)
def test_pixels_under_the_querys_window(name):
    """The cells of the window, and nothing of those that would lie outside the input."""
    _, x, found = example(name)
    shape, layer = (1, *x.shape[1:-1])[-3:], next(iter(found.values()))
    frames = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(np.uint8) + 1
    grid, axes = np.array((1, *layer.grid)[-3:]), len(layer.grid)
    for position in ((0,) * axes, tuple(n - 1 for n in layer.grid)):
        query = query_maps(layer, 0, position)
        seen = picture.seen_by_window(frames, layer, query)
        window = np.array((1, *query.kappa.shape[axes:-1])[-3:])
        assert (np.abs(seen.shape[:3] - window * [1, *(shape / grid)[1:]]) < 1).all()
        strides = np.array([1, layer.attention.stride, layer.attention.stride])
        centre = np.array((0, *position)[-3:]) // strides * strides
        middle = tuple(np.array(seen.shape[:3]) // 2)
        assert (np.floor((seen[middle] - 0.5) / shape * grid) == centre).all()
        cells = centre + np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1) - window // 2
        inside = ((cells >= 0) & (cells < grid)).all(axis=-1)
        assert np.isclose((seen[..., 0] > 0).mean(), inside.mean(), atol=0.05)


def content(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype).newbyteorder("<")).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_the_page_holds_the_models_own_numbers(name):
    _, x, found = example(name)
    pixels = np.zeros(x.shape[1:], np.uint8)
    title = "</script><b>clip</b>.mp4"
    shown = page.Shown("model", "says", found)
    html = page.build(
        [shown], pixels, title=title, layer=next(iter(found)), head=0, point=(0.5,) * (x.ndim - 2)
    )
    read = content(html)
    assert html.count("</script>") == 2 and read["title"] == title
    assert len(read["frames"]) == (x.shape[1] if x.ndim == 5 else 1)
    assert "http" not in html.replace("http-equiv", "")
    for told, layer in zip(read["models"][0]["layers"], found.values(), strict=True):
        q, k, _ = (np.moveaxis(np.asarray(a), -2, 0) for a in layer.operands())
        np.testing.assert_allclose(array(told["q"], np.float16).reshape(q.shape), q, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(array(told["k"], np.float16).reshape(k.shape), k, rtol=1e-3, atol=1e-4)
        heads, patterns, taps = told["heads"], told["patterns"], np.prod(told["key_window"])
        kernels = array(told["key_kernels"], np.float32).reshape(heads, taps, patterns, -1)
        own, values = layer.kernels()
        last = own[..., -1, :, :].reshape(taps, -1, patterns)
        np.testing.assert_array_equal(kernels[-1], np.swapaxes(last, 1, 2))
        told_values = array(told["value_kernels"], np.float32).reshape(heads, -1, patterns)
        np.testing.assert_allclose(
            told_values[0].ravel(), values[..., 0, :, :].mean(axis=-2).ravel(), atol=1e-7
        )
        assert told["grid"][-2:] == list(layer.grid[-2:])
        assert told["key_grid"][-2:] == list(layer.key_grid[-2:])


def test_a_page_keeps_what_fits():
    found = example("deit_tiny_struct_2_video")[2] | example("structvit_tiny_3_2_video")[2]
    sizes = {name: page._size(layer) for name, layer in found.items()}
    assert page.fitting([found], "blocks.0") == set(found)
    kept = page.fitting([found], "blocks.0", most=sum(sizes.values()) - 1)
    assert "blocks.0" in kept and len(kept) < len(found)
    assert page.fitting([found], "blocks3.0", most=1) == {"blocks3.0"}


def test_the_most_textured_place():
    pixels = np.zeros((5, 20, 30, 3), np.uint8)
    pixels[2, 13, 22] = 255  # of the middle frame
    pixels[0] = np.random.default_rng(0).integers(0, 256, pixels[0].shape)
    assert textured(pixels, (4, 2, 3)) == (0.5, 0.75, 5 / 6)
    assert textured(pixels[2], (2, 3)) == (0.75, 5 / 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = default_config()
    config.model.name, config.model.widths = "deit_tiny_struct_2_video", (16,)
    config.data.train_examples = config.data.test_examples = 16
    config.data.batch_size, config.eval.batch_size, config.train.duration = 8, 8, "1 steps"
    workdir = tmp_path_factory.mktemp("run")
    loop.train(config, epath.Path(workdir), data.load(config.data, config.augment, 0))
    return workdir


def test_the_command(command, run, tmp_path):
    words = [f"--checkpoint={run}", "test:5", "--query=3,10,20", "--layer=blocks.1", "--head=0"]
    done = command(*words, f"--beside={run}", f"--out={tmp_path}", **EXPLAIN)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "explained.png").width > 500
    read = content((tmp_path / "explained.html").read_text())
    assert read["layer"] == "blocks.1" and len(read["models"]) == 2 and len(read["frames"]) == 8
    np.testing.assert_allclose(read["query"], [3.5 / 8, 10.5 / 24, 20.5 / 24])
    says = done.stdout.splitlines()[0]
    assert re.match(r"\d+ degrees 0\.\d{3}, ", says) and read["models"][0]["says"] == says


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["test:16"], "the test examples are test:0 to test:15"),
        (["test:0", "--layer=blocks3.1"], "unknown layer 'blocks3.1'. Did you mean 'blocks.1'"),
        (["test:0", "--head=1"], "blocks.1 has the heads 0 to 0, and no 1"),
        (["test:0", "--query=9,0,0"], "--query=9,0,0 should be T,Y,X, from 0 to 7,23,23"),
        (["missing.mp4"], "missing.mp4: no such file"),
        (["a.mp4", "b.mp4"], "it explains one file"),
    ],
)
def test_mistakes_are_one_line(command, run, tmp_path, words, complaint):
    done = command(f"--checkpoint={run}", *words, f"--out={tmp_path / 'out'}", **EXPLAIN)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert complaint in line and not (tmp_path / "out").exists()


def test_positions():
    layer = example("structvit_tiny_3_2_video")[2]["blocks3.0"]
    assert layer.grid == (2, 5, 6) and layer.key_grid == (2, 3, 3)
    assert position_of(layer, (0.99, 0.5, 0.0)) == (1, 2, 0)
    with pytest.raises(UserError, match=r"position \(0, 5, 0\) does not lie on the grid"):
        query_maps(layer, 0, (0, 5, 0))
