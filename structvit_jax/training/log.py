"""Log a run: progress lines, metrics.jsonl, skipped.jsonl, unreadable.tsv and TensorBoard events."""

from __future__ import annotations

import collections
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from structvit_jax.data.types import Dataset, Problem
from structvit_jax.runtime import process, processes
from structvit_jax.runtime.goodput import Goodput, Interval, Progress
from structvit_jax.runtime.processes import is_primary, log
from structvit_jax.runtime.storage import METRICS, write
from structvit_jax.training.input_advice import advise
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import parse_json
from structvit_jax.utils.paths import is_bucket

_SECONDS_BETWEEN_LINES = 5.0
_WRITING_FRACTION = 0.02  # largest fraction of the time to spend on writing: every write rewrites whole files
_STEPS_AHEAD = 2  # number of steps that the host may run ahead of the devices


class RunLog:
    """Collect the metrics of a run, print them and write them to files.

    metrics.jsonl has one line per step and one per evaluation. It holds nothing that depends on the clock, so
    a resumed run ends with the same file as an uninterrupted one. Rates go to the progress lines and to
    TensorBoard. skipped.jsonl lists the examples of every step that was skipped because its loss or gradient
    was not finite. Only the primary process writes.
    """

    def __init__(
        self,
        workdir: epath.Path,
        start_step: int,
        total_steps: int,
        config: ml_collections.ConfigDict,
        data: Dataset,
        goodput: Goodput,
        check_lock: Callable[[], None],
    ):
        """Open the logs of a run.

        Args:
          workdir: the folder of the run.
          start_step, total_steps: number of completed steps, and of all steps of the run.
          config: the configuration of the run.
          data: the data set, which names the examples of skipped steps.
          goodput: the goodput, which is written together with the metrics.
          check_lock: raises an exception if another run has taken the workdir.
        """
        self._check_lock = check_lock
        self._total, self._batch, self._unit = total_steps, config.data.batch_size, data.unit
        self._max_skipped, self._name_of = config.train.max_skipped, data.train_id
        self._goodput = goodput
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._metrics = _Lines(workdir / METRICS, start_step)
        self._skipped = _Lines(workdir / "skipped.jsonl", start_step)
        self._last_line = self._metrics.last()  # if it is the final evaluation, it is not logged again
        self._consecutive = self._metrics.skipped_at_the_end()
        self._board = _Board(workdir / "tensorboard", start_step) if is_primary() else None
        self._progress, self._config = Progress(), config
        self._started = False
        self._since, self._waited, self._next_write = time.monotonic(), 0.0, 0.0
        self._reading = collections.Counter[str]()

    def step(
        self, step: int, metrics: dict[str, jax.Array], waited: float, reading: Mapping[str, float]
    ) -> None:
        """Record the metrics of a step.

        Args:
          step: number of the step.
          metrics: results of the train step, which the devices may still be computing.
          waited: seconds that the devices were idle because the step waited for its batch.
          reading: seconds that each stage of reading took for the batch.
        """
        self._pending.append((step, metrics))
        self._reading.update(reading)  # adds
        if self._started:
            self._waited += waited
        else:  # the first wait does not count: it includes the start of the workers
            self._started, self._since = True, self._since + waited
        if len(self._pending) > _STEPS_AHEAD:
            jax.block_until_ready(self._pending[-1 - _STEPS_AHEAD][1])
        if time.monotonic() - self._since >= _SECONDS_BETWEEN_LINES:
            self.flush()
            if time.monotonic() >= self._next_write:
                self.write()

    def flush(self) -> None:
        """Collect pending metrics and print a progress line.

        Raises:
          UserError: config.train.max_skipped consecutive steps were skipped.
        """
        if not self._pending:
            return
        records = [self._record(step, jax.device_get(metrics)) for step, metrics in self._pending]
        seconds = time.monotonic() - self._since
        rate, data_wait = len(records) * self._batch / seconds, self._waited / seconds
        last = records[-1]
        self._scalars("speed", last["step"], {f"{self._unit}_per_second": rate, "data_wait": data_wait})
        self._progress.add(Interval(len(records), seconds, self._waited, self._reading))
        eta = self._progress.remaining(self._total - last["step"])
        log(
            f"step {last['step']}/{self._total}  loss {_mean(records, 'loss'):.4f}"
            f"  top1 {_mean(records, 'top1'):.3f}  lr {last['lr']:.2e}  {rate:.1f} {self._unit}/s"
            f"  data-wait {data_wait:.0%}  ETA {_clock(eta)}"
        )
        if wait := self._progress.data_wait():
            log(advise(wait, self._config))
        self._pending.clear()
        self.restart_clock()

    def write(self) -> None:
        """Write all files, so that they are complete if the run ends here."""
        if self._board is None:
            return
        self._check_lock()
        started = time.monotonic()
        self._metrics.write()
        self._skipped.write()
        self._goodput.write()
        self._board.write()
        now = time.monotonic()
        self._next_write = now + (now - started) / _WRITING_FRACTION

    def evaluation(self, step: int, scores: Mapping[str, Any]) -> None:
        """Record the scores of an evaluation after a step, unless an earlier session has recorded them."""
        self.flush()
        record = {"step": step} | {f"eval_{key}": value for key, value in scores.items()}
        if json.dumps(record) != self._last_line:
            self._metrics.append(record)
            self._scalars("eval", step, scores)
        self.write()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start to measure the next rate now, so that it excludes the time of a save or an evaluation."""
        self._since, self._waited = time.monotonic(), 0.0
        self._reading = collections.Counter[str]()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None:
            self.flush()
            self.write()
        if self._board is not None:
            self._board.close()

    def _record(self, step: int, metrics: dict[str, np.ndarray]) -> dict[str, Any]:
        """Record a step; if it was skipped, also record its examples.

        Raises:
          UserError: too many consecutive steps were skipped.
        """
        index, skipped = metrics.pop("index"), bool(metrics.pop("skipped"))
        values = {key: float(value) for key, value in metrics.items()}
        scalars = {key: value if math.isfinite(value) else None for key, value in values.items()}
        scalars |= {"skipped": 1} if skipped else {}
        record = {"step": step} | scalars
        self._metrics.append(record)
        self._scalars("train", step, scalars)
        self._consecutive = self._consecutive + 1 if skipped else 0
        if not skipped:
            return record
        reason = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        names = [self._name_of(int(i)) for i in index]
        self._skipped.append({"step": step, "reason": reason, "examples": names})
        log(f"warning: step {step} skipped ({reason}); its examples are listed in {self._skipped.path}")
        # Only the primary process knows the skipped steps of earlier sessions.
        if self._consecutive >= self._max_skipped and is_primary():
            self.write()
            raise UserError(
                f"step {step}: the loss or the gradient was not finite in {self._consecutive} steps in a row"
                f" ({reason}); they changed no parameter, and earlier checkpoints are kept. Lower"
                " config.optimizer.lr, set config.optimizer.clip_norm, or look at the examples in"
                f" {self._skipped.path}"
            )
        return record

    def _scalars(self, group: str, step: int, values: Mapping[str, float | None]) -> None:
        if self._board is not None:
            self._board.add(group, step, values)


class _Lines:
    """A file of JSON lines in the order of their steps, kept in memory. A write rewrites the whole file."""

    def __init__(self, path: epath.Path, step: int):
        """Read the lines up to `step`. Drop damaged lines, and lines of later steps, left by a killed run."""
        self.path, self._lines = path, list[str]()
        content = path.read_bytes() if is_primary() and path.exists() else b""
        for line in content.splitlines():
            try:
                if parse_json(line)["step"] <= step:
                    self._lines.append(line.decode())
            except (ValueError, KeyError, TypeError):  # damaged
                continue
        self._written = content

    def append(self, record: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(record))

    def last(self) -> str | None:
        return self._lines[-1] if self._lines else None

    def skipped_at_the_end(self) -> int:
        """Return how many of the last steps were skipped in a row."""
        count = 0
        for line in reversed(self._lines):
            record = json.loads(line)
            if "skipped" not in record and "loss" in record:
                break
            count += "skipped" in record
        return count

    def write(self) -> None:
        content = "".join(line + "\n" for line in self._lines).encode()
        if content != self._written:
            write(self.path, content)
            self._written = content


class _Board:
    """Write TensorBoard events. For a bucket, write them to a local folder and copy them."""

    def __init__(self, folder: epath.Path, start_step: int):
        # tensorboardX imports these modules if they are installed. It does not need them here, and importing
        # them takes seconds.
        with process.hidden_modules("torch", "google.cloud.storage"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        self._event = Event
        self._folder, self._local = folder, folder
        if is_bucket(folder):
            self._scratch = tempfile.TemporaryDirectory()
            self._local = epath.Path(self._scratch.name)
        # Not a SummaryWriter: its thread ends if the disk is full, and the run would wait for it forever.
        self._local.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(os.fspath(self._local / "events"))
        self._events.write_event(Event(step=start_step + 1, file_version="brain.Event:2"))
        restart = SessionLog(status=SessionLog.START)  # hides earlier events of later steps
        self._events.write_event(Event(step=start_step + 1, session_log=restart))

    def add(self, group: str, step: int, values: Mapping[str, float | None]) -> None:
        for key, value in values.items():
            if value is not None:
                event = self._event(step=step, wall_time=time.time())
                event.summary.value.add(tag=f"{group}/{key}", simple_value=value)
                self._events.write_event(event)

    def write(self) -> None:
        self._events.flush()
        if self._local != self._folder:
            for path in self._local.iterdir():
                write(self._folder / path.name, path.read_bytes())

    def close(self) -> None:
        self._events.close()


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [record[key] for record in records if record[key] is not None]
    return sum(values) / len(values) if values else math.nan


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Unreadable:
    """The list WORKDIR/unreadable.tsv of unreadable examples: split, example and reason, one line each.

    Examples with replaced frames are also listed, but do not count against the limit of unreadable training
    examples. The list is kept when a run resumes, but only the examples of this session count against the
    limit: files may have been fixed since earlier sessions.
    """

    def __init__(self, workdir: epath.Path, train_examples: int, max_fraction: float):
        """Read the list of earlier sessions, if there is one.

        Args:
          workdir: the folder of the list.
          train_examples: number of training examples.
          max_fraction: largest fraction of these that may be unreadable.
        """
        self._path = workdir / "unreadable.tsv"
        self._limit, self._examples = max_fraction * train_examples, train_examples
        self._text = processes.broadcast_from_primary(self._read)
        self._listed = {tuple(line.split("\t")[:2]) for line in self._text.splitlines()}
        # (split, problem), found by this process and not yet known to the others
        self._pending: list[tuple[str, Problem]] = []
        # split -> clip -> reason, for clips that are shorter than the model's input
        self._short: dict[str, dict[str, str]] = {}
        self._reported: set[str] = set()  # splits whose short clips have been reported
        self._unreadable: dict[str, str] = {}  # training example -> reason

    def note(self, split: str, problems: Iterable[Problem]) -> None:
        """Add the problems of a batch. With several processes they are logged at the next `exchange`.

        Raises:
          UserError: more than config.data.max_unreadable_fraction of the training examples are unreadable.
        """
        entries = [(split, p) for p in problems if p.kind != "short" or split not in self._reported]
        if not entries:
            return
        self._pending += entries
        self._count(entries)
        if not processes.is_multiprocess():
            self._merge()
        self._check_limit()

    def exchange(self) -> None:
        """Merge the problems of all processes; log the number of short clips, once per split.

        All processes must call this together.

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
        grown = False
        for split, problem in entries:
            name, reason = problem.id, " ".join(problem.reason.split())
            if problem.kind == "short":
                if split not in self._reported:
                    self._short.setdefault(split, {})[name] = reason
            elif (split, name) not in self._listed:
                self._listed.add((split, name))
                self._text += f"{split}\t{name}\t{reason}\n"
                grown = True
                kind, left_out = ("warning", " left out") if problem.left_out else ("note", "")
                log(f"{kind}: {split} example {name}{left_out}: {reason}")
        if grown and is_primary():
            write(self._path, self._text)

    def _count(self, entries: Iterable[tuple[str, Problem]]) -> None:
        self._unreadable |= {p.id: p.reason for split, p in entries if split == "train" and p.left_out}

    def _read(self) -> str:
        return self._path.read_bytes().decode(errors="replace") if self._path.exists() else ""

    def _check_limit(self) -> None:
        if len(self._unreadable) > self._limit:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self._unreadable.items())[:3])
            raise UserError(
                f"{len(self._unreadable)} of {self._examples} training examples cannot be read, more than"
                f" config.data.max_unreadable_fraction allows ({some}); fix or remove those in {self._path},"
                " or raise this limit"
            )
