"""Options that several subcommands share. Imports nothing that takes long."""

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
SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda word: word.replace("-", "_"),  # --train-split is --train_split
    "show_default": True,
}

_CONFIG_OPTION = re.compile(r"--(no)?config(?:\.([\w.-]*))?(?:=(.*))?", re.DOTALL)
_OPTION = re.compile(r"-(?!\.?\d).*", re.DOTALL)  # and not a negative number


class Override(NamedTuple):
    """A value for a key of a configuration."""

    key: str  # as "optimizer.lr"
    text: str


class Words(NamedTuple):
    """The configuration options of a command line."""

    file: str = ""  # of --config, with an argument after ":"; "" without --config
    overrides: tuple[Override, ...] = ()

    @property
    def name(self) -> str:
        """The name of the file without its suffix, which names the workdir."""
        return Path(self.file.partition(":")[0]).stem

    def value(self, key: str, default: str) -> str:
        """Return the last text given for a key."""
        return next((given.text for given in reversed(self.overrides) if given.key == key), default)


def split_words(words: Sequence[str]) -> tuple[Words, list[str]]:
    """Separate --config and --config.KEY from the other arguments of a command line.

    Values follow "=" or a space. For a key of type bool, --config.KEY is true and --noconfig.KEY false.

    Raises:
      UserError: --config or a key without a value, or --noconfig with one.
    """
    file, overrides, others = "", list[Override](), list[str]()
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word == "--":
            others += [word, *remaining]
            break
        if not (match := _CONFIG_OPTION.fullmatch(word)):
            others.append(word)
            continue
        negated, key, text = match.groups()
        key = None if key is None else key.replace("-", "_")
        if negated:
            if key is None or text is not None:
                raise UserError(f"{word}: write --noconfig.KEY without a value")
            text = "false"
        elif text is None and key is not None and _is_bool(key):
            text = "true"
        elif text is None and remaining and not _OPTION.fullmatch(remaining[0]):
            text = remaining.pop(0)
        if key is None:
            if not text:
                raise UserError("--config needs a file: --config=configs/moving_digits.py")
            file = text
        elif text is None:
            raise UserError(f"{word} needs a value: {word}=VALUE")
        else:
            overrides.append(Override(key, text))
    return Words(file, tuple(overrides)), others


def _is_bool(key: str) -> bool:
    from structvit_jax.config import KEYS

    return key in KEYS and KEYS[key].type is bool


class ConfigCommand(click.Command):
    """A command with the options --config.SECTION.KEY=VALUE; its function gets them as `words`.

    Args:
      takes_file: whether the command has the option --config=FILE, too.
    """

    def __init__(self, *args: Any, takes_file: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.takes_file = takes_file

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words, others = split_words(args)
        if words.file and not self.takes_file:
            raise UserError(
                f"{ctx.command_path} takes its configuration from the checkpoint, not from"
                f" --config={words.file}; change single keys, as --config.data.root=DIR"
            )
        ctx.params["words"] = words
        return super().parse_args(ctx, others)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        if self.takes_file:
            rows.append(("--config FILE[:ARGUMENT]", "A file, or a name of the package, as moving_digits."))
        rows.append(("--config.SECTION.KEY VALUE", "Set a key; `structvit show --keys` lists them."))
        with formatter.section("Configuration"):
            formatter.write_dl(rows)
        super().format_options(ctx, formatter)


def config_command(*, takes_file: bool = True) -> Callable[[Callable[..., Any]], ConfigCommand]:
    """Return a decorator for the function of a command that takes a configuration."""
    return click.command(cls=ConfigCommand, takes_file=takes_file, context_settings=SETTINGS)


def plain_command() -> Callable[[Callable[..., Any]], click.Command]:
    """Return a decorator for the function of a command without a configuration."""
    return click.command(context_settings=SETTINGS)


checkpoint = click.argument("checkpoint", metavar="CHECKPOINT")
workdir = click.option("--workdir", metavar="DIR", help="Folder of the run; by default runs/NAME.")


def open_checkpoint_config(checkpoint: str, words: Words) -> ml_collections.ConfigDict:
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
    devices.select_devices(words.value("mesh.device", "auto"))  # first: reading the card opens a device
    config = from_card(open_card(checkpoint)["config"], checkpoint)
    override(config, words.overrides)
    check_config(config)
    devices.use_compilation_cache(config.mesh.compilation_cache)
    return config
