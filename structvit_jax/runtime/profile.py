"""Profile a range of training steps, for xprof and TensorBoard."""

from __future__ import annotations

import re
import tempfile

import jax
from etils import epath

from structvit_jax.runtime.processes import log, process_shard
from structvit_jax.runtime.storage import write
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.paths import is_bucket

FOLDER = "profile"


def steps_to_profile(text: str) -> range:
    """Parse "START:STOP", which selects the steps START to STOP - 1; "" selects no step.

    Raises:
      UserError: the text has another format, or the range is empty.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) < int(match[2]):
        raise UserError(f"--profile={text}: use START:STOP, for example 10:13 for steps 10 to 12")
    return range(int(match[1]), int(match[2]))


class Profile:
    """Profile steps and write the result to WORKDIR/profile.

    With several processes, process N writes to WORKDIR/profile/process-N.
    """

    def __init__(self, steps: range, workdir: epath.Path, start: int):
        self._steps = range(max(steps.start, start + 1), steps.stop)
        number, count = process_shard()
        self._folder = workdir / FOLDER / f"process-{number}" if count > 1 else workdir / FOLDER
        self._running = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._stop()

    def before(self, step: int, state: object) -> None:
        """Start or stop the profile if needed. Call this before every step.

        Args:
          step: the number of the step, from 1.
          state: the result of the previous step; the profile waits until it is computed.
        """
        if self._running == (step in self._steps):
            return
        jax.block_until_ready(state)
        if self._running:
            self._stop()
        else:
            self._running = True
            # The profiler cannot write to a bucket, so its files are copied at the end.
            self._local_folder = tempfile.TemporaryDirectory() if is_bucket(self._folder) else None
            jax.profiler.start_trace(self._local_folder.name if self._local_folder else str(self._folder))

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        if self._local_folder:
            root = epath.Path(self._local_folder.name)
            for path in root.rglob("*"):
                if not path.is_dir():
                    write(self._folder / path.relative_to(root), path.read_bytes())
        log(f"profile of steps {self._steps[0]} to {self._steps[-1]}: {self._folder}, for xprof")
