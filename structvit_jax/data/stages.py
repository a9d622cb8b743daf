"""Time the stages of reading an example, to find out what an input pipeline spends its time on.

    with Stages() as stages:        # times the stages that this thread enters, until the block ends
        with stage("decode"): ...

The seconds of a stage exclude those of stages inside it, so the sum over all stages is the time of the block.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

# Opening a file and indexing its frames; decoding; conversion to RGB of the wanted size; RandAugment and
# colour jitter; crop and resize; and the rest, such as copying examples into a batch.
STAGES = ("open", "decode", "convert", "augment", "crop", "batch")


class Stages:
    """Collect the seconds of each stage while this context is active in the current thread.

    Attributes:
      seconds: by the names in STAGES.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stage, self._since = "batch", 0.0

    def switch(self, name: str) -> str:
        """Start a stage, and return the name of the one that this ends."""
        now = time.perf_counter()
        before = self._stage
        self.seconds[before] += now - self._since
        self._stage, self._since = name, now
        return before

    def __enter__(self) -> Stages:
        self._since = time.perf_counter()
        self._outer, _active.stages = getattr(_active, "stages", None), self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.switch("batch")
        _active.stages = self._outer


_active = threading.local()


class stage:  # noqa: N801 - used like a function
    """Count the time of a block as the time of a stage, if this thread collects `Stages`."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        self._stages: Stages | None = getattr(_active, "stages", None)
        if self._stages:
            self._before = self._stages.switch(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stages:
            self._stages.switch(self._before)
