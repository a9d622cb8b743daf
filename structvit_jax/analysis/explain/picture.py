"""Draw the maps of one query as a picture: overlays on frames, with colour bars and kernels."""

from __future__ import annotations

import functools
import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.offsetbox import DrawingArea, HPacker, OffsetBox, OffsetImage, TextArea, VPacker
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from structvit_jax.analysis.contact_sheet import evenly_spaced
from structvit_jax.analysis.explain import overlay
from structvit_jax.analysis.explain.maps import Layer, Query
from structvit_jax.analysis.explain.overlay import Scale, coloured, marked, overlaid, resized_frame
from structvit_jax.data.reader import Crop

DPI = 110
_MAX_TIMES = 8  # time positions shown side by side
_MAX_ROW_WIDTH = 1210  # pixels; all tiles of one panel
_MAX_WIDTH = 1550  # pixels; all panels side by side
_MIN_HEADING_WIDTH = 770  # pixels
_MAX_TEXT = 500  # characters; the middle of longer text is cut out
_SMALL, _NORMAL = 7, 9  # font sizes in points; the gaps and margins below are also in points
_MARGIN, _TILE_GAP, _BAR_GAP, _STRIP_GAP, _PANEL_GAP = 14, 3, 5, 8, 16
_BAR_WIDTH = 12  # pixels; a colour bar
_TICKS_WIDTH = 46  # points; the numbers beside a colour bar
# Fonts to use, if installed, for scripts that matplotlib's own font does not have.
_FONTS = ("Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS")


class Line(NamedTuple):
    """Text in one style. Long text is wrapped."""

    text: str
    size: float = _NORMAL
    weight: str = "normal"
    colour: str = "black"


class MapRow(NamedTuple):
    """A map at all time positions of a layer, and the kernels to draw beside it."""

    title: str
    short_title: str
    values: np.ndarray  # [time, height, width]
    kernels: Mapping[str, np.ndarray]  # by title; signed kernels [time, height, width]


