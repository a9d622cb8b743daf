"""Unreadable and repaired examples: log each once, list it in a file, and enforce a limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from etils import epath

from structvit_jax.data.types import Problem
from structvit_jax.runtime import processes
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import write
from structvit_jax.utils.errors import UserError

FILE = "unreadable.tsv"


class _Entry(NamedTuple):
    """A problem of an example, which processes can exchange."""

    split: str  # "train" or "test"
    name: str
    reason: str
    kind: str  # see `structvit_jax.data.Problem`

    @property
    def key(self) -> tuple[str, str]:
        return self.split, self.name


class Unreadable:
    """The list WORKDIR/unreadable.tsv: split, example and reason, one line each.

    Examples with replaced frames are listed, too, but do not count against the limit. The list survives a
    restart. The limit applies to this session alone, since files may have been fixed.
    """

    def __init__(self, workdir: epath.Path, train_examples: int, max_fraction: float):
        """Args: `workdir`, of the file; `train_examples`, of which `max_fraction` may be unreadable."""
        self._path = workdir / FILE
        self._limit, self._examples = max_fraction * train_examples, train_examples
        self._text = processes.broadcast_from_primary(self._read)
        self._listed = {tuple(line.split("\t")[:2]) for line in self._text.splitlines()}
        self._pending: list[_Entry] = []  # of this process, unknown to the others
        self._short: dict[str, dict[str, str]] = {}  # reasons by split and clip, of clips with few frames
        self._reported: set[str] = set()  # splits whose short clips have been reported
        self._unreadable: dict[str, str] = {}  # reasons by training example

    def note(self, split: str, problems: Iterable[Problem]) -> None:
        """Add the problems of a batch. With several processes they are logged at the next `exchange`.

        Raises:
          UserError: a larger fraction of the training examples than config.data.max_unreadable_fraction is
            unreadable.
        """
        entries = [_Entry(split, p.id, " ".join(p.reason.split()), p.kind) for p in problems]
        if split in self._reported:
            entries = [entry for entry in entries if entry.kind != "short"]
        if not entries:
            return
        self._pending += entries
        self._count(entries)
        if not processes.is_multiprocess():
            self._merge()
        self._check_limit()

    def exchange(self) -> None:
        """Merge the problems of all processes, which must all call this; log the number of short clips once.

        Raises:
          UserError: as for `note`.
        """
        self._merge()
        for split in sorted(self._short.keys() - self._reported):
            names = self._short[split]
            clips = "1 clip has" if len(names) == 1 else f"{len(names)} clips have"
            log(f"note: {split}: {clips} {next(iter(names.values()))}; frames are repeated")
            self._reported.add(split)
        self._short.clear()
        self._check_limit()

    def _merge(self) -> None:
        entries = [entry for own in processes.allgather_object(self._pending) for entry in own]
        self._pending.clear()
        self._count(entries)
        for entry in entries:
            if entry.kind == "short" and entry.split not in self._reported:
                self._short.setdefault(entry.split, {})[entry.name] = entry.reason
        new = {e.key: e for e in entries if e.kind != "short" and e.key not in self._listed}
        for split, name, reason, kind in new.values():
            self._listed.add((split, name))
            self._text += f"{split}\t{name}\t{reason}\n"
            what = f"warning: {split} example left out" if kind == "unreadable" else f"note: {split} example"
            log(f"{what}, {name}: {reason}")
        if new and processes.is_primary():
            write(self._path, self._text)

    def _count(self, entries: Iterable[_Entry]) -> None:
        self._unreadable |= {
            name: reason for split, name, reason, kind in entries if (split, kind) == ("train", "unreadable")
        }

    def _read(self) -> str:
        return self._path.read_bytes().decode(errors="replace") if self._path.exists() else ""

    def _check_limit(self) -> None:
        if len(self._unreadable) > self._limit:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self._unreadable.items())[:3])
            raise UserError(
                f"{len(self._unreadable)} of {self._examples} training examples cannot be read, more than"
                f" config.data.max_unreadable_fraction allows ({some}); fix or remove those in {self._path},"
                " or raise it"
            )
