"""HTML from values. Text is escaped unless it is `Markup`, so that no name of a file or class can do harm."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

_EMPTY = ("img", "meta")  # elements that hold nothing


class Markup(str):
    """Text that is HTML already."""


def joined(parts: Iterable[Any], between: str = "") -> Markup:
    """Parts one after another, each escaped unless it is markup."""
    return Markup(between.join(p if isinstance(p, Markup) else html.escape(str(p)) for p in parts))


def tag(name: str, /, *inside: Any, **attributes: Any) -> Markup:
    """An element. Attributes are written as `class_` and `aria_label`; None leaves one out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    words = [name, *(f'{key}="{html.escape(str(v))}"' for key, v in given.items() if v is not None)]
    end = "" if name in _EMPTY else f"</{name}>"
    return Markup(f"<{' '.join(words)}>{joined(inside)}{end}")


def table(label: str, head: Sequence[Any], rows: Iterable[Sequence[Any]], **attributes: Any) -> Markup:
    """A table that scrolls by itself where it is too wide; a cell may be an element `td` or `th` already."""
    body = [tag("tr", _cell(first, "th", scope="row"), *map(_cell, rest)) for first, *rest in rows]
    top = tag("thead", tag("tr", *(_cell(name, "th", scope="col") for name in head)))
    return scrolling(label, tag("table", top, tag("tbody", *body), **attributes))


def _cell(value: Any, name: str = "td", **attributes: Any) -> Markup:
    ready = isinstance(value, Markup) and value.startswith(("<td", "<th"))
    return value if ready else tag(name, value, **attributes)


def scrolling(label: str, *inside: Any) -> Markup:
    """A part that scrolls by itself, also with the keyboard."""
    return tag("div", *inside, class_="scroll", role="region", aria_label=label, tabindex=0)


def image(content: bytes, kind: str, alt: str, **attributes: Any) -> Markup:
    """A picture inside the page; `kind` is its media type, as image/png."""
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return tag("img", src=source, alt=alt, **attributes)