class Drawing(NamedTuple):
    """The maps of one query, to draw over the input. An image is a video of one frame."""

    frames: np.ndarray  # uint8 [time, height, width, 3], RGB, as recorded
    crop: Crop  # the part of the frames that the model saw
    layer: Layer
    query: Query
    smooth: bool = True  # interpolate maps between positions and times

    @property
    def grid(self) -> tuple[int, int, int]:
        """The number of the layer's positions along (time, height, width)."""
        time, rows, columns = (1, *self.layer.grid)[-3:]
        return time, rows, columns

    @property
    def position(self) -> tuple[int, int, int]:
        """The query's position on the grid."""
        time, row, column = (0, *self.query.position)[-3:]
        return time, row, column

    @property
    def seen(self) -> np.ndarray:
        """The pixels that the model saw, before they were resized: uint8 [time, height, width, 3]."""
        top, left, bottom, right = overlay.box(self.crop, *self.frames.shape[1:3])
        return self.frames[:, top:bottom, left:right]

    @property
    def cell(self) -> Crop:
        """The query's cell of the grid, as a box in the frame."""
        (_, rows, columns), (_, row, column) = self.grid, self.position
        height, width = self.crop.height / rows, self.crop.width / columns
        return Crop(self.crop.top + row * height, self.crop.left + column * width, height, width)

    def middle_frame(self, time: int) -> int:
        """Return the index of the frame in the middle of a time position of the grid."""
        return int((time + 0.5) * len(self.frames) / self.grid[0])

    def rows(self) -> list[MapRow]:
        """Return the correlations, the attention of each structure kernel, and the final map.

        The correlations have the dynamic kernel at the query beside them; each attention map has the key and
        value kernel of its structure kernel. Maps and kernels that have channels are averaged over channels.
        """
        layer, query = self.layer, self.query
        kappa = self._with_time(query.kappa[self._key].mean(axis=-1))
        key_kernels, value_kernels = (
            self._with_time(kernels[..., min(query.head, kernels.shape[-3] - 1), :, :].mean(axis=-2))
            for kernels in layer.kernels()
        )
        title, short_title = "correlation with every position", "correlation"
        rows = [MapRow(title, short_title, self._with_time(query.correlation), {"dynamic kernel": kappa})]
        for d, attention in enumerate(query.attention):
            title = short_title = "attention"
            if layer.structure_dim > 1:
                short_title = f"kernel {d + 1}: {attention.sum():.0%}"
                title = f"attention of structure {short_title}"
            kernels = {"key kernel": key_kernels[..., d], "value kernel": value_kernels[..., d]}
            rows.append(MapRow(title, short_title, self._with_time(attention), kernels))
        if layer.kind == "self-attention":
            rows = [row._replace(kernels={}) for row in rows]
        final = self._with_time(query.final.mean(axis=-1))
        return [*rows, MapRow("final map: weight of each value", "final map", final, {})]

    def _with_time(self, array: np.ndarray) -> np.ndarray:
        """Return an array [time, height, width, ...]; add the time axis if the input is an image."""
        return array if len(self.layer.grid) == 3 else array[None]

    @property
    def _key(self) -> tuple[int, ...]:
        """The key position whose window is centred on the query.

        With a stride, it is the last key position that is not after the query along any axis.
        """
        *time, row, column = self.query.position
        stride = self.layer.attention.stride
        return (*time, row // stride, column // stride)

    def window_pixels(self) -> np.ndarray:
        """Return the pixels in the window around the query. Pixels outside the input are black.

        For each time position of the window, this is the frame in its middle. If the sides of the input are
        not multiples of the grid's sides, cells are rounded to whole pixels.

        Returns:
          uint8 [time positions of the window, height, width, 3].
        """
        axes, stride = len(self.layer.grid), self.layer.attention.stride
        time, row, column = (0, *self._key)[-3:]
        window = np.array((1, *self.query.kappa.shape[axes:-1])[-3:])
        start = (time, row * stride, column * stride) - window // 2
        cell_size = np.array(self.seen.shape[1:3]) / self.grid[1:]
        top, left = (start[1:] * cell_size).round().astype(int)
        bottom, right = ((start + window)[1:] * cell_size).round().astype(int)
        images = []
        for t in range(start[0], start[0] + window[0]):
            inside = 0 <= t < self.grid[0]
            frame = self.seen[self.middle_frame(t)] if inside else np.zeros_like(self.seen[0])
            images.append(np.asarray(Image.fromarray(frame).crop((left, top, right, bottom))))
        return np.stack(images)


def draw(drawing: Drawing, heading: Sequence[Line]) -> bytes:
    """Return the picture as a PNG; see `compose`."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # such characters are drawn as boxes
        compose(drawing, heading).savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def compose(drawing: Drawing, heading: Sequence[Line]) -> Figure:
    """Return a figure: the heading, the frames with the query marked, and a panel for each map.

    At most 8 time positions are shown, including that of the query.
    """
    query_time, (_, frame_height, frame_width) = drawing.position[0], drawing.frames.shape[:3]
    times = evenly_spaced(drawing.grid[0], _MAX_TIMES)
    times[np.abs(times - query_time).argmin()] = query_time
    size = _tile_size(frame_width / frame_height, len(times))
    frames = [drawing.middle_frame(t) for t in times]
    shots = [resized_frame(drawing.frames[frame], *size) for frame in frames]

    def tiles(images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [
            marked(image, drawing.cell) if t == query_time else image
            for t, image in zip(times, images, strict=True)
        ]

    is_whole = drawing.crop.height > 0.99 and drawing.crop.width > 0.99
    title = "input, query marked" + ("" if is_whole else "; the model saw the bright part")
    captions = [f"frame {frame}" for frame in frames] if len(drawing.frames) > 1 else []
    panels = {title: _panel(tiles([overlay.dimmed(shot, drawing.crop) for shot in shots]), captions)}
    strip_side = min(max((size[0] - 55) // 2, 42), 77)  # two strips fit beside a tile, unless it is small
    for number, row in enumerate(drawing.rows()):
        scale = Scale.of(row.values)
        overlays = [
            overlaid(shot, row.values[t], scale, drawing.crop, smooth=drawing.smooth)
            for t, shot in zip(times, shots, strict=True)
        ]
        strips = [_kernel_strip(name, kernel, strip_side) for name, kernel in row.kernels.items()]
        if number == 0:  # the correlations
            strips.append(_strip("pixels in its window", drawing.window_pixels(), strip_side))
        panels[row.title] = _panel(tiles(overlays), (), scale, strips)
    if drawing.grid[0] >= 4 and min(drawing.grid[1:]) >= 6:
        title = "the query's row and column over time (time runs downwards): motion appears as a slanted line"
        panels[title] = _slices(drawing, size)
    return _arrange(heading, panels)


def _tile_size(aspect: float, count: int) -> tuple[int, int]:
    """Return the height and width in pixels of one of `count` tiles side by side."""
    aspect = min(max(aspect, 1 / 3), 3.0)
    area = 225**2 if count == 1 else 145**2
    height = min(math.sqrt(area / aspect), _MAX_ROW_WIDTH / (count * aspect))
    return round(height), round(height * aspect)


def _panel(
    tiles: Sequence[np.ndarray],
    captions: Sequence[str] = (),
    scale: Scale | None = None,
    strips: Sequence[OffsetBox] = (),
) -> OffsetBox:
    """Return a panel: tiles side by side with captions below, then a colour bar, then a column of strips."""
    images: list[OffsetBox] = [_image(tile) for tile in tiles]
    if captions:
        texts = [_text(Line(caption, _SMALL)) for caption in captions]
        images = [_column(pair, gap=2) for pair in zip(images, texts, strict=True)]
    parts: list[OffsetBox] = [_row(images, gap=_TILE_GAP)]
    if scale:
        parts.append(_colour_bar(scale, tiles[0].shape[0]))
    if strips:
        parts.append(_column(strips, gap=_STRIP_GAP))
    return _row(parts, gap=_BAR_GAP)


def _slices(drawing: Drawing, size: tuple[int, int]) -> OffsetBox:
    """Return a panel of the query's row and column over time: their pixels and their correlations."""
    seen, correlation = drawing.seen, drawing.query.correlation
    (_, rows, columns), (_, row, column) = drawing.grid, drawing.position
    y, x = int((row + 0.5) * seen.shape[1] / rows), int((column + 0.5) * seen.shape[2] / columns)
    scale, tiles = Scale.of(correlation), []
    for pixels, values in ((seen[:, y], correlation[:, row]), (seen[:, :, x], correlation[:, :, column])):
        resized = resized_frame(pixels, *size)
        tiles += [resized, overlaid(resized, values, scale, overlay.WHOLE, smooth=drawing.smooth)]
    return _panel(tiles, ["row", "its correlation", "column", "its correlation"], scale)


def _kernel_strip(title: str, kernel: np.ndarray, side: int) -> OffsetBox:
    largest = float(np.abs(kernel).max())
    fractions = 0.5 + kernel / (2 * largest or 1)
    return _strip(f"{title}, ±{largest:.2g}", coloured(fractions, "kernel"), side)


def _strip(title: str, images: np.ndarray, side: int) -> OffsetBox:
    """Return a title and, below it, small images whose longer side is scaled to `side` pixels."""
    zoom = side / max(images.shape[1:3])
    row = _row([_image(image, zoom) for image in images], gap=3)
    return _column([_text(Line(title, _SMALL)), row], gap=1)


def _colour_bar(scale: Scale, height: int) -> OffsetBox:
    fractions = np.full(height, 0.5) if scale.is_constant else np.linspace(1, 0, height)
    bar = Image.new("RGBA", (_BAR_WIDTH, height), "#8e8e8e")  # as if over a grey frame
    colours = coloured(fractions[:, None].repeat(_BAR_WIDTH, axis=1), scale.colours, translucent=True)
    bar.alpha_composite(Image.fromarray(colours))
    labels = DrawingArea(_TICKS_WIDTH, height * 72 / DPI)
    for at, label in scale.ticks():
        side: Literal["bottom", "center", "top"] = "bottom" if at == 0 else "top" if at == 1 else "center"
        labels.add_artist(Text(0, at * labels.height, label, size=_SMALL, verticalalignment=side))
    return _row([_image(np.asarray(bar)), labels], gap=3)


def _image(pixels: np.ndarray, zoom: float = 1) -> OffsetImage:
    return OffsetImage(pixels, zoom=zoom, dpi_cor=False, interpolation="nearest")


def _text(line: Line) -> TextArea:
    style = {"size": line.size, "weight": line.weight, "color": line.colour, "family": _families()}
    return TextArea(line.text, textprops=style | {"parse_math": False})  # names may contain dollar signs


@functools.cache
def _families() -> list[str]:
    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _FONTS if name in installed)]


