"""The fenced blocks of the documentation."""

import re
import shlex
from typing import NamedTuple

from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block. Under the comment <!-- run --> it is executed; under <!-- run: config --> it is the
    text of a configuration file."""

    page: str  # as "docs/index.md"
    marker: str  # "run", "run: config" or ""
    language: str
    body: str

    @property
    def lines(self) -> list[str]:
        """The commands of a Bash block, without comments."""
        joined = self.body.replace("\\\n", " ")
        return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def blocks() -> list[Block]:
    """Return all blocks, in the order of the pages."""
    pattern = re.compile(r"(?:^<!-- (run[^>]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(str(page.relative_to(ROOT)), marker, language, body)
        for page in PAGES
        for marker, language, body in pattern.findall(page.read_text())
    ]
