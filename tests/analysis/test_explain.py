"""Pictures and pages show the maps that the model computes, and these give the layer's output."""

import base64
import functools
import html
import io
import itertools
import json
import re
import types

import av
import jax
import numpy as np
import pytest
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.offsetbox import OffsetImage
from matplotlib.text import Text
from PIL import Image

from structvit_jax import create_model, data
from structvit_jax.analysis.explain import animation, layers, overlay, page, picture, query_maps
from structvit_jax.analysis.explain.choice import Choice, choose, effective_ranks, scores, textured
from structvit_jax.analysis.explain.maps import position_of
from structvit_jax.analysis.explain.overlay import Scale
from structvit_jax.analysis.explain.picture import DPI, Drawing, Line
from structvit_jax.config import default_config
from structvit_jax.data.digits import MovingDigits
from structvit_jax.data.limits import Limits
from structvit_jax.data.media_files import Files, find
from structvit_jax.data.reader import Crop, Reader
from structvit_jax.models import StructAttention
from structvit_jax.training import loop
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import printable

WHOLE = Crop(0, 0, 1, 1)
SMALL = {"widths": (8, 8, 16, 16), "head_width": 8, "depths": (1, 1, 1, 1)}
MODELS = {
    "deit_tiny_struct_2_video": ({"widths": (16,), "head_width": 8}, (4, 24, 24)),
    "structvit_tiny_3_2_video": (SMALL | {"key_kernels": "shared"}, (4, 40, 48)),
    "structvit_tiny_2_1": (SMALL | {"aggregation": "element", "key_window": 5}, (48, 56)),
    "structvit_tiny_1_1": (SMALL | {"value_kernels": "shared"}, (48, 48)),
    "uniformer_tiny_video": (SMALL | {"depths": (1, 1, 2, 1), "remat": "full"}, (2, 32, 32)),
}


def drawing_of(layer, query, frames=None, crop=WHOLE):
    """Return a drawing of a query, by default over frames of noise."""
    if frames is None:
        frames = np.random.default_rng(0).integers(0, 256, (4, 90, 120, 3), np.uint8)
    return Drawing(frames, crop, layer, query)


@functools.cache
def example(name):
    """Return a network, an input, and the layers."""
    network, shape = build(name), MODELS[name][1]
    x = jax.random.normal(jax.random.key(0), (1, *shape, 3))
    return network, x, layers(network, x)


def build(name, **more):
    return create_model(name, num_classes=3, seed=1, **(MODELS[name][0] | more))