def _row(children: Sequence[OffsetBox], *, gap: float) -> OffsetBox:
    return HPacker(children=list(children), align="top", pad=0, sep=gap)


def _column(children: Sequence[OffsetBox], *, gap: float, margin: float = 0) -> OffsetBox:
    return VPacker(children=list(children), align="left", pad=margin, sep=gap)


def _arrange(heading: Sequence[Line], panels: Mapping[str, OffsetBox]) -> Figure:
    """Return a figure: a heading, and titled panels in reading order. The figure is as large as they need."""
    figure = Figure(dpi=DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()

    def extent(part: OffsetBox) -> Bbox:  # in pixels
        part.set_figure(figure)
        return part.get_bbox(renderer)

    def wrapped(line: Line, max_width: float) -> str:
        columns = int(max_width / (0.7 * line.size))  # in characters; an upper bound
        while True:
            text = "\n".join(textwrap.wrap(_shortened(line.text), columns, break_on_hyphens=False))
            if columns == 1 or extent(_text(line._replace(text=text))).width <= max_width:
                return text
            columns -= 1

    width = max(extent(panel).width for panel in panels.values())
    gap = _PANEL_GAP * DPI / 72
    across = min(max(1, int((_MAX_WIDTH + gap) / (width + gap))), len(panels))
    heading_width = max(across * (width + gap) - gap, _MIN_HEADING_WIDTH)
    lines = [_text(line._replace(text=wrapped(line, heading_width))) for line in heading]
    rows = [_column(lines, gap=4)]
    titled = [(wrapped(Line(title, weight="bold"), width), panel) for title, panel in panels.items()]
    for start in range(0, len(titled), across):
        row = titled[start : start + across]
        most_breaks = max(title.count("\n") for title, _ in row)
        boxes = []
        for title, panel in row:
            padded = title + "\n" * (most_breaks - title.count("\n"))  # aligns the tiles of a row
            spacer = DrawingArea(width * 72 / DPI, 0)  # aligns the panels of a column
            boxes.append(_column([_text(Line(padded, weight="bold")), panel, spacer], gap=3))
        rows.append(_row(boxes, gap=_PANEL_GAP))
    sheet = _column(rows, gap=8, margin=_MARGIN)
    corners = extent(sheet)
    figure.set_size_inches(math.ceil(corners.width) / DPI, math.ceil(corners.height) / DPI)
    sheet.set_offset((-corners.x0, -corners.y0))
    figure.add_artist(sheet)
    return figure


def _shortened(text: str) -> str:
    half = _MAX_TEXT // 2
    return text if len(text) <= _MAX_TEXT else f"{text[:half]}…{text[-half:]}"
