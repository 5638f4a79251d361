"""Adds the commands that plugins register to tokenprune's own. They are imported when they run, not for `--help`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tokenprune.cli.printing import is_of_output
from tokenprune.errors import TokenPruneError, UnknownNameError
from tokenprune.plugins.attribution import blamed, brief

if TYPE_CHECKING:
    from tokenprune.plugins.entries import Entry


CLICK_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def usage_problem(error: Any) -> str:
    """Typer's error message in one line, with a hint at the help; empty if it has shown the help instead."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    said = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    command = getattr(getattr(error, "ctx", None), "command_path", "tokenprune")
    return f"{said[:1].lower()}{said[1:]}; see '{command} --help'"


class PluginGroup(TyperGroup):
    """The commands of the program, followed by those of plugins."""

    def invoke(self, ctx: Any) -> None:
        """Run the command; the return value of its function is ignored, it is not an exit code."""
        super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        return [*super().list_commands(ctx), *_registered()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command; for a plugin's only the name and the summary, which is enough for help and completion."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = _registered().get(cmd_name)
        return entry and TyperCommand(entry.name, help=entry.summary or None, rich_help_panel="Commands of plugins")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command to run.

        Raises:
            PluginError: a plugin's command cannot be imported, or two packages register it.
        """
        if args and args[0] not in self.commands:
            from tokenprune.plugins import registry

            try:
                entry = registry.get("commands", args[0])
            except UnknownNameError:
                return super().resolve_command(ctx, args)
            return args[0], _loaded(entry), args[1:]
        return super().resolve_command(ctx, args)


def _registered() -> dict[str, Entry]:
    from tokenprune.plugins import registry

    return registry.entries("commands")


def _loaded(entry: Entry) -> Any:
    target = entry.load()
    if isinstance(target, typer.Typer):
        app = target
    elif callable(target):
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command(help=None if target.__doc__ else entry.summary)(target)
    else:
        raise entry.refusal(f"is {target!r}, expected a typer.Typer or a function")
    with blamed(lambda found: entry.refusal(f"is not a command: {found}", "fix or uninstall it")):
        command: Any = typer.main.get_command(app)
    command.name = entry.name
    command.invoke = _guarded(command.invoke, entry)
    return command


def _guarded(invoke: Callable[[Any], Any], entry: Entry) -> Callable[[Any], Any]:
    """Name the plugin if its command raises an error that is neither Typer's nor tokenprune's."""

    def run(ctx: Any) -> Any:
        try:
            return invoke(ctx)
        except (TokenPruneError, typer.Exit, typer.Abort, CLICK_ERROR):
            raise
        except Exception as error:
            if is_of_output(error):
                raise
            raise entry.refusal(f"failed with {brief(error)}", "fix or uninstall it") from error

    return run