@pytest.mark.parametrize("name", MODELS)
def test_layers_have_the_inputs_that_the_network_gives_them(name, monkeypatch):
    _, x, found = example(name)
    network = build(name)  # whose layers are called one by one
    inputs = []
    call = StructAttention.__call__

    def recording(self, x):
        inputs.append(x)
        return call(self, x)

    def recorded(x):
        network(x)
        return inputs

    monkeypatch.setattr(StructAttention, "__call__", recording)
    expected = jax.jit(recorded)(x)
    assert len(found) == len(expected) > 1
    for layer, array in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(layer.x, array, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_final_maps_give_the_output_and_attention_sums_to_one(name):
    """Final maps of all heads, applied to the values, give the output of the layer."""
    _, _, found = example(name)
    for layer in found.values():
        output = np.asarray(jax.jit(layer.attention)(layer.x))[0]
        value = np.asarray(layer.operands()[2])
        for position in {(0,) * len(layer.grid), tuple(n - 1 for n in layer.grid)}:
            heads = []
            for head in range(layer.attention.heads):
                query = query_maps(layer, head, position)
                assert query.attention.shape == (layer.structure_dim, *layer.key_grid)
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
    found = example(name)[2]
    layer = list(found.values())[-2]
    query = query_maps(layer, 0, (0,) * len(layer.grid))
    shown = drawing_of(layer, query).rows()
    assert len(shown) == layer.structure_dim + 2
    sides = (1, *layer.grid)[-3:]
    assert shown[0].values.shape == shown[-1].values.shape == sides
    np.testing.assert_array_equal(
        [row.values.ravel() for row in shown[1:-1]], query.attention.reshape(layer.structure_dim, -1)
    )
    np.testing.assert_allclose(shown[-1].values.ravel(), query.final.mean(axis=-1).ravel())
    key_kernels, _ = layer.kernels()
    if layer.kind == "self-attention":
        assert not any(row.kernels for row in shown)
        return
    kernel = shown[-2].kernels["key kernel"]
    np.testing.assert_allclose(kernel.ravel(), key_kernels[..., 0, :, -1].mean(axis=-1).ravel(), atol=1e-7)


def test_the_picture_is_a_png(recwarn):
    layer = example("structvit_tiny_3_2_video")[2]["blocks3.0"]
    query = query_maps(layer, 0, (1, 2, 0))
    heading = [Line("a title, $1 and $\\frac, \N{ETHIOPIC SYLLABLE HA}")]  # no font may have the last
    drawn = Image.open(io.BytesIO(picture.draw(drawing_of(layer, query), heading)))
    assert len(drawn.convert("RGB").getcolors(10**6)) > 50 and not recwarn.list


DRAWN = {  # models, and the frames of a recording: count, height, width
    "structvit_tiny_8_1": (SMALL | {"key_window": 5}, (64, 64), (1, 640, 200)),
    "deit_tiny": ({"widths": (16,), "head_width": 8}, (24, 24), (1, 24, 24)),
    "structvit_tiny_1_1_video": (SMALL, (1, 64, 64), (1, 90, 160)),
    "structvit_tiny_8_2_video": (SMALL, (4, 64, 64), (4, 720, 1280)),
    "deit_tiny_struct_2_video": (MODELS["deit_tiny_struct_2_video"][0], (2, 24, 24), (2, 300, 60)),
}
TITLES = ["/a/path" * 60, "a class of many words, " * 30 + r"$\frac{1}$", "W" * 2000, "\N{BLACK STAR}" * 40]


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_of_the_picture_overlaps_or_leaves_it(name):
    frames = np.random.default_rng(0).integers(0, 256, (*DRAWN[name][2], 3), np.uint8)
    for titles in (["a.mp4"], TITLES):
        heading = [Line(text) for text in titles]
        drawing = drawing_of(*layer_and_query(name), frames, Crop(0.1, 0.2, 0.5, 0.6))
        figure = picture.compose(drawing, heading)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        texts = [text for text in figure.findobj(Text) if text.get_text()]
        images = figure.findobj(OffsetImage)
        assert len(texts) > 10 and len(images) > 2
        boxes = [artist.get_window_extent(renderer) for artist in texts + images]
        width, height = figure.get_size_inches() * DPI
        assert width < 2000 and height < 3000
        for box in boxes:
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, box
        corners = np.array([box.extents for box in boxes])  # left, bottom, right, top
        low, high = corners[:, :2], corners[:, 2:]
        shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)  # pixels, in x and y
        assert np.triu((shared > 0.5).all(axis=-1), k=1).sum() == 0


@functools.cache
def layer_and_query(name):
    """Return a layer of a model with random weights, and the maps of the query at its last position."""
    overrides, shape, _ = DRAWN[name]
    x = jax.random.normal(jax.random.key(0), (1, *shape, 3))
    layer = next(iter(layers(create_model(name, num_classes=3, seed=1, **overrides), x).values()))
    return layer, query_maps(layer, 1, tuple(n - 1 for n in layer.grid))


def test_long_text_loses_its_middle():
    layer, query = layer_and_query("deit_tiny")
    figure = picture.compose(drawing_of(layer, query), [Line("begin" + "x" * 900 + "end")])
    (text,) = [text.get_text() for text in figure.findobj(Text) if text.get_text().startswith("begin")]
    assert "…" in text and text.endswith("end") and len(text.replace("\n", "")) == 501


def test_the_query_is_marked_in_its_cell():
    layer, query = layer_and_query("structvit_tiny_8_1")
    query = query._replace(position=(6, 1))  # of 8 x 8
    figure = picture.compose(drawing_of(layer, query, np.zeros((1, 160, 160, 3), np.uint8)), [Line("a")])
    pixels = np.asarray(figure.findobj(OffsetImage)[0].get_data())
    rows, columns = np.nonzero((pixels == (217, 95, 2)).all(axis=-1)) / np.array([pixels.shape[:2]]).T
    assert rows.mean() == pytest.approx(6.5 / 8, abs=0.01)
    assert columns.mean() == pytest.approx(1.5 / 8, abs=0.01)


