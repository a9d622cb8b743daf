"""Examples that could not be read: told once, listed in the workdir, and counted against a limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from etils import epath

from structvit_jax.errors import UserError
from structvit_jax.training.log import say

FILE = "unreadable.tsv"


class Unreadable:
    """The list WORKDIR/unreadable.tsv: split, example and reason, a line each. It outlives a restart; what
    counts against the limit is what this process has met, since files may have been mended."""

    def __init__(self, workdir: epath.Path, train_examples: int, max_share: float):
        self._path = workdir / FILE
        self._limit, self._examples = max_share * train_examples, train_examples
        text = self._path.read_text() if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
        if whole != text:
            self._path.write_text(whole)
        self._listed = {tuple(line.split("\t")[:2]) for line in whole.splitlines()}
        self._met: set[str] = set()

    def note(self, split: str, problems: Iterable[Any]) -> None:
        """Takes what batches of a split say.

        Raises:
          UserError: more of the training examples than config.data.max_bad_share are unreadable.
        """
        for problem in problems:
            reason = " ".join(problem.reason.split())
            if split == "train":
                self._met.add(problem.id)
            if (split, problem.id) not in self._listed:
                self._listed.add((split, problem.id))
                with self._path.open("a") as file:
                    file.write(f"{split}\t{problem.id}\t{reason}\n")
                say(f"warning: {split} example left out, {problem.id}: {reason}")
        if len(self._met) > self._limit:
            raise UserError(
                f"{len(self._met)} of {self._examples} training examples cannot be read, more than"
                f" config.data.max_bad_share allows; mend or remove those in {self._path}, or raise it"
            )
