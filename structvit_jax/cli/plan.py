"""`structvit plan`: cost of a train step, from its compiled program, also for chips that are not attached."""

from __future__ import annotations

from pathlib import Path

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import ConfigArguments
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.tables import align_columns

_FOR_PROGRAMS = ("parts", "depth")  # options that need --program


@click.command(cls=options.ConfigCommand)
@click.option(
    "--topology",
    "topologies",
    multiple=True,
    metavar="NAME",
    help="Chips to compile for, as v5e:2x4 or h100:8; repeatable. Default: the devices of this machine.",
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
    help="Memory of a device, as 24GB: find the largest batch that fits.",
)
@click.option("--program", metavar="FILE", help="Only count the memory traffic of a compiled program's text.")
@click.option(
    "--parts",
    type=click.IntRange(min=0),
    default=20,
    metavar="N",
    help="With --program: how many parts to print, the largest first.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="With --program: how many name scopes make a part.",
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
) -> None:
    """Estimate memory and step time before renting hardware. The train step is compiled, not run.

    \b
    Example:
      structvit plan --config=imagenet --topology=v5e:2x4 --topology=h100:8
      structvit plan --config=folder --config.data.root=DIR --device_memory=24GB
    """
    if program:
        if arguments.file or arguments.overrides:
            raise UserError("--program counts the text of a program; it takes no --config")
        print(_describe_program(program, parts, depth))
        return
    for name in _FOR_PROGRAMS:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UserError(f"--{name} needs --program=FILE")
    from structvit_jax.cli.configuration import load_config
    from structvit_jax.cli.experiment import open_experiment
    from structvit_jax.performance import estimate, hardware

    hardware.add_fake_devices(topologies)
    opened = open_experiment(load_config(arguments), arguments.workdir, cached=not topologies)
    for topology in topologies or [""]:
        text = estimate.describe(
            opened.config,
            opened.dataset,
            opened.workdir,
            topology=topology,
            device_batch=device_batch,
            device_memory=device_memory,
        )
        print(text, flush=True)


def _describe_program(path: str, parts: int, depth: int) -> str:
    """Return a table of the largest parts of a program and their traffic, in MB (10^6 bytes).

    Raises:
      UserError: a file that is not a program.
    """
    from structvit_jax.performance import traffic

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text"
        raise UserError(f"cannot read {path}: {reason}") from error
    moved = traffic.count(text, depth=depth)
    rows = [("part", "read MB", "written MB", "sent MB")]
    for name, sizes in [*list(moved.by_part.items())[:parts], ("total", moved[:3])]:
        read, written, sent = (f"{size / 1e6:,.3f}" for size in sizes)
        rows.append((name, read, written, sent))
    notes = [f"NOTE: a loop of unknown length counts as one step: {loop}" for loop in moved.unknown_loops]
    return "\n".join([*align_columns(rows), *notes])
