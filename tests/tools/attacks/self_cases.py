"""Commands that misbehave, and the kinds of problems that the harness has to report."""

from __future__ import annotations

from collections.abc import Iterator

from attacks.case import Case

EXPECTED: dict[str, set[str]] = {
    "traceback": {"traceback", "exit"},
    "hang": {"hang"},
    "memory": {"memory"},
    "memory_of_a_child": {"memory"},
    "lines": {"lines"},
    "escapes": {"lines"},
    "exit_code": {"exit"},
    "stray": {"stray"},
    "temporary": {"stray"},
    "survivor": {"left"},
    "connect": {"check"},
    "well": set(),
    "refusal": set(),
}


def cases() -> Iterator[Case]:
    for how in EXPECTED:
        argument = {"stray": "<strays>", "connect": "<contact>"}.get(how, "")
        codes = (2,) if how in ("lines", "refusal") else (0,)
        yield Case("self", how, "attacks.misbehave", (how, argument), codes, seconds=2, megabytes=400)
