"""Lay out a figure of pictures and text so that no text leaves the figure or covers anything: text is
measured and wrapped before the figure gets its size.

Lengths are inches, from the top left corner.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from structvit_jax.analysis.explain.overlay import Scale, stops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
_MARGIN, _GAP, _APART = 0.2, 0.05, 0.22
_BAR = 0.11  # width of a colour bar
_BEFORE = 0.15  # strips
_NARROWEST = 7.0  # of the heading
_SMALL, _NORMAL = 7, 9  # points
_GREY = 142  # behind the colour bar, as of a grey frame
# Fonts for what matplotlib's own has no letters for; those that are installed are used.
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
    """Text of the heading, which may take several lines."""

    text: str
    size: float = _NORMAL
    weight: str = "normal"
    colour: str = "black"


class Strip(NamedTuple):
    """Small pictures beside each other, with a title above."""

    title: str
    pictures: Sequence[np.ndarray]  # uint8 [height, width, 3 or 4]


class Box(NamedTuple):
    """A rectangle in a tile, in fractions of its sides."""

    tile: int
    left: float
    top: float
    width: float
    height: float


class Panel(NamedTuple):
    """A title, tiles beside each other below it, then a colour bar, then strips below each other."""

    title: str
    tiles: Sequence[np.ndarray]  # uint8 [height, width, 3]
    captions: Sequence[str] = ()  # below the tiles
    scale: Scale | None = None
    strips: Sequence[Strip] = ()
    marks: Sequence[Box] = ()
    strong: bool = True  # how the marks are drawn


class _Sheet:
    """Collects what is drawn, then makes a figure of the size that this needs."""

    def __init__(self) -> None:
        self.width = self.height = 0.0
        self._drawn: list[Callable] = []

    def _covers(self, right: float, bottom: float) -> None:
        self.width, self.height = max(self.width, right), max(self.height, bottom)

    def text(self, left: float, top: float, line: Line) -> float:
        """Write one line; return the length that it takes downwards."""
        width, height = measured(line.text, line.size, line.weight)
        self._covers(left + width, top + height)
        style = {"size": line.size, "weight": line.weight, "color": line.colour, "family": _families()}
        style |= {"ha": "left", "va": "top", "parse_math": False}  # a name may hold dollar signs
        self._drawn.append(lambda axes: axes.text(left, top, line.text, **style))
        return height + 0.03

    def picture(self, left: float, top: float, width: float, height: float, array: np.ndarray) -> None:
        left, top = (round(at * DPI) / DPI for at in (left, top))
        extent = (left, left + width, top + height, top)
        self._covers(left + width, top + height)
        self._drawn.append(
            lambda axes: axes.imshow(array, extent=extent, aspect="auto", interpolation="nearest")
        )

    def frame(self, left: float, top: float, width: float, height: float, colour: str, line: float) -> None:
        def draw(axes) -> None:
            from matplotlib.patches import Rectangle

            axes.add_patch(
                Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=line)
            )

        self._drawn.append(draw)

    def figure(self) -> Figure:
        from matplotlib.figure import Figure

        width, height = self.width + _MARGIN, self.height + _MARGIN
        figure = Figure(figsize=(width, height), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        for draw in self._drawn:
            draw(axes)
        axes.set_axis_off()
        axes.set(xlim=(0, width), ylim=(height, 0))
        return figure


def arrange(
    heading: Sequence[Line], panels: Sequence[Panel], tile: tuple[float, float], *, widest: float
) -> Figure:
    """Return a figure of panels below a heading, as many beside each other as fit.

    Args:
      heading: one below the other, wrapped.
      panels: in reading order.
      tile: width and height of every tile.
      widest: of the figure, unless a single panel is wider.
    """
    sheet = _Sheet()
    tiles_width = max(_row(len(panel.tiles), tile[0]) for panel in panels)
    bar_width = max(map(_bar_width, panels))
    panel_width = tiles_width + 0.08 + bar_width + max(_strips_width(panel, tile[1]) for panel in panels)
    across = max(1, min(len(panels), int((widest - 2 * _MARGIN + _APART) / (panel_width + _APART))))
    content = max(across * (panel_width + _APART) - _APART, _NARROWEST)
    top = _MARGIN
    for item in heading:
        for text in wrapped(item.text, item.size, item.weight, content, most=3):
            top += sheet.text(_MARGIN, top, item._replace(text=text))
    top += 0.1
    for start in range(0, len(panels), across):
        row = panels[start : start + across]
        titles = [wrapped(panel.title, _NORMAL, "bold", panel_width, most=3) for panel in row]
        below = top + max(map(len, titles)) * (measured("Ag", _NORMAL, "bold")[1] + 0.03)
        bottom = below
        for number, (panel, title) in enumerate(zip(row, titles, strict=True)):
            left, at = _MARGIN + number * (panel_width + _APART), top
            for text in title:
                at += sheet.text(left, at, Line(text, weight="bold"))
            bottom = max(bottom, _draw_panel(sheet, panel, left, below, tile, tiles_width, bar_width))
        top = bottom + 0.14
    sheet.width = max(sheet.width, _MARGIN + content)
    return sheet.figure()


def _row(count: int, width: float) -> float:
    return count * (width + _GAP) - _GAP


def _draw_panel(
    sheet: _Sheet,
    panel: Panel,
    left: float,
    top: float,
    tile: tuple[float, float],
    tiles_width: float,
    bar_width: float,
) -> float:
    """Draw all but the title; return how far down it goes."""
    width, height = tile
    bottom = top + height
    for number, array in enumerate(panel.tiles):
        x = left + number * (width + _GAP)
        sheet.picture(x, top, width, height, array)
        if panel.captions:
            (text,) = wrapped(panel.captions[number], _SMALL, "normal", width, most=1)
            bottom = max(bottom, top + height + 0.02 + sheet.text(x, top + height + 0.02, Line(text, _SMALL)))
    for mark in panel.marks:
        x, y = left + mark.tile * (width + _GAP) + mark.left * width, top + mark.top * height
        sides = (x, y, mark.width * width, mark.height * height)
        sheet.frame(*sides, "white", 2.6 if panel.strong else 1.6)
        sheet.frame(*sides, "#d95f02" if panel.strong else "black", 1.4 if panel.strong else 0.7)
    right = left + tiles_width + 0.08
    if panel.scale:
        _draw_bar(sheet, panel.scale, right, top, height)
    return max(bottom, _draw_strips(sheet, panel, right + bar_width + _BEFORE, top, height))


def _draw_bar(sheet: _Sheet, scale: Scale, left: float, top: float, height: float) -> None:
    *colour, opacity = np.moveaxis(stops(scale.colours, over=True)[::-1, None].astype(float), -1, 0)
    share = opacity[..., None] / 255
    bar = (_GREY + share * (np.stack(colour, axis=-1) - _GREY)).astype(np.uint8)
    sheet.picture(left, top, _BAR, height, bar[len(bar) // 2 :][:1] if scale.even else bar)
    for at, number in scale.ticks():
        tall = measured(number, _SMALL)[1]
        sheet.text(left + _BAR + 0.04, top + (1 - at) * (height - tall), Line(number, _SMALL))


def _bar_width(panel: Panel) -> float:
    if panel.scale is None:
        return 0.0
    return _BAR + 0.04 + max(measured(number, _SMALL)[0] for _, number in panel.scale.ticks())


def _draw_strips(sheet: _Sheet, panel: Panel, left: float, top: float, height: float) -> float:
    side = _strip_side(height)
    for strip in panel.strips:
        top += sheet.text(left, top, Line(strip.title, _SMALL))
        for number, array in enumerate(strip.pictures):
            x, scale = left + number * (side + _GAP), side / max(array.shape[:2])
            sheet.picture(x, top, array.shape[1] * scale, array.shape[0] * scale, array)
        top += side + 0.08
    return top


def _strip_side(height: float) -> float:
    """Two strips fit beside a tile, if it is not small."""
    return min(max((height - 0.5) / 2, 0.38), 0.7)


def _strips_width(panel: Panel, height: float) -> float:
    side = _strip_side(height)
    widths = [
        max(measured(strip.title, _SMALL)[0], _row(len(strip.pictures), side)) for strip in panel.strips
    ]
    return _BEFORE + max(widths) if widths else 0.0


@functools.cache
def measured(text: str, size: float, weight: str = "normal") -> tuple[float, float]:
    """Return the width and height of a line of text."""
    from matplotlib.font_manager import FontProperties

    width, height, _ = _renderer().get_text_width_height_descent(
        text, FontProperties(family=_families(), size=size, weight=weight), False
    )
    least = size / 72 * 1.17  # of a line without tall letters
    return width / DPI + 0.01, max(height / DPI, least)


@functools.cache
def _families() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FONTS if name in installed)]


@contextlib.contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Letters that no font has are drawn as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


@functools.cache
def _renderer():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()


def wrapped(text: str, size: float, weight: str, width: float, *, most: int) -> list[str]:
    """Return a text as lines of at most a width, broken at spaces where possible; a text that takes more than
    `most` lines loses its middle."""
    longest = int(width * 72 / size * 5)  # letters of a line: of a fifth of the size
    kept = min(len(text), most * longest)
    lines = _broken(_shortened(text, kept), size, weight, width, longest)
    while len(lines) > most:
        kept = min(int(kept * 0.97), 2 * kept * most // len(lines))
        lines = _broken(_shortened(text, kept), size, weight, width, longest)
    return lines


def _shortened(text: str, kept: int) -> str:
    return text if kept >= len(text) else f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def _broken(text: str, size: float, weight: str, width: float, longest: int) -> list[str]:
    lines = []
    while text:
        fits = bisect.bisect_right(
            range(1, min(len(text), longest) + 1),
            width,
            key=lambda count: measured(text[:count], size, weight)[0],
        )
        end = max(fits, 1)
        if end < len(text) and text[end] != " " and " " in text[1:end]:
            end = text.rindex(" ", 1, end)
        lines.append(text[:end])
        text = text[end:].lstrip(" ")
    return lines
