"""Words of a command line that several subcommands share. Imports nothing that takes long."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from structvit_jax.utils.errors import UserError

if TYPE_CHECKING:
    import ml_collections

F = TypeVar("F", bound=Callable[..., Any])
# Options may be written with dashes, too: --train-split is --train_split.
SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda word: word.replace("-", "_"),
    "show_default": True,
}


_WORD = re.compile(r"--(no)?config(?:\.([\w.]*))?(?:(=)(.*))?", re.DOTALL)


class Override(NamedTuple):
    """A value for a key of a configuration."""

    key: str  # as "optimizer.lr"
    text: str


class Words(NamedTuple):
    """What a command line says about its configuration."""

    file: str = ""  # of --config, with an argument after ":"; "" if there is none
    overrides: tuple[Override, ...] = ()

    @property
    def name(self) -> str:
        """The name of the file without its suffix, which names the workdir."""
        return Path(self.file.partition(":")[0]).stem

    def value(self, key: str, default: str) -> str:
        """The last text that is given for a key."""
        return next((given.text for given in reversed(self.overrides) if given.key == key), default)


def split_words(words: Sequence[str]) -> tuple[Words, list[str]]:
    """Separate --config and --config.KEY from the other words of a command line.

    Values follow "=" or a space; --config.KEY alone is true and --noconfig.KEY false.

    Raises:
      UserError: --config without a file.
    """
    file, overrides, others = "", list[Override](), list[str]()
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word == "--":
            others += [word, *remaining]
            break
        if not (match := _WORD.fullmatch(word)):
            others.append(word)
            continue
        negated, key, equals, text = match.groups()
        if not equals:
            follows = remaining and not remaining[0].startswith("-") and not negated
            text = remaining.pop(0) if follows and not _is_switch(key) else "false" if negated else "true"
        if key is None:
            file = text if equals or text != "true" else ""
            if not file:
                raise UserError("--config needs a file: --config=configs/moving_digits.py")
        else:
            overrides.append(Override(key, text))
    return Words(file, tuple(overrides)), others


def _is_switch(key: str | None) -> bool:
    """Return whether a key is a truth value, which may stand alone."""
    from structvit_jax.config import default_config, keys_of

    return isinstance(dict(keys_of(default_config())).get(key or ""), bool)


class ConfigCommand(click.Command):
    """A command that takes --config.SECTION.KEY=VALUE; its function gets them as `words`.

    Args:
      takes_file: whether it takes --config=FILE, too.
    """

    def __init__(self, *args: Any, takes_file: bool = True, **options: Any):
        super().__init__(*args, **options)
        self.takes_file = takes_file

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words, others = split_words(args)
        if words.file and not self.takes_file:
            raise UserError(
                f"{ctx.command_path} takes its configuration from the checkpoint, not --config={words.file};"
                " change single keys, as --config.data.root=DIR"
            )
        ctx.params["words"] = words
        return super().parse_args(ctx, others)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        if self.takes_file:
            rows.append(
                (
                    "--config FILE[:ARGUMENT]",
                    "Configuration: a file, or one of the package, as moving_digits.",
                )
            )
        rows.append(("--config.SECTION.KEY VALUE", "Set a key; `structvit show --config=FILE` prints all."))
        with formatter.section("Configuration"):
            formatter.write_dl(rows)
        super().format_options(ctx, formatter)


def config_command(*, takes_file: bool = True) -> Callable[[Callable[..., Any]], ConfigCommand]:
    """Decorate the function of a command that takes a configuration."""
    return click.command(cls=ConfigCommand, takes_file=takes_file, context_settings=SETTINGS)


def plain_command() -> Callable[[Callable[..., Any]], click.Command]:
    """Decorate the function of a command without a configuration."""
    return click.command(context_settings=SETTINGS)


checkpoint = click.argument("checkpoint", metavar="CHECKPOINT")
workdir = click.option("--workdir", metavar="DIR", help="Folder of the run; by default runs/NAME.")


def open_checkpoint_config(checkpoint: str, words: Words) -> ml_collections.ConfigDict:
    """Return the configuration of a checkpoint's card with the changes of a command line; select devices.

    Raises:
      UserError: no checkpoint, an unknown key, or a value that a key does not take.
    """
    from structvit_jax.cli.configuration import override
    from structvit_jax.config import check_config
    from structvit_jax.data.setup import configure_decoding
    from structvit_jax.runtime import mesh
    from structvit_jax.training.card import from_card
    from structvit_jax.training.restore import open_card

    configure_decoding()
    mesh.select_devices(words.value("mesh.device", "auto"))  # first: reading the card opens a device
    config = from_card(open_card(checkpoint)["config"], checkpoint)
    override(config, words.overrides)
    check_config(config)
    mesh.use_compilation_cache(config.mesh.compilation_cache)
    return config
