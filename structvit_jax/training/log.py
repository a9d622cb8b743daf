"""What a run says and writes: progress lines, metrics.jsonl, TensorBoard events, result.json."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from tensorboardX import SummaryWriter

from structvit_jax.errors import UserError

_SECONDS_BETWEEN_LINES = 5.0
_STEPS_AHEAD = 2  # how many steps the host may run ahead of the devices


def say(line: str) -> None:
    print(line, flush=True)


def write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    _write_whole(path, json.dumps(value, indent=2) + "\n")


def _write_whole(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text(text)
    partial.replace(path)


class RunLog:
    """Collects a run's metrics and tells them.

    metrics.jsonl has one line per step, and one per evaluation; it holds nothing that depends on the
    clock, so that a resumed run ends with the same file as an uninterrupted one. Rates go to the
    progress lines and to TensorBoard.
    """

    def __init__(self, workdir: epath.Path, start_step: int, total_steps: int, batch_size: int, unit: str):
        self._path = workdir / "metrics.jsonl"
        self._total, self._batch, self._unit = total_steps, batch_size, unit
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._resumed_after = self._rewind(start_step)  # a final evaluation may have been written already
        self._board = SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=start_step + 1)
        self._since, self._waited = time.monotonic(), 0.0

    def step(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Notes a step's metrics (still on their way) and the seconds spent waiting for its batch."""
        self._pending.append((step, metrics))
        self._waited += waited
        if len(self._pending) > _STEPS_AHEAD:
            jax.block_until_ready(self._pending[-1 - _STEPS_AHEAD][1])
        if time.monotonic() - self._since >= _SECONDS_BETWEEN_LINES:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending to the files and says where the run is.

        Raises:
          UserError: a loss or gradient that is not finite; what follows it is not worth saving.
        """
        if not self._pending:
            return
        records = [{"step": step} | jax.tree.map(float, jax.device_get(m)) for step, m in self._pending]
        for record in records:
            if not math.isfinite(record["loss"] + record["grad_norm"]):
                raise UserError(
                    f"step {record['step']}: the loss is {record['loss']}, the gradient norm"
                    f" {record['grad_norm']}; earlier checkpoints are kept. Lower config.optimizer.lr,"
                    " or set config.optimizer.clip_norm"
                )
        seconds = time.monotonic() - self._since
        rate = len(records) * self._batch / seconds
        speed = {f"{self._unit}_per_second": rate, "data_wait": self._waited / seconds}
        self._append(records)
        for record in records:
            self._scalars("train", record)
        self._scalars("speed", {"step": records[-1]["step"], **speed})
        last = records[-1]
        eta = (self._total - last["step"]) * seconds / len(records)
        mean = {key: sum(r[key] for r in records) / len(records) for key in ("loss", "top1")}
        say(
            f"step {last['step']}/{self._total}  loss {mean['loss']:.4f}  top1 {mean['top1']:.3f}"
            f"  lr {last['lr']:.2e}  {rate:.1f} {self._unit}/s  data-wait {speed['data_wait']:.0%}"
            f"  ETA {_clock(eta)}"
        )
        self._pending.clear()
        self._since, self._waited = time.monotonic(), 0.0

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes an evaluation after a step, once."""
        self.flush()
        record = {"step": step} | {f"eval_{key}": value for key, value in scores.items()}
        if json.dumps(record) != self._resumed_after:
            self._append([record])
            self._scalars("eval", {"step": step, **scores})
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what was done since the last line (a save, an evaluation) out of the next one's rate."""
        self._since, self._waited = time.monotonic(), 0.0

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None:
            self.flush()
        self._board.close()

    def _append(self, records):
        with self._path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    def _scalars(self, group, record):
        for key, value in record.items():
            if key != "step":
                self._board.add_scalar(f"{group}/{key}", value, record["step"])

    def _rewind(self, step):
        """Drops what a run that was killed wrote after the checkpoint it resumes from; returns the last
        line that stays."""
        if not self._path.exists():
            return None
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # the line that the kill cut off
                continue
        _write_whole(self._path, "".join(line + "\n" for line in kept))
        return kept[-1] if kept else None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
