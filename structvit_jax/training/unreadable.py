"""Examples that could not be read, or not whole: printed once, listed, and counted against a limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from etils import epath

from structvit_jax.runtime import processes
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import write
from structvit_jax.utils.errors import UserError

FILE = "unreadable.tsv"


class Unreadable:
    """The list WORKDIR/unreadable.tsv: split, example and reason, one line each.

    Examples of which frames were replaced are listed too, but do not count against the limit. The list
    outlives a restart; the limit applies to what this session has met, since files may have been fixed.
    """

    def __init__(self, workdir: epath.Path, train_examples: int, max_share: float):
        self._path = workdir / FILE
        self._limit, self._examples = max_share * train_examples, train_examples
        self._text = processes.broadcast_from_primary(self._read)
        self._listed = {tuple(line.split("\t")[:2]) for line in self._text.splitlines()}
        self._pending: list[tuple[str, str, str, str]] = []  # met by this process, not known to the others
        self._short: dict[str, dict[str, str]] = {}  # by split, clips with few frames and the reason
        self._reported: set[str] = set()  # splits whose number of these is printed
        self._met: dict[str, str] = {}  # training examples that count, with reasons

    def note(self, split: str, problems: Iterable[Any]) -> None:
        """Take the problems of a batch of a split; several processes print them at the next `exchange`.

        Raises:
          UserError: more of the training examples than config.data.max_unreadable_fraction are unreadable.
        """
        problems = [
            (split, problem.id, " ".join(problem.reason.split()), problem.kind) for problem in problems
        ]
        if split in self._reported:
            problems = [problem for problem in problems if problem[3] != "short"]
        if not problems:
            return
        self._pending += problems
        self._count(problems)
        if processes.process_shard()[1] == 1:
            self._merge()
        self._judge()

    def exchange(self) -> None:
        """Merge the problems of all processes; all have to call it. Print, once, how many clips are short.

        Raises as `note` does.
        """
        self._merge()
        for split in sorted(self._short.keys() - self._reported):
            names = self._short[split]
            clips = "1 clip has" if len(names) == 1 else f"{len(names)} clips have"
            log(f"note: {split}: {clips} {next(iter(names.values()))}; frames are repeated")
            self._reported.add(split)
        self._short.clear()
        self._judge()

    def _merge(self) -> None:
        everybody = [problem for mine in processes.allgather_object(self._pending) for problem in mine]
        self._pending.clear()
        self._count(everybody)
        for split, name, reason, kind in everybody:
            if kind == "short" and split not in self._reported:
                self._short.setdefault(split, {})[name] = reason
        new = [problem for problem in everybody if problem[3] != "short" and problem[:2] not in self._listed]
        new = list({problem[:2]: problem for problem in new}.values())
        for split, name, reason, kind in new:
            self._listed.add((split, name))
            self._text += f"{split}\t{name}\t{reason}\n"
            what = f"warning: {split} example left out" if kind == "unreadable" else f"note: {split} example"
            log(f"{what}, {name}: {reason}")
        if new and processes.is_primary():
            write(self._path, self._text)

    def _count(self, problems: Iterable[tuple[str, str, str, str]]) -> None:
        self._met |= {
            name: reason
            for split, name, reason, kind in problems
            if split == "train" and kind == "unreadable"
        }

    def _read(self) -> str:
        return self._path.read_bytes().decode(errors="replace") if self._path.exists() else ""

    def _judge(self):
        if len(self._met) > self._limit:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self._met.items())[:3])
            raise UserError(
                f"{len(self._met)} of {self._examples} training examples cannot be read, more than"
                f" config.data.max_unreadable_fraction allows ({some}); fix or remove those in {self._path}, or raise"
                " it"
            )
