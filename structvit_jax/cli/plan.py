"""`structvit plan`: cost of a train step, from its compiled program, also for chips that are not attached."""

from __future__ import annotations

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import ConfigArguments
from structvit_jax.utils.errors import UserError

_FOR_PROGRAMS = ("parts", "depth", "trips", "unknown")


@click.command(cls=options.ConfigCommand)
@click.option(
    "--topology",
    "topologies",
    multiple=True,
    metavar="NAME",
    help="Chips to compile for, as v5e:2x4 or h100:8; repeatable. Default: this machine.",
)
@click.option(
    "--device_batch",
    type=click.IntRange(1, 2**24),
    metavar="N",
    help="Examples per device, instead of data.batch_size over all devices.",
)
@click.option(
    "--device_memory",
    metavar="SIZE",
    default="",
    show_default=False,
    help="Find the largest batch that fits into this memory of a device, as 24GB.",
)
@click.option("--program", metavar="FILE", help="Only count the memory traffic of a compiled program's text.")
@click.option(
    "--parts",
    type=click.IntRange(min=0),
    default=20,
    metavar="N",
    help="With --program: how many parts to print.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="With --program: how many name scopes make a part.",
)
@click.option(
    "--trips", multiple=True, metavar="LOOP=N", help="With --program: how often a loop runs; repeatable."
)
@click.option(
    "--unknown",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --program: how often loops of unknown length run.",
)
@click.pass_context
def command(
    ctx: click.Context,
    arguments: ConfigArguments,
    topologies: tuple[str, ...],
    device_batch: int | None,
    device_memory: str,
    program: str | None,
    parts: int,
    depth: int,
    trips: tuple[str, ...],
    unknown: int | None,
) -> None:
    """Estimate memory and step time before renting hardware. The step is compiled, not run.

    \b
    Example:
      structvit plan --config=imagenet --topology=v5e:2x4 --topology=h100:8
      structvit plan --config=folder --config.data.root=DIR --device_memory=24GB
    """
    if program:
        if arguments.file or arguments.overrides:
            raise UserError("--program counts the text of a program; it takes no --config")
        from structvit_jax.performance.traffic import table

        print(table.describe(program, trips=trips, unknown=unknown, depth=depth, parts=parts))
        return
    for name in _FOR_PROGRAMS:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UserError(f"--{name} needs --program=FILE")
    from structvit_jax.cli.configuration import load_config
    from structvit_jax.cli.experiment import open_experiment
    from structvit_jax.performance import estimate, hardware

    hardware.add_fake_devices(topologies)
    opened = open_experiment(load_config(arguments), arguments.workdir, cached=not topologies)
    request = estimate.Request(topologies, device_batch or 0, device_memory)
    print(estimate.describe(opened.config, opened.dataset, opened.workdir, request))
