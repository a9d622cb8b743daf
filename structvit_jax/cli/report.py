"""`structvit report`: compare runs on one HTML page."""

from __future__ import annotations

import click

from structvit_jax.cli import options


@click.command(cls=options.Command)
@click.argument("workdirs", metavar="WORKDIR...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", help="The page; by default report.html in the first WORKDIR.")
@click.option(
    "--hardest", type=click.IntRange(min=0), default=24, help="Number of confident errors to show per run."
)
def command(workdirs: tuple[str, ...], out: str | None, hardest: int) -> None:
    """Compare runs on one self-contained HTML page.

    The page shows the scores of all runs side by side, differences between their configurations, learning
    curves, and training time by activity. For each run it shows accuracy per class, the confusion matrix, and
    the most confident errors with thumbnails, which are read from the evaluation data. Runs need not be
    finished; the page states what is missing.

    \b
    Example:
      structvit report runs/first runs/second --out=report.html
    """
    from structvit_jax.analysis.report.render import write_report
    from structvit_jax.runtime.devices import select_devices

    select_devices("cpu")  # accelerators may be in use by a training
    print(write_report(list(workdirs), out, hardest))
