"""`structvit report`: compare runs on one HTML page."""

from __future__ import annotations

import click

from structvit_jax.cli import options


@click.command(cls=options.Command)
@click.argument("workdirs", metavar="WORKDIR...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", help="Path of the page. Default: report.html in the first WORKDIR.")
@click.option(
    "--hardest",
    type=click.IntRange(min=0),
    default=24,
    help="Number of most confident errors to show per run.",
)
def command(workdirs: tuple[str, ...], out: str | None, hardest: int) -> None:
    """Compare runs on one self-contained HTML page.

    The page shows the scores of all runs side by side, differences between their configurations, learning
    curves, and wall time by activity. For each run it shows accuracy per class, the confusion matrix, and
    the most confident errors, with thumbnails that are read from the test data. Runs need not be
    finished; the page states what is missing.

    \b
    Example:
      structvit report runs/first runs/second --out=report.html
    """
    from structvit_jax.analysis.report.render import write_report
    from structvit_jax.runtime.devices import select_devices

    select_devices("cpu")  # a training run may be using the accelerators
    print(write_report(list(workdirs), out, hardest))
