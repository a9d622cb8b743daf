"""Commands and options that several subcommands share. This module imports no heavy packages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from structvit_jax.utils.errors import UserError

if TYPE_CHECKING:
    import ml_collections

SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("-", "_"),  # --train-split means --train_split
    "show_default": True,
}


class ConfigArguments(NamedTuple):
    """The configuration options of a command line."""

    file: str  # of --config, with an argument after ":"; "" without --config
    overrides: Mapping[str, str]  # of --config.KEY=VALUE, such as {"optimizer.lr": "1e-3"}
    workdir: str  # of --workdir; default: runs/NAME, where NAME is that of the file


class Command(click.Command):
    """A command; its summary in lists of commands is the first paragraph of its help."""

    def get_short_help_str(self, limit: int = 45) -> str:
        return " ".join((self.help or "").partition("\n\n")[0].split())


class CommandGroup(Command, click.Group):
    """A group of subcommands, which are listed in the order of their definition."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


_CONFIG = click.Option(
    ["--config"],
    metavar="FILE[:ARGUMENT]",
    help="Configuration: a file, or a name in configs/ such as moving_digits.",
)
_KEY = click.Option(  # in the help only: `split_overrides` reads these options
    ["key", "--config.SECTION.KEY"],
    metavar="VALUE",
    expose_value=False,
    help="Set a key of the configuration. `structvit show --keys` lists all keys.",
)
_WORKDIR = click.Option(
    ["--workdir"], metavar="DIR", help="Folder of the run. Default: runs/NAME, where NAME is that of FILE."
)


class ConfigCommand(Command):
    """A command that takes a configuration; its function receives `arguments`, a `ConfigArguments`."""

    _own_params: tuple[click.Parameter, ...] = (_CONFIG, _KEY, _WORKDIR)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params[:0] = self._own_params

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        overrides, others = split_overrides(args)
        remaining = super().parse_args(ctx, others)
        file, workdir = (ctx.params.pop(name, None) or "" for name in ("config", "workdir"))
        workdir = workdir or os.path.join("runs", Path(file.partition(":")[0]).stem)
        ctx.params["arguments"] = ConfigArguments(file, overrides, workdir)
        return remaining


class CheckpointCommand(ConfigCommand):
    """A command that takes a checkpoint and overrides of its configuration.

    Its function receives `checkpoint` and `arguments`, a `ConfigArguments`.
    """

    _own_params = (click.Argument(["checkpoint"], metavar="CHECKPOINT"), _KEY)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if any(argument.partition("=")[0] == "--config" for argument in args):
            raise UserError(
                f"{ctx.command_path} takes its configuration from the checkpoint, not from --config; change"
                " single keys, for example --config.data.root=DIR"
            )
        return super().parse_args(ctx, args)


def split_overrides(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate --config.KEY=VALUE and --config.KEY VALUE from the other arguments; the last value wins.

    Raises:
      UserError: a key without a value.
    """
    overrides, others = dict[str, str](), list[str]()
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            others += [argument, *remaining]
            break
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"{argument} needs a value: {argument}=VALUE")
            value = remaining.pop(0)
        overrides[key.replace("-", "_")] = value
    return overrides, others


def open_checkpoint_config(checkpoint: str, arguments: ConfigArguments) -> ml_collections.ConfigDict:
    """Return a checkpoint's configuration with the overrides of a command line, and select its devices.

    Raises:
      UserError: no checkpoint, an unknown key, or a value of another type or outside its range.
    """
    from structvit_jax.cli.configuration import override
    from structvit_jax.config import check_config
    from structvit_jax.data.media import configure_decoding
    from structvit_jax.runtime import devices
    from structvit_jax.training.card import from_card
    from structvit_jax.training.restore import open_card

    configure_decoding()
    # First, because reading the checkpoint's metadata opens a device.
    devices.select_devices(arguments.overrides.get("mesh.device", "auto"))
    config = from_card(open_card(checkpoint)["config"], checkpoint)
    override(config, arguments.overrides)
    check_config(config)
    devices.use_compilation_cache(config.mesh.compilation_cache)
    return config
