"""Lay out a figure of images and text without overlaps: text is measured and wrapped before the figure gets
its size.

Lengths are in inches from the top left corner.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from structvit_jax.analysis.explain.overlay import Scale, stops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure

DPI = 110
_MARGIN, _TILE_GAP, _PANEL_GAP, _BAR_GAP, _STRIP_GAP = 0.2, 0.05, 0.22, 0.08, 0.15
_BAR_WIDTH, _TICK_GAP = 0.11, 0.04  # of a colour bar
_LINE_GAP, _CAPTION_GAP = 0.03, 0.02
_MIN_HEADING = 7.0  # width
_SMALL, _NORMAL = 7, 9  # points
_GREY = 142  # behind a colour bar, like a grey frame
# Fonts, if installed, for scripts that matplotlib's own font lacks.
_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)


class Line(NamedTuple):
    """Text of one style; a long line of the heading is wrapped."""

    text: str
    size: float = _NORMAL
    weight: str = "normal"
    colour: str = "black"


class Strip(NamedTuple):
    """Small images beside each other below a title."""

    title: str
    images: Sequence[np.ndarray]  # uint8 [height, width, 3 or 4]


class Box(NamedTuple):
    """A rectangle in a tile, in fractions of its sides."""

    tile: int
    left: float
    top: float
    width: float
    height: float


class Panel(NamedTuple):
    """A title; below it tiles beside each other, a colour bar, and strips below each other."""

    title: str
    tiles: Sequence[np.ndarray]  # uint8 [height, width, 3]
    captions: Sequence[str] = ()  # below the tiles
    scale: Scale | None = None
    strips: Sequence[Strip] = ()
    marks: Sequence[Box] = ()
    strong: bool = True  # whether marks are drawn prominently


class _Sheet:
    """Collects drawing operations and makes a figure of the size that they need."""

    def __init__(self) -> None:
        self.width = self.height = 0.0
        self._operations: list[Callable[[Axes], object]] = []

    def _extend(self, right: float, bottom: float) -> None:
        self.width, self.height = max(self.width, right), max(self.height, bottom)

    def text(self, left: float, top: float, line: Line) -> float:
        """Write one line; return its height with the gap below."""
        width, height = text_size(line.text, line.size, line.weight)
        self._extend(left + width, top + height)
        style: dict[str, Any] = {"size": line.size, "weight": line.weight, "color": line.colour}
        style |= {"family": _families(), "ha": "left", "va": "top"}
        style["parse_math"] = False  # names may contain dollar signs
        self._operations.append(lambda axes: axes.text(left, top, line.text, **style))
        return height + _LINE_GAP

    def image(self, left: float, top: float, width: float, height: float, array: np.ndarray) -> None:
        left, top = (round(at * DPI) / DPI for at in (left, top))
        extent = (left, left + width, top + height, top)
        self._extend(left + width, top + height)
        self._operations.append(
            lambda axes: axes.imshow(array, extent=extent, aspect="auto", interpolation="nearest")
        )

    def box(self, left: float, top: float, width: float, height: float, colour: str, line: float) -> None:
        def draw(axes: Axes) -> None:
            from matplotlib.patches import Rectangle

            axes.add_patch(
                Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=line)
            )

        self._operations.append(draw)

    def figure(self) -> Figure:
        from matplotlib.figure import Figure

        width, height = self.width + _MARGIN, self.height + _MARGIN
        figure = Figure(figsize=(width, height), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        for operation in self._operations:
            operation(axes)
        axes.set_axis_off()
        axes.set(xlim=(0, width), ylim=(height, 0))
        return figure


def arrange(
    heading: Sequence[Line], panels: Sequence[Panel], tile: tuple[float, float], *, max_width: float
) -> Figure:
    """Return a figure of panels in reading order below a heading.

    Args:
      heading: lines, which are wrapped.
      panels: as many beside each other as fit, at least one.
      tile: width and height of every tile.
      max_width: of the figure.
    """
    sheet = _Sheet()
    tiles_width = max(_row_width(len(panel.tiles), tile[0]) for panel in panels)
    bar_width = max(map(_bar_width, panels))
    panel_width = tiles_width + _BAR_GAP + bar_width + max(_strips_width(panel, tile[1]) for panel in panels)
    step = panel_width + _PANEL_GAP
    across = max(1, min(len(panels), int((max_width - 2 * _MARGIN + _PANEL_GAP) / step)))
    content = max(across * step - _PANEL_GAP, _MIN_HEADING)
    top = _MARGIN
    for item in heading:
        for text in wrap(item.text, item.size, item.weight, content, max_lines=3):
            top += sheet.text(_MARGIN, top, item._replace(text=text))
    top += 0.1
    for start in range(0, len(panels), across):
        row = panels[start : start + across]
        titles = [wrap(panel.title, _NORMAL, "bold", panel_width, max_lines=3) for panel in row]
        below = top + max(map(len, titles)) * (text_size("Ag", _NORMAL, "bold")[1] + _LINE_GAP)
        bottom = below
        for number, (panel, title) in enumerate(zip(row, titles, strict=True)):
            left, at = _MARGIN + number * step, top
            for text in title:
                at += sheet.text(left, at, Line(text, weight="bold"))
            bottom = max(bottom, _draw_panel(sheet, panel, left, below, tile, tiles_width, bar_width))
        top = bottom + 0.14
    sheet.width = max(sheet.width, _MARGIN + content)
    return sheet.figure()


def _row_width(count: int, width: float) -> float:
    return count * (width + _TILE_GAP) - _TILE_GAP


def _draw_panel(
    sheet: _Sheet,
    panel: Panel,
    left: float,
    top: float,
    tile: tuple[float, float],
    tiles_width: float,
    bar_width: float,
) -> float:
    """Draw a panel without its title; return its bottom."""
    width, height = tile
    bottom = top + height
    for number, array in enumerate(panel.tiles):
        x = left + number * (width + _TILE_GAP)
        sheet.image(x, top, width, height, array)
        if panel.captions:
            (text,) = wrap(panel.captions[number], _SMALL, "normal", width, max_lines=1)
            below = top + height + _CAPTION_GAP
            bottom = max(bottom, below + sheet.text(x, below, Line(text, _SMALL)))
    for mark in panel.marks:
        x, y = left + mark.tile * (width + _TILE_GAP) + mark.left * width, top + mark.top * height
        sides = (x, y, mark.width * width, mark.height * height)
        sheet.box(*sides, "white", 2.6 if panel.strong else 1.6)
        sheet.box(*sides, "#d95f02" if panel.strong else "black", 1.4 if panel.strong else 0.7)
    right = left + tiles_width + _BAR_GAP
    if panel.scale:
        _draw_bar(sheet, panel.scale, right, top, height)
    return max(bottom, _draw_strips(sheet, panel, right + bar_width + _STRIP_GAP, top, height))


def _draw_bar(sheet: _Sheet, scale: Scale, left: float, top: float, height: float) -> None:
    *colour, opacity = np.moveaxis(stops(scale.colours, over=True)[::-1, None].astype(float), -1, 0)
    opacity = opacity[..., None] / 255
    bar = (_GREY + opacity * (np.stack(colour, axis=-1) - _GREY)).astype(np.uint8)
    sheet.image(left, top, _BAR_WIDTH, height, bar[len(bar) // 2 :][:1] if scale.is_constant else bar)
    for at, number in scale.ticks():
        y = top + (1 - at) * (height - text_size(number, _SMALL)[1])
        sheet.text(left + _BAR_WIDTH + _TICK_GAP, y, Line(number, _SMALL))


def _bar_width(panel: Panel) -> float:
    if panel.scale is None:
        return 0.0
    return _BAR_WIDTH + _TICK_GAP + max(text_size(number, _SMALL)[0] for _, number in panel.scale.ticks())


def _draw_strips(sheet: _Sheet, panel: Panel, left: float, top: float, height: float) -> float:
    side = _strip_side(height)
    for strip in panel.strips:
        top += sheet.text(left, top, Line(strip.title, _SMALL))
        for number, array in enumerate(strip.images):
            x, scale = left + number * (side + _TILE_GAP), side / max(array.shape[:2])
            sheet.image(x, top, array.shape[1] * scale, array.shape[0] * scale, array)
        top += side + 0.08
    return top


def _strip_side(height: float) -> float:
    """Return the side of a strip's images: two strips fit beside a tile, unless it is small."""
    return min(max((height - 0.5) / 2, 0.38), 0.7)


