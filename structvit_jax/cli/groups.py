"""Groups of commands: `structvit`, `structvit prepare` and `structvit bench`."""

from __future__ import annotations

import click

from structvit_jax.utils.errors import unknown_choice


class CommandGroup(click.Group):
    """A group that lists its commands in order of definition, and suggests names for misspelt ones."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def description(self, ctx: click.Context, name: str) -> str:
        """Return what a command does, in one line."""
        command = self.get_command(ctx, name)
        assert command is not None
        return command.short_help or (command.help or "").partition("\n\n")[0].replace("\n", " ")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names.

        Raises:
          UserError: there is none of this name.
        """
        is_name = not (args[0].startswith("-") or ctx.resilient_parsing)
        normalize = ctx.token_normalize_func or str
        if is_name and normalize(args[0]) not in self.list_commands(ctx):
            raise unknown_choice("command", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.description(ctx, name)) for name in self.list_commands(ctx)])
