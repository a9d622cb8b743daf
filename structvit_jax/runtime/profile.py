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
    """Parse "START:STOP", which names the steps START to STOP - 1; "" names none.

    Raises:
      UserError: another format, or an empty range.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) < int(match[2]):
        raise UserError(f"--profile={text}: write START:STOP, as 10:13 for steps 10 to 12")
    return range(int(match[1]), int(match[2]))


class Profile:
    """Profile steps into WORKDIR/profile, or with several processes into WORKDIR/profile/process-N each."""

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
        """Start or stop the profile before a step, if it is the first or follows the last.

        Args:
          step: the number of the step, from 1.
          state: the result of the previous step, which is waited for.
        """
        if self._running == (step in self._steps):
            return
        jax.block_until_ready(state)
        if self._running:
            self._stop()
        else:
            self._running = True
            # The profiler cannot write to a bucket, so its files are copied at the end.
            self._local = tempfile.TemporaryDirectory() if is_bucket(self._folder) else None
            jax.profiler.start_trace(self._local.name if self._local else str(self._folder))

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        if self._local:
            root = epath.Path(self._local.name)
            for path in root.rglob("*"):
                if not path.is_dir():
                    write(self._folder / path.relative_to(root), path.read_bytes())
        log(f"profile of steps {self._steps[0]} to {self._steps[-1]}: {self._folder}, for xprof")
