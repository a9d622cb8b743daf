"""An attack, its result, and the rules that a result has to obey."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

KINDS = ("exit", "traceback", "hang", "memory", "lines", "stray", "left", "check")  # kinds of problems
_TRACEBACK = re.compile(
    r"Traceback \(most recent call last\)|Fatal Python error|Exception ignored in|Exception in thread"
    r"|terminate called|^\*\*\* (?:SIG|Check)|dumped core|PC: @",
    re.MULTILINE,
)
_WARNING = re.compile(r"(?:\S{1,99}\s)?(?:warning|note)\b", re.IGNORECASE)
_SHOWN = 20_000  # length of a message that is judged, in characters
_PROGRESS = re.compile(r"\d%\||\d ?\w* \[\d\d:\d\d")  # tqdm
_CONTROL = re.compile(r"(?!\x1b\[A)[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x9b]")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that runs in a new folder.

    Arguments and environment variables may contain "<here>", the folder of the case, and parts of the
    sandbox, as "<images>": see `sandbox.PARTS`.
    """

    group: str
    name: str
    module: str  # run as `python -m MODULE`
    arguments: tuple[str, ...] = ()
    codes: tuple[int, ...] = (2,)  # allowed exit codes
    copies: tuple[str, ...] = ()  # parts of the sandbox to copy to <here>/NAME
    needs: tuple[str, ...] = ()  # other parts that `prepare` uses
    prepare: Callable[[Path, random.Random], None] | None = None  # damages files in <here>
    check: Callable[[Path, Result], str] | None = None  # returns another problem, or ""
    first: Callable[[], None] | None = None  # called in the process of the command before it
    environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)  # None unsets
    python: tuple[str, ...] | None = None  # options of a new interpreter; None: fork the harness
    redirect: str = ""  # in the syntax of the shell; needs `python`
    seconds: float = 60  # limit of wall time
    megabytes: int = 2000  # limit of memory, all processes together

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


@dataclasses.dataclass
class Result:
    """The result of a case."""

    command: tuple[str, ...]
    code: int | None = None  # negative for a signal
    killed: str = ""  # "hang" or "memory"
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    megabytes: float = 0.0
    stdout: str = ""
    stderr: str = ""
    strays: list[str] = dataclasses.field(default_factory=list)  # files outside its folder, or left in TMPDIR
    left: list[str] = dataclasses.field(default_factory=list)  # processes that outlived it
    reached: list[str] = dataclasses.field(default_factory=list)  # other machines that it tried to reach
    contacts: int = 0  # connections to the "<contact>" address


def problems(case: Case, result: Result, here: Path) -> dict[str, str]:
    """Return the problems of a result by kind; see `KINDS`."""
    found = {}
    output = result.stdout + result.stderr
    if result.killed:
        limit = f"{case.seconds:g} s" if result.killed == "hang" else f"{case.megabytes} MB"
        found[result.killed] = f"stopped above {limit}"
    elif result.megabytes > case.megabytes:
        found["memory"] = f"{result.megabytes:.0f} MB, above {case.megabytes}"
    if not result.killed and result.code not in case.codes:
        found["exit"] = f"exit code {result.code}, allowed: {', '.join(map(str, case.codes))}"
    if match := _TRACEBACK.search(output):
        found["traceback"] = output[match.start() :].split("\n", 1)[0]
    elif not result.killed and (wrong := _not_one_line(result)):
        found["lines"] = wrong
    if result.strays:
        found["stray"] = ", ".join(result.strays[:5])
    if result.left:
        found["left"] = ", ".join(result.left[:5])
    if result.reached:
        found["check"] = f"tried to reach other machines: {', '.join(result.reached[:3])}"
    elif result.contacts:
        found["check"] = f"{result.contacts} connections were opened"
    elif case.check and (wrong := case.check(here, result)):
        found["check"] = wrong
    return found


def _not_one_line(result: Result) -> str:
    """Return why the message of an error is not one clean line, or ""."""
    if match := _CONTROL.search(result.stdout + result.stderr):
        return f"control character {match[0]!r} in the output"
    if result.code not in (2, 75):
        return ""
    lines = message(result.stderr)
    if len(lines) != 1:
        return f"{len(lines)} lines of message"
    if result.code == 2 and "error: " not in lines[0]:
        return f"not an error line: {lines[0][:80]}"
    return ""


def message(stderr: str) -> list[str]:
    """Return the lines of stderr other than warnings and progress bars."""
    lines = re.split(r"\n|\r|\x1b\[A", stderr[:_SHOWN])
    return [
        line for line in lines if line.strip() and not (_PROGRESS.search(line[:500]) or _WARNING.match(line))
    ]


def describe(case: Case, result: Result, wrong: Mapping[str, str]) -> str:
    """Return a report of a failed case: reasons, command and the first lines of stderr."""
    lines = [f"{case}: {'; '.join(f'{kind}: {text}' for kind, text in wrong.items())}"]
    changed = [f"{key}={value}" for key, value in case.environment.items() if value is not None]
    command = shlex.join(["python", *(case.python or ()), "-m", *result.command])
    lines.append("  " + " ".join([*changed, command, case.redirect])[:500].rstrip())
    shown = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    last = shown[-1:] if len(shown) > 3 else []
    lines += [f"    {os.fsencode(line).decode(errors='replace')[:200]!r}" for line in [*shown[:3], *last]]
    return "\n".join(lines)