def test_scales_show_the_structure_of_a_map():
    rng = np.random.default_rng(0)
    even = rng.uniform(0, 1, (4, 5, 5))
    signed = Scale.of(even - 0.3)
    assert signed.signed and signed.low == -signed.high and signed.ticks()[1] == (0.5, "0")
    for map_ in (even, 3 + even, 100 + even, -3 - even, even - 0.99, -even):
        scale = Scale.of(map_)
        colours = overlay.coloured(scale.fractions(map_), scale.colours)
        assert len(np.unique(colours.reshape(-1, 4), axis=0)) > 40  # neither solid red nor solid purple
        assert len({text for _, text in scale.ticks()}) == len(scale.ticks())
    outlier = np.append(even.ravel(), 1000.0)
    assert Scale.of(outlier).high < 1.01
    constant = Scale.of(np.full(9, 0.25))
    assert constant.is_constant and constant.ticks() == [(0.5, "0.25")]
    assert Scale.of(np.zeros(9)).is_constant


@pytest.mark.parametrize("smooth", [True, False])
def test_a_map_lies_over_the_part_that_the_model_saw(smooth):
    frame = np.full((60, 100, 3), 200, np.uint8)
    map_ = np.array([[0.0, 0], [0, 1]])
    drawn = overlay.overlaid(frame, map_, Scale(0, 1, False), Crop(0, 0.4, 1, 0.6), smooth=smooth).astype(int)
    coloured = np.ptp(drawn, axis=-1) > 60
    assert not coloured[:, :40].any() and (drawn[:, :40] < 80).all()  # outside the crop: dark and grey
    assert coloured[45:, 85:].all() and not coloured[:15, 41:55].any()
    assert (len(np.unique(drawn[:, 40:].reshape(-1, 3), axis=0)) > 2) == smooth


def test_frames_are_trimmed_to_the_crops():
    frames = np.arange(100 * 200).reshape(1, 100, 200, 1)
    seen, (crop,) = overlay.trimmed(frames, [Crop(0, 0.25, 1, 0.5)])
    assert seen.shape == (1, 100, 124, 1) and seen[0, 0, 0, 0] == 38
    np.testing.assert_allclose(crop, (0, 12 / 124, 1, 100 / 124))
    seen, crops = overlay.trimmed(frames, [WHOLE, Crop(0, 0.25, 1, 0.5)])
    assert seen.shape == frames.shape and crops == [WHOLE, Crop(0, 0.25, 1, 0.5)]


@pytest.mark.parametrize(("frames", "crops", "side"), [(0, 1, 0), (0, 1, 40), (3, 3, 40), (3, 1, 0)])
def test_the_crop_of_the_recorded_frames_is_the_view(tmp_path, frames, crops, side):
    """Colours encode positions: the crop and the model's middle view have the same edges."""
    y, x = np.mgrid[0:90, 0:160]
    Image.fromarray(np.stack([x, y * 2, 0 * x], -1).astype(np.uint8)).save(tmp_path / "1.png")
    section = {"sampling": "dense", "short_side": side, "channels": "bgr", "size": 32, "crop_fraction": 0.9}
    section |= {"frames": frames, "test_clips": 2, "test_crops": crops, "stride": 1, "max_pixels": 2**26}
    path = str(tmp_path if frames else tmp_path / "1.png")
    kind = {"video": frames > 0, "other": "", "limits": Limits()}
    source = Files(find([path], **kind), ["a"], **kind, test=lambda: None)
    reader = Reader(
        source, types.SimpleNamespace(**section), types.SimpleNamespace(randaugment="", color_jitter=0), 0
    )
    recorded, crop = reader.uncropped(0)
    assert recorded.shape == (max(frames, 1), 90, 160, 3) and recorded[0, 3, 150, 0] == 150
    view = reader.test(0)["inputs"][reader.middle][..., ::-1].reshape(-1, 32, 32, 3)[0].astype(float)
    top, left, bottom, right = (round(v, 6) for v in (crop.top, crop.left, *np.add(crop[:2], crop[2:])))
    assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
    np.testing.assert_allclose(view[:, [0, -1], 0].mean(axis=0), (left * 160 + 2, right * 160 - 3), atol=3)
    np.testing.assert_allclose(view[[0, -1], :, 1].mean(axis=1), (top * 180 + 3, bottom * 180 - 5), atol=6)


