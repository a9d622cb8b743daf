"""Output of a run in progress: progress lines, metrics.jsonl, skipped.jsonl, TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from structvit_jax.runtime.goodput import Goodput, Progress
from structvit_jax.runtime.processes import available_cores, is_primary, log
from structvit_jax.runtime.storage import METRICS, write
from structvit_jax.utils.errors import UserError, parse_json
from structvit_jax.utils.paths import is_bucket

# tensorboardX imports these where they are installed, which takes seconds; it is given no tensor, no bucket.
_UNUSED = [name for name in ("torch", "google.cloud.storage") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_UNUSED))  # type: ignore[arg-type]
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
finally:
    for _name in _UNUSED:
        del sys.modules[_name]

_SECONDS_BETWEEN_LINES = 5.0
_SHARE_OF_WRITING = 0.02  # of the time, at most: whole files are written, and they grow
_STEPS_AHEAD = 2  # how many steps the host may run ahead of the devices


class RunLog:
    """Collects a run's metrics and tells them.

    metrics.jsonl has one line per step, and one per evaluation; it holds nothing that depends on the
    clock, so that a resumed run ends with the same file as an uninterrupted one. Rates go to the
    progress lines and to TensorBoard. skipped.jsonl names the examples of every step that was skipped
    because its loss or gradient was not finite. Of several processes the first one writes.
    """

    def __init__(
        self,
        workdir: epath.Path,
        start_step: int,
        total_steps: int,
        config: Any,
        data: Any,
        goodput: Goodput,
        may_write: Callable[[], None],
    ):
        """`may_write` raises if the workdir is not ours any more."""
        self._may_write = may_write
        self._total, self._batch, self._unit = total_steps, config.data.batch_size, data.unit
        self._max_skipped, self._name_of = config.train.max_skipped, data.train_id
        self._goodput = goodput
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._metrics = _Lines(workdir / METRICS, start_step)
        self._skipped = _Lines(workdir / "skipped.jsonl", start_step)
        last = self._metrics.last()
        self._resumed_after = last  # a final evaluation may have been written already
        self._in_row = self._metrics.skipped_at_the_end()
        self._board = _Board(workdir / "tensorboard", start_step) if is_primary() else None
        self._progress = Progress(config.data.workers, available_cores())
        self._started = False
        self._since, self._waited, self._next_write = time.monotonic(), 0.0, 0.0

    def step(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Record a step's metrics, which may not be computed yet, and the seconds that its batch took."""
        self._pending.append((step, metrics))
        if self._started:
            self._waited += waited
        else:  # for workers to start, which is not part of the speed
            self._started, self._since = True, self._since + waited
        if len(self._pending) > _STEPS_AHEAD:
            jax.block_until_ready(self._pending[-1 - _STEPS_AHEAD][1])
        if time.monotonic() - self._since >= _SECONDS_BETWEEN_LINES:
            self.flush()
            if time.monotonic() >= self._next_write:
                self.write()

    def flush(self) -> None:
        """Collect the pending metrics and print a progress line.

        Raises:
          UserError: as many steps in a row as config.train.max_skipped were skipped.
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
        """Writes the files, as they are to be if the run ended here."""
        if self._board is None:
            return
        self._may_write()
        started = time.monotonic()
        self._metrics.write()
        self._skipped.write()
        self._goodput.write()
        self._board.write()
        now = time.monotonic()
        self._next_write = now + (now - started) / _SHARE_OF_WRITING

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes an evaluation after a step, once."""
        self.flush()
        record = {"step": step} | {f"eval_{key}": value for key, value in scores.items()}
        if json.dumps(record) != self._resumed_after:
            self._metrics.append(record)
            self._scalars("eval", {"step": step, **scores})
        self.write()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last progress line (a save, an evaluation) from the next rate."""
        self._since, self._waited = time.monotonic(), 0.0

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None:
            self.flush()
            self.write()
        if self._board is not None:
            self._board.close()

    def _record(self, step, metrics):
        """Notes a step, and of a skipped one the examples; too many of these in a row end the run."""
        index, skipped = metrics.pop("index"), bool(metrics.pop("skipped"))
        values = {key: float(value) for key, value in metrics.items()}
        record = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        record |= {"skipped": 1} if skipped else {}
        self._metrics.append(record)
        self._scalars("train", record)
        self._in_row = self._in_row + 1 if skipped else 0
        if not skipped:
            return record
        reason = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        names = [self._name_of(int(i)) for i in index]
        self._skipped.append({"step": step, "reason": reason, "examples": names})
        log(f"warning: step {step} skipped, {reason}; its examples are in {self._skipped.path}")
        if self._in_row >= self._max_skipped and is_primary():  # the others may not know of earlier ones
            self.write()
            raise UserError(
                f"step {step}: the loss or the gradient was not finite in {self._in_row} steps in a row"
                f" ({reason}); they changed no parameter, and earlier checkpoints are kept. Lower"
                " config.optimizer.lr, set config.optimizer.clip_norm, or look at the examples in"
                f" {self._skipped.path}"
            )
        return record

    def _scalars(self, group, record):
        if self._board is not None:
            self._board.add(group, record)


class _Lines:
    """A file of JSON lines in order of their steps; kept in memory, written whole."""

    def __init__(self, path: epath.Path, step: int):
        """Drop what a run that was killed wrote after the step that it resumes from, and damaged lines."""
        self.path, self._lines = path, list[str]()
        content = path.read_bytes() if is_primary() and path.exists() else b""
        for line in content.splitlines():
            try:
                if parse_json(line)["step"] <= step:
                    self._lines.append(line.decode())
            except (ValueError, KeyError, TypeError):  # not a line that a run writes
                continue
        self._written = content

    def append(self, record: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(record))

    def last(self) -> str | None:
        return self._lines[-1] if self._lines else None

    def skipped_at_the_end(self) -> int:
        """How many of the last steps were skipped in a row."""
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
    """TensorBoard events; those for a bucket are written to a local folder and copied."""

    def __init__(self, folder: epath.Path, start_step: int):
        self._folder, self._local = folder, folder
        if is_bucket(folder):
            self._scratch = tempfile.TemporaryDirectory()
            self._local = epath.Path(self._scratch.name)
        # not a SummaryWriter: its thread would die of a full disk, and the run wait for it for ever
        self._local.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(os.fspath(self._local / "events"))
        self._events.write_event(Event(step=start_step + 1, file_version="brain.Event:2"))
        restart = SessionLog(status=SessionLog.START)  # hides what was written of later steps
        self._events.write_event(Event(step=start_step + 1, session_log=restart))

    def add(self, group: str, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and value is not None:
                event = Event(step=record["step"], wall_time=time.time())
                event.summary.value.add(tag=f"{group}/{key}", simple_value=value)
                self._events.write_event(event)

    def write(self) -> None:
        self._events.flush()
        if self._local != self._folder:
            for path in self._local.iterdir():
                write(self._folder / path.name, path.read_bytes())

    def close(self) -> None:
        self._events.close()


def _mean(records, key):
    values = [record[key] for record in records if record[key] is not None]
    return sum(values) / len(values) if values else math.nan


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
