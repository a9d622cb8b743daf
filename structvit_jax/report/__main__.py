"""Writes what runs came to as one HTML page, which needs no other file and no network.

    python -m structvit_jax.report WORKDIR [WORKDIR ...] [--out=report.html] [--hardest=24]

For all runs side by side: scores, what differs between their configurations, curves, and where their time
went. For each: accuracy by class, the confusion matrix, and pictures of the examples of which the model was
surest, and wrong. A run may be unfinished; the page says what is not there yet. Pictures are read from the
data that the run was evaluated on.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from structvit_jax.command import parse_flags, run_command
from structvit_jax.errors import UserError

_OUT = flags.DEFINE_string("out", None, "Where the page goes; by default report.html in the first WORKDIR.")
_HARDEST = flags.DEFINE_integer("hardest", 24, "How many examples of each run to show.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    workdirs = parse_flags(argv)
    if not workdirs:
        raise UserError("say which run: python -m structvit_jax.report WORKDIR [WORKDIR ...]; see --help")
    from structvit_jax.report.page import write_report  # here, so that a mistake in flags is told at once
    from structvit_jax.training.mesh import select_devices

    select_devices("cpu")  # accelerators are for those that train
    print(write_report(workdirs, _OUT.value, _HARDEST.value))


if __name__ == "__main__":
    run_command(main)