def test_true_classes(tmp_path):
    source = MovingDigits("test", 3, seed=0)
    (tmp_path / "a" / "part").mkdir(parents=True)
    paths = ["test:2", str(tmp_path / "a/part/1.mp4"), str(tmp_path / "1.mp4")]
    kind = {"video": True, "other": "", "limits": Limits()}
    files = Files(find(paths, **kind), ["a", "b"], **kind, test=lambda: source)
    assert [files.true_class(i) for i in range(3)] == [true_class(2), "a", ""]


@pytest.mark.parametrize("name", MODELS)
def test_the_choice_has_the_highest_score(name):
    _, x, found = example(name)
    pixels = np.random.default_rng(0).integers(0, 256, x.shape[1:], np.uint8)
    choice = choose(found, pixels)
    assert choice == choose(found, pixels) and 0 <= choice.score <= 1
    for layer in found.values():
        if min(layer.grid[-2:]) >= 3:
            positions = [position_of(layer, point) for point in textured(pixels, layer.grid, 6)]
            assert scores(layer, positions).max() <= choice.score + 1e-4
    name = next(iter(found))
    point = (0.5,) * len(found[name].grid)
    given = choose(found, pixels, layer=name, head=1, point=point)
    assert given[:3] == (name, 1, point)
    assert choose(found, pixels, layer=name, head=9).head == 9  # query_maps refuses it


def test_scores_follow_the_rule():
    for name in MODELS:
        layer = next(iter(example(name)[2].values()))
        positions = [(0,) * len(layer.grid), tuple(n - 1 for n in layer.grid)]
        found = scores(layer, positions)
        for head, (number, position) in itertools.product(range(2), enumerate(positions)):
            query = query_maps(layer, head, position)
            attention = query.attention[query.attention > 0].astype(np.float64)
            h = -(attention * np.log(attention)).sum() / np.log(query.attention.size)
            rank = (query.rank - 1) / (layer.structure_dim - 1) if layer.structure_dim > 1 else 1
            assert found[head, number] == pytest.approx(rank * 4 * h * (1 - h), rel=1e-2, abs=1e-3)
            flat = query.attention.reshape(1, 1, layer.structure_dim, -1).repeat(2, 0)
            ranks = effective_ranks(layer, flat)
            assert ranks[head, 0] == pytest.approx(query.rank, rel=1e-2)