def _strips_width(panel: Panel, height: float) -> float:
    side = _strip_side(height)
    widths = [
        max(text_size(strip.title, _SMALL)[0], _row_width(len(strip.images), side)) for strip in panel.strips
    ]
    return _STRIP_GAP + max(widths) if widths else 0.0


@functools.cache
def text_size(text: str, size: float, weight: str = "normal") -> tuple[float, float]:
    """Return the width and height of a line of text."""
    from matplotlib.font_manager import FontProperties

    width, height, _ = _renderer().get_text_width_height_descent(
        text, FontProperties(family=_families(), size=size, weight=weight), False
    )
    min_height = size / 72 * 1.17  # of a line without tall letters
    return width / DPI + 0.01, max(height / DPI, min_height)


@functools.cache
def _families() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FONTS if name in installed)]


@contextlib.contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Suppress warnings of characters that no font has; they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


@functools.cache
def _renderer() -> RendererAgg:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()


def wrap(text: str, size: float, weight: str, width: float, *, max_lines: int) -> list[str]:
    """Wrap a text, at spaces if possible; one that is too long for `max_lines` loses its middle."""
    line_limit = int(width * 72 / size * 5)  # characters that could fit: each a fifth of the size wide
    kept = min(len(text), max_lines * line_limit)
    while len(lines := _break(_shorten(text, kept), size, weight, width, line_limit)) > max_lines:
        kept = min(int(kept * 0.97), 2 * kept * max_lines // len(lines))
    return lines


def _shorten(text: str, kept: int) -> str:
    return text if kept >= len(text) else f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def _break(text: str, size: float, weight: str, width: float, line_limit: int) -> list[str]:
    lines = []
    while text:
        fits = bisect.bisect_right(
            range(1, min(len(text), line_limit) + 1),
            width,
            key=lambda count: text_size(text[:count], size, weight)[0],
        )
        end = max(fits, 1)
        if end < len(text) and text[end] != " " and " " in text[1:end]:
            end = text.rindex(" ", 1, end)
        lines.append(text[:end])
        text = text[end:].lstrip(" ")
    return lines
