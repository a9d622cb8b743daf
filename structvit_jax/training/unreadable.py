"""Examples that could not be read: told once, listed in the workdir, and counted against a limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from etils import epath

from structvit_jax.errors import UserError
from structvit_jax.training import processes
from structvit_jax.training.processes import say
from structvit_jax.training.storage import write

FILE = "unreadable.tsv"


class Unreadable:
    """The list WORKDIR/unreadable.tsv: split, example and reason, a line each. It outlives a restart; what
    counts against the limit is what this session has met, since files may have been mended."""

    def __init__(self, workdir: epath.Path, train_examples: int, max_share: float):
        self._path = workdir / FILE
        self._limit, self._examples = max_share * train_examples, train_examples
        self._text = processes.decide(self._read)
        self._listed = {tuple(line.split("\t")[:2]) for line in self._text.splitlines()}
        self._pending: list[tuple[str, str, str]] = []  # met by this process, not known to the others
        self._met: dict[str, str] = {}  # training examples that count, with reasons

    def note(self, split: str, problems: Iterable[Any]) -> None:
        """Takes what batches of a split say; with several processes it is told at the next `exchange`.

        Raises:
          UserError: more of the training examples than config.data.max_bad_share are unreadable.
        """
        problems = [(split, problem.id, " ".join(problem.reason.split())) for problem in problems]
        if not problems:
            return
        self._pending += problems
        self._count(problems)
        if processes.share()[1] == 1:
            self.exchange()
        self._judge()

    def exchange(self) -> None:
        """Brings together what all processes have met; all have to call it. Raises as `note` does."""
        everybody = [problem for mine in processes.gather(self._pending) for problem in mine]
        self._pending.clear()
        self._count(everybody)
        new = [problem for problem in everybody if problem[:2] not in self._listed]
        new = list({problem[:2]: problem for problem in new}.values())
        for split, name, reason in new:
            self._listed.add((split, name))
            self._text += f"{split}\t{name}\t{reason}\n"
            say(f"warning: {split} example left out, {name}: {reason}")
        if new and processes.is_first():
            write(self._path, self._text)
        self._judge()

    def _read(self) -> str:
        return self._path.read_bytes().decode(errors="replace") if self._path.exists() else ""

    def _count(self, problems):
        self._met |= {name: reason for split, name, reason in problems if split == "train"}

    def _judge(self):
        if len(self._met) > self._limit:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self._met.items())[:3])
            raise UserError(
                f"{len(self._met)} of {self._examples} training examples cannot be read, more than"
                f" config.data.max_bad_share allows ({some}); mend or remove those in {self._path}, or raise"
                " it"
            )
