"""Attack the commands with bad command lines, damaged files and unusual environments; count failures.

    python tests/tools/hostile.py [--only PATTERN ...] [--list] [--sample] [--self] [--seed 0] [--jobs 2]
        [--keep DIR]

A command may refuse its input, in one line and with exit code 2 (or 75 if the same command may work later).
It must not print a traceback, hang, exceed its memory, write outside its folders or leave a process behind.
Each case in tests/tools/attacks states its allowed exit codes. Exits with 1 if a case fails. Only the
loopback interface of this machine is contacted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import importlib
import os
import pkgutil
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most programs take longer to compile than to run

from attacks import self_cases
from attacks.case import KINDS, Case, Result, describe, problems
from attacks.runner import Runner
from attacks.sandbox import PARTS, Sandbox, needed

_TABLES = (
    *("command_line", "place", "extreme", "key", "configuration", "media"),
    *("list", "checkpoint", "log", "data", "weights", "environment"),
)
_SAMPLE = (  # runs in seconds and needs no trained model
    "flags: main: --mode=nonsense",
    "flags: structvit: *",
    "flags: prepare shards: --shards=-1",
    "flags: plan --program: --parts=x",
    "flags: predict: help",
    "places: prepare to <here>/file/x",
    "places: predict of /dev/null/x",
    "keys: train.seed=*",
    "configurations: show: raises KeyError",
    "configurations: show: returns nothing",
    "configurations: show: a fifo",
    "lists: labels.txt, byte order mark: rewritten",
    "lists: labels.txt, Latin-1: show",
    "lists: train.csv, labels of 5,000 digits: show",
    "lists: train.jsonl, nested: show",
    "lists: train.csv, a fifo: show",
    "media: check bad_images/bomb_square.png",
    "media: check bad_images/eps_named.jpg",
)


def select(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options select."""
    if options.self:
        return list(self_cases.cases())
    tables = (importlib.import_module(f"attacks.{name}_cases") for name in _TABLES)
    cases = [case for table in tables for case in table.cases()]
    names = collections.Counter(map(str, cases))
    assert not (twice := [name for name, count in names.items() if count > 1]), (
        f"names are not unique: {twice}"
    )
    patterns = [*options.only, *(_SAMPLE if options.sample else ())] or ["*"]
    return [case for case in cases if any(_matches(str(case), pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def parts_of(cases: Iterable[Case]) -> list[str]:
    """Return the parts of the sandbox that cases need, in the order in which to make them."""
    texts = [text for case in cases for text in (*case.arguments, *map(str, case.environment.values()))]
    texts += [f"<{part}>" for case in cases for part in (*case.copies, *case.needs)]
    return needed(texts)


def build(runner: Runner, parts: Iterable[str]) -> None:
    """Make parts of the sandbox, or exit with the output of the command that failed."""
    for part in parts:
        module, arguments = PARTS[part]
        case = Case("sandbox", part, module, arguments, codes=(0,), seconds=300, megabytes=6000)
        for _, result, _ in runner.run([case]):
            if result.code:
                sys.exit(f"the sandbox's {part} could not be made:\n{result.stdout}{result.stderr}")


def table(groups: dict[str, list[tuple[Result, dict[str, str]]]]) -> Iterator[str]:
    """Yield a line with the counts of each group."""
    yield f"{'group':15} cases  good " + "".join(f"{kind:>10}" for kind in KINDS) + "  slowest  largest"
    everything = [row for rows in groups.values() for row in rows]
    for name, rows in [*groups.items(), ("all", everything)]:
        counts = [sum(kind in wrong for _, wrong in rows) for kind in KINDS]
        slowest = max((result.seconds for result, _ in rows), default=0)
        largest = max((result.megabytes for result, _ in rows), default=0)
        good = sum(not wrong for _, wrong in rows)
        columns = "".join(f"{count or '.':>10}" for count in counts)
        yield f"{name:15} {len(rows):5} {good:5} {columns} {slowest:6.1f} s {largest:5.0f} MB"


def attack(runner: Runner, cases: Sequence[Case], *, keep: bool) -> list[tuple[Case, Result, dict[str, str]]]:
    """Run the cases, and print those that fail as they end."""
    finished = []
    for case, result, here in runner.run(cases):
        wrong = problems(case, result, here)
        finished.append((case, result, wrong))
        if wrong:
            print(describe(case, result, wrong), flush=True)
        if not (wrong and keep):
            for path in (here, *here.parent.glob(f"{here.name}.*")):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if len(finished) % 100 == 0:
            print(f"... {len(finished)} of {len(cases)}", flush=True)
    return finished


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="as 'cards: *'")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and exit")
    parser.add_argument("--sample", action="store_true", help="run the cases of test_hostile.py")
    parser.add_argument("--self", action="store_true", help="check that misbehaving commands are detected")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage to files")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--keep", type=Path, help="folder of the sandbox, which is kept and reused")
    options = parser.parse_args()
    cases = select(options)
    if options.list:
        print(*cases, sep="\n")
        return 0
    started = time.monotonic()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="hostile_"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # remove the sandbox
    try:
        finished = _run(options, cases, folder.resolve())
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    groups: dict[str, list[tuple[Result, dict[str, str]]]] = {}
    for case, result, wrong in finished:
        groups.setdefault(case.group, []).append((result, wrong))
    print("", *table(groups), sep="\n")
    slowest = sorted(finished, key=lambda row: -row[1].seconds)[:5]
    print("slowest:", "; ".join(f"{case} ({result.seconds:.0f} s)" for case, result, _ in slowest))
    failed = sum(bool(wrong) for _, _, wrong in finished)
    wall, used = time.monotonic() - started, sum(result.cpu_seconds for _, result, _ in finished)
    print(f"{len(finished)} cases, {failed} failed; {wall / 60:.1f} minutes, {used / 60:.1f} CPU minutes")
    if options.self:
        return int(any(set(wrong) != self_cases.EXPECTED[case.name] for case, _, wrong in finished))
    return int(failed > 0 or not finished)


def _import_package() -> None:
    """Import every module of the package but the entry points, so that the forks for cases need not."""
    import structvit_jax

    for module in pkgutil.walk_packages(structvit_jax.__path__, "structvit_jax."):
        if not re.search(r"\.(?:configs\b|main$|__main__$)", module.name):
            importlib.import_module(module.name)


def _run(
    options: argparse.Namespace, cases: Sequence[Case], folder: Path
) -> list[tuple[Case, Result, dict[str, str]]]:
    if not options.self:
        _import_package()
        import jax

        if jax.__version_info__ < (0, 11):  # compiles in half the time; unknown to later versions
            os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
    sandbox = Sandbox(folder, options.seed)
    with contextlib.closing(Runner(sandbox, jobs=options.jobs, seed=options.seed)) as runner:
        build(runner, [part for part in parts_of(cases) if not sandbox.path(part).exists()])
        if not options.self:
            print(f"{len(cases)} cases in {folder}", flush=True)
        return attack(runner, cases, keep=bool(options.keep))


if __name__ == "__main__":
    sys.exit(main())
