"""Render the HTML pages of `templates/`: all text is escaped, and a page needs no other file."""

from __future__ import annotations

import base64
import functools
from typing import NamedTuple

import jinja2


class EmbeddedImage(NamedTuple):
    """An image inside a page."""

    url: str
    alt: str


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("structvit_jax.analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: object) -> str:
    """Return a page: a file of `templates/` with its variables filled in."""
    return _environment().get_template(template).render(values)


def data_url(content: bytes, media_type: str) -> str:
    """Return a URL that holds a file, as data:image/png;base64,..."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
