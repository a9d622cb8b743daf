"""`structvit plan`: estimate the cost of a train step from its compiled program.

The program may be compiled for chips that are not attached.
"""

from __future__ import annotations

from pathlib import Path

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import ConfigArguments
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.tables import align_columns

_PROGRAM_OPTIONS = ("parts", "depth")  # these need --program


@click.command(cls=options.ConfigCommand)
@click.option(
    "--topology",
    "topologies",
    multiple=True,
    metavar="NAME",
    help="Chips to compile for, such as v5e:2x4 or h100:8; repeatable. Default: the devices of this machine.",
)
@click.option(
    "--device_batch",
    type=click.IntRange(1, 2**24),
    metavar="N",
    help="Examples per device. Default: data.batch_size split over all devices.",
)
@click.option(
    "--device_memory",
    metavar="SIZE",
    default="",
    show_default=False,
    help="Find the largest batch that fits into this memory per device, such as 24GB.",
)
@click.option(
    "--program",
    metavar="FILE",
    help="Print the memory traffic of a program in WORKDIR/plan; compile nothing.",
)
@click.option(
    "--parts",
    type=click.IntRange(min=0),
    default=20,
    metavar="N",
    help="With --program: number of parts to print, largest first.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="With --program: number of name scopes in the name of a part.",
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
    """Estimate memory and step time by compiling the train step, without running it.

    \b
    Example:
      structvit plan --config=imagenet --config.data.root=DIR --topology=v5e:2x4
      structvit plan --config=folder --config.data.root=DIR --device_memory=24GB
    """
    if program:
        if arguments.file or arguments.overrides:
            raise UserError("--program reads a compiled program; it cannot be combined with --config")
        print(_describe_program(program, parts, depth))
        return
    for name in _PROGRAM_OPTIONS:
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
    """Return a table with the traffic of the largest parts of a program, in MB (10^6 bytes).

    Raises:
      UserError: the file cannot be read, or is not a compiled program.
    """
    from structvit_jax.performance import traffic

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"cannot read {path}: {reason}") from error
    moved = traffic.count(text, depth=depth)
    rows = [("part", "read MB", "written MB", "sent MB")]
    for name, sizes in [*list(moved.by_part.items())[:parts], ("total", moved[:3])]:
        read, written, sent = (f"{size / 1e6:,.3f}" for size in sizes)
        rows.append((name, read, written, sent))
    notes = [f"NOTE: a loop of unknown length counts as one step: {loop}" for loop in moved.unknown_loops]
    return "\n".join([*align_columns(rows), *notes])