@pytest.mark.parametrize("kind", animation.ENCODERS)
def test_animations(kind):
    layer = example("structvit_tiny_3_2_video")[2]["blocks3.0"]
    content = animation.draw(drawing_of(layer, query_maps(layer, 0, (1, 2, 0))), kind)
    assert len(content) < animation.MAX_BYTES
    if kind == "gif":
        assert Image.open(io.BytesIO(content)).n_frames == 4
    else:
        with av.open(io.BytesIO(content)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 12


def test_large_animations_shrink(monkeypatch):
    layer = example("structvit_tiny_3_2_video")[2]["blocks3.0"]
    drawing = drawing_of(layer, query_maps(layer, 0, (1, 2, 0)))
    drawing = drawing._replace(frames=drawing.frames[:2])
    full = len(animation.draw(drawing, "gif"))
    monkeypatch.setattr(animation, "MAX_BYTES", 120_000)
    assert len(animation.draw(drawing, "gif")) <= 120_000 < full


def test_printable():
    assert printable("größe, 自転車 $x$") == "größe, 自転車 $x$"
    assert printable("\x1b[31mred\n\u2028\u202e\udcff\ud800") == r"\x1b[31mred\n\u2028\u202e\xff\ud800"


@pytest.mark.parametrize("name", MODELS)
def test_pixels_in_the_window_of_the_query(name):
    """They are those of its cells; cells outside the input are black."""
    _, x, found = example(name)
    shape, layer = (1, *x.shape[1:-1])[-3:], next(iter(found.values()))
    frames = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(np.uint8) + 1
    grid, axes = np.array((1, *layer.grid)[-3:]), len(layer.grid)
    for position in ((0,) * axes, tuple(n - 1 for n in layer.grid)):
        query = query_maps(layer, 0, position)
        seen = drawing_of(layer, query, frames).window_pixels()
        window = np.array((1, *query.kappa.shape[axes:-1])[-3:])
        assert (np.abs(seen.shape[:3] - window * [1, *(shape / grid)[1:]]) < 1).all()
        strides = np.array([1, layer.attention.stride, layer.attention.stride])
        centre = np.array((0, *position)[-3:]) // strides * strides
        middle = tuple(np.array(seen.shape[:3]) // 2)
        assert (np.floor((seen[middle] - 0.5) / shape * grid) == centre).all()
        cells = centre + np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1) - window // 2
        inside = ((cells >= 0) & (cells < grid)).all(axis=-1)
        assert np.isclose((seen[..., 0] > 0).mean(), inside.mean(), atol=0.05)


def page_data(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype).newbyteorder("<")).astype(np.float32)


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<!-- a -->",
    "\"quoted' & \\\\ slashed",
    "line\u2028separator\u2029",
    "{{ data }} {% raw %}",
    "]]>",
]


def build_page(models, shape, title="a clip"):
    """Return a page of layers by model over black frames."""
    frames = np.zeros((1, *shape, 3)[-4:], np.uint8)
    verdict = ("a 0.9", "true class: b", False)
    views = [page.ModelView(name, *verdict, found, WHOLE) for name, found in models.items()]
    first = next(iter(models.values()))
    return page.build(views, frames, Choice(next(iter(first)), 0, (0.5,) * len(shape)), title=title)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name):
    found = {"blocks.1": example("deit_tiny_struct_2_video")[2]["blocks.1"]}
    page_text = build_page({name: found}, (1, 8, 8), title=name)
    for tag in ("title", 'h1 id="title"', "h2"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag.split()[0]}>", page_text, re.S)
        assert html.unescape(text) == name and "<" not in text
    payload = re.search(r'id="data">(.*?)</script>', page_text, re.S)[1]
    assert "<" not in payload and page_text.count("</script>") == 2


