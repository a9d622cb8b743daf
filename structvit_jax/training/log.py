"""Log a run: progress lines, metrics.jsonl, skipped.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from structvit_jax.data.types import Dataset
from structvit_jax.runtime import process
from structvit_jax.runtime.goodput import Goodput, Progress
from structvit_jax.runtime.processes import available_cores, is_primary, log
from structvit_jax.runtime.storage import METRICS, write
from structvit_jax.utils.errors import UserError, parse_json
from structvit_jax.utils.paths import is_bucket

_SECONDS_BETWEEN_LINES = 5.0
_WRITING_FRACTION = 0.02  # of the time, at most: files are written whole, and they grow
_STEPS_AHEAD = 2  # number of steps that the host may run ahead of the devices


class RunLog:
    """Collects the metrics of a run, prints them and writes them to files.

    metrics.jsonl has one line per step and one per evaluation. It holds nothing that depends on the clock, so
    that a resumed run ends with the same file as an uninterrupted one; rates go to the progress lines and to
    TensorBoard. skipped.jsonl lists the examples of every step that was skipped because its loss or gradient
    was not finite. The primary process writes.
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
          workdir: of the run.
          start_step, total_steps: completed steps, and the last step.
          config: of the run.
          data: for the names of its examples.
          goodput: written together with the metrics.
          check_lock: raises an exception if this run may not write into the workdir any more.
        """
        self._check_lock = check_lock
        self._total, self._batch, self._unit = total_steps, config.data.batch_size, data.unit
        self._max_skipped, self._name_of = config.train.max_skipped, data.train_id
        self.goodput = goodput
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._metrics = _Lines(workdir / METRICS, start_step)
        self._skipped = _Lines(workdir / "skipped.jsonl", start_step)
        self._resumed_after = self._metrics.last()  # perhaps the final evaluation
        self._consecutive = self._metrics.skipped_at_the_end()
        self._board = _Board(workdir / "tensorboard", start_step) if is_primary() else None
        self._progress = Progress(config.data.workers, available_cores())
        self._started = False
        self._since, self._waited, self._next_write = time.monotonic(), 0.0, 0.0

    def step(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Record the metrics of a step.

        Args:
          step: its number.
          metrics: of the train step; may still be in computation.
          waited: seconds that the step waited for its batch.
        """
        self._pending.append((step, metrics))
        if self._started:
            self._waited += waited
        else:  # the first wait is for workers to start, and does not count
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
        rate = len(records) * self._batch / seconds
        speed = {f"{self._unit}_per_second": rate, "data_wait": self._waited / seconds}
        last = records[-1]
        self._scalars("speed", {"step": last["step"], **speed})
        self._progress.add(len(records), seconds, self._waited)
        eta = self._progress.remaining(self._total - last["step"])
        log(
            f"step {last['step']}/{self._total}  loss {_mean(records, 'loss'):.4f}"
            f"  top1 {_mean(records, 'top1'):.3f}  lr {last['lr']:.2e}  {rate:.1f} {self._unit}/s"
            f"  data-wait {speed['data_wait']:.0%}  ETA {_clock(eta)}"
        )
        if advice := self._progress.advice():
            log(advice)
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
        self.goodput.write()
        self._board.write()
        now = time.monotonic()
        self._next_write = now + (now - started) / _WRITING_FRACTION

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of an evaluation after a step, unless an earlier session did."""
        self.flush()
        record = {"step": step} | {f"eval_{key}": value for key, value in scores.items()}
        if json.dumps(record) != self._resumed_after:
            self._metrics.append(record)
            self._scalars("eval", {"step": step, **scores})
        self.write()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last progress line from the next rate, after a save or an evaluation."""
        self._since, self._waited = time.monotonic(), 0.0

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None:
            self.flush()
            self.write()
        if self._board is not None:
            self._board.close()

    def _record(self, step: int, metrics: dict[str, np.ndarray]) -> dict[str, Any]:
        """Record a step, and the examples of a skipped one; raise UserError after too many of these."""
        index, skipped = metrics.pop("index"), bool(metrics.pop("skipped"))
        values = {key: float(value) for key, value in metrics.items()}
        record = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        record |= {"skipped": 1} if skipped else {}
        self._metrics.append(record)
        self._scalars("train", record)
        self._consecutive = self._consecutive + 1 if skipped else 0
        if not skipped:
            return record
        reason = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        names = [self._name_of(int(i)) for i in index]
        self._skipped.append({"step": step, "reason": reason, "examples": names})
        log(f"warning: step {step} skipped, {reason}; its examples are in {self._skipped.path}")
        if self._consecutive >= self._max_skipped and is_primary():  # others do not read earlier ones
            self.write()
            raise UserError(
                f"step {step}: the loss or the gradient was not finite in {self._consecutive} steps in a row"
                f" ({reason}); they changed no parameter, and earlier checkpoints are kept. Lower"
                " config.optimizer.lr, set config.optimizer.clip_norm, or look at the examples in"
                f" {self._skipped.path}"
            )
        return record

    def _scalars(self, group: str, record: Mapping[str, Any]) -> None:
        if self._board is not None:
            self._board.add(group, record)


class _Lines:
    """A file of JSON lines in the order of their steps, kept in memory and written whole."""

    def __init__(self, path: epath.Path, step: int):
        """Read the lines up to `step`; drop later ones of a killed run, and damaged ones."""
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
    """Writes TensorBoard events; for a bucket into a local folder first, from which they are copied."""

    def __init__(self, folder: epath.Path, start_step: int):
        # tensorboardX imports these if they are installed, which takes seconds, and does not need them here.
        with process.hidden_modules("torch", "google.cloud.storage"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        self._event = Event
        self._folder, self._local = folder, folder
        if is_bucket(folder):
            self._scratch = tempfile.TemporaryDirectory()
            self._local = epath.Path(self._scratch.name)
        # Not a SummaryWriter: its thread would end on a full disk, and the run would wait for it forever.
        self._local.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(os.fspath(self._local / "events"))
        self._events.write_event(Event(step=start_step + 1, file_version="brain.Event:2"))
        restart = SessionLog(status=SessionLog.START)  # hides earlier events of later steps
        self._events.write_event(Event(step=start_step + 1, session_log=restart))

    def add(self, group: str, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and value is not None:
                event = self._event(step=record["step"], wall_time=time.time())
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
