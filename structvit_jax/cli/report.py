"""`structvit report`: runs on one HTML page."""

from __future__ import annotations

import click

from structvit_jax.cli import options


@options.plain_command()
@click.argument("workdirs", metavar="WORKDIR...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", help="The page; by default report.html in the first WORKDIR.")
@click.option(
    "--hardest", type=click.IntRange(min=0), default=24, help="How many confident errors of each run to show."
)
def command(workdirs: tuple[str, ...], out: str | None, hardest: int) -> None:
    """Compare runs on one HTML page, which needs no other file and no network.

    For all runs side by side: scores, differences between their configurations, curves, and where their time
    went. For each: accuracy by class, the confusion matrix, and the most confident errors with thumbnails,
    which are read from the data that the run was evaluated on. A run may be unfinished; the page states what
    is missing.

    \b
    Example:
      structvit report runs/first runs/second --out=report.html
    """
    from structvit_jax.analysis.report.render import write_report
    from structvit_jax.runtime.mesh import select_devices

    select_devices("cpu")  # accelerators are for those that train
    print(write_report(list(workdirs), out, hardest))