@pytest.mark.parametrize("name", MODELS)
def test_the_page_has_the_numbers_of_the_model(name):
    _, x, found = example(name)
    text = build_page({"model": found}, x.shape[1:-1])
    read = page_data(text)
    assert len(read["frames"]) == (x.shape[1] if x.ndim == 5 else 1)
    assert read["models"][0]["crop"] == [0, 0, 1, 1]
    assert re.search('<p class="wrong">true class: b ✗</p>', text)
    assert "http" not in text.replace("http-equiv", "")
    for shown, layer in zip(read["models"][0]["layers"], found.values(), strict=True):
        q, k, _ = (np.moveaxis(np.asarray(a), -2, 0) for a in layer.operands())
        np.testing.assert_allclose(array(shown["q"], np.float16).reshape(q.shape), q, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(array(shown["k"], np.float16).reshape(k.shape), k, rtol=1e-3, atol=1e-4)
        heads, dims, taps = shown["heads"], shown["structure_dim"], np.prod(shown["key_window"])
        kernels = array(shown["key_kernels"], np.float32).reshape(heads, taps, dims, -1)
        own, values = layer.kernels()
        last = own[..., -1, :, :].reshape(taps, -1, dims)
        np.testing.assert_array_equal(kernels[-1], np.swapaxes(last, 1, 2))
        shown_values = array(shown["value_kernels"], np.float32).reshape(heads, -1, dims)
        np.testing.assert_allclose(
            shown_values[0].ravel(), values[..., 0, :, :].mean(axis=-2).ravel(), atol=1e-7
        )
        assert shown["grid"][-2:] == list(layer.grid[-2:])
        assert shown["key_grid"][-2:] == list(layer.key_grid[-2:])


def test_large_frames_of_a_page_shrink():
    url = page._frame_url(np.zeros((400, 600, 3), np.uint8), 40 * 60)
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (60, 40)


def test_layers_that_do_not_fit_on_a_page_are_omitted():
    found = example("deit_tiny_struct_2_video")[2] | example("structvit_tiny_3_2_video")[2]
    sizes = {name: page.encoded_size(layer) for name, layer in found.items()}
    for name, layer in found.items():
        arrays = [value for value in page.encode_layer(layer).values() if isinstance(value, str)]
        assert sizes[name] == pytest.approx(sum(map(len, arrays)), rel=0.1), name
    assert page.fitting_layers([found], "blocks.0") == set(found)
    kept = page.fitting_layers([found], "blocks.0", max_bytes=sum(sizes.values()) - 1)
    assert "blocks.0" in kept and len(kept) < len(found)
    assert page.fitting_layers([found], "blocks3.0", max_bytes=1) == {"blocks3.0"}


def test_the_most_textured_cell():
    pixels = np.zeros((5, 20, 30, 3), np.uint8)
    pixels[2, 13, 22] = 255  # of the middle frame
    pixels[0] = np.random.default_rng(0).integers(0, 256, pixels[0].shape)
    assert textured(pixels, (4, 2, 3), 5) == [(0.5, 0.75, 5 / 6)]  # others have no texture
    assert textured(pixels[2], (2, 3), 1) == [(0.75, 5 / 6)]
    assert len(textured(pixels[0], (2, 3), 5)) == 5


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
    options = ["--query=3,10,20", "--layer=blocks.1", "--head=0", "--animate=gif", f"--beside={run}"]
    done = command(run, "test:5", *options, f"--out={tmp_path}", program="explain")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "explained.png").width > 500
    text = (tmp_path / "explained.html").read_text()
    read = page_data(text)
    assert read["layer"] == "blocks.1" and len(read["models"]) == 2 and len(read["frames"]) == 8
    np.testing.assert_allclose(read["query"], [3.5 / 8, 10.5 / 24, 20.5 / 24])
    predicted, verdict, chosen, *files = done.stdout.splitlines()
    assert re.match(r"\d+ degrees 0\.\d{3}, ", predicted) and text.count(f"predicted: {predicted}") == 2
    right = predicted.split(" 0.")[0] == verdict.split(": ")[1].split(",")[0]
    assert verdict == f"true class: {true_class(5)}, {'right' if right else 'wrong'}"
    assert chosen == "layer blocks.1, head 0, query 3,10,20"
    assert files == [str(tmp_path / f"explained.{kind}") for kind in ("png", "html", "gif")]
    assert Image.open(tmp_path / "explained.gif").n_frames == 8


def true_class(number):
    source = MovingDigits("test", 16, seed=0)
    return source.class_names[source.open(number)[1]]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["test:16"], "the test examples are test:0 to test:15"),
        (["test:0", "--layer=blocks3.1"], "unknown layer 'blocks3.1'. Did you mean 'blocks.1'"),
        (["test:0", "--head=1"], "blocks.1 has heads 0 to 0, not 1"),
        (["test:0", "--query=9,0,0"], "--query=9,0,0 should be T,Y,X, from 0,0,0 to 7,23,23"),
        (["missing.mp4"], "missing.mp4: no such file"),
        (["a\x1b[31m\n.mp4"], r"a\x1b[31m\n.mp4: no such file"),
        (["a.mp4", "b.mp4"], "b.mp4"),
    ],
)
def test_user_errors_are_one_line(refused, run, tmp_path, words, complaint):
    line = refused(run, *words, f"--out={tmp_path / 'out'}", program="explain")
    assert complaint in line and not (tmp_path / "out").exists()


def test_positions():
    layer = example("structvit_tiny_3_2_video")[2]["blocks3.0"]
    assert layer.grid == (2, 5, 6) and layer.key_grid == (2, 3, 3)
    assert position_of(layer, (0.99, 0.5, 0.0)) == (1, 2, 0)
    with pytest.raises(UserError, match=r"position \(0, 5, 0\) is not on the grid"):
        query_maps(layer, 0, (0, 5, 0))
