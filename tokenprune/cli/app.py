"""The Typer app, its global options, and how errors become one line.

A command is a function `command` in a module of `commands/`, registered in this file.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from tokenprune.cli.commands import (
    answer,
    compare,
    data,
    demo,
    flops,
    inspect,
    listing,
    merge,
    new,
    recommend,
    report,
    segment,
    serve,
    sweep,
    tune,
)
from tokenprune.cli.mounting import CLICK_ERROR, PluginGroup, usage_problem
from tokenprune.cli.printing import note, printable, short_warnings
from tokenprune.errors import OptionError, PluginError, TokenPruneError

app = typer.Typer(
    name="tokenprune",
    cls=PluginGroup,
    help="Visual-token pruning for large vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from tokenprune import __version__

        typer.echo(f"tokenprune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command; `main` handles `--debug` at any position."""


app.command("list")(listing.command)
app.command("compare")(compare.command)
app.command("recommend")(recommend.command)
app.command("sweep")(sweep.command)
app.command("merge")(merge.command)
app.command("report")(report.command)
app.command("tune")(tune.command)
app.command("segment")(segment.command)
app.command("answer")(answer.command)
app.command("serve")(serve.command)
app.command("inspect")(inspect.command)
app.command("demo")(demo.command)
app.command("flops")(flops.command)
app.add_typer(data.app, name="data")
app.add_typer(new.app, name="new")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    A `TokenPruneError` becomes one line on stderr and exit code 2, and so does Typer's error about misspelt
    commands and options; with `--debug` the traceback of a `TokenPruneError` comes first.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        with printable(), short_warnings():
            arguments = [argument for argument in given if argument != "--debug"]
            sys.exit(app(args=arguments, prog_name="tokenprune", standalone_mode=False))
    except typer.Abort:
        note("aborted")
        sys.exit(1)
    except CLICK_ERROR as error:
        if said := usage_problem(error):
            note(f"error: {said}")
        sys.exit(getattr(error, "exit_code", 2))
    except Exception as error:
        problem = _as_user_error(error)
        if problem is None:
            raise
        if debug:
            traceback.print_exception(error)
        hides = not debug and isinstance(problem, PluginError) and problem.__cause__ is not None
        hint = " (--debug shows the traceback)" if hides else ""
        note(f"error: {' '.join(str(problem).split())}{hint}")
        sys.exit(2)


def _as_user_error(error: Exception) -> TokenPruneError | None:
    if isinstance(error, TokenPruneError):
        return error
    if "pydantic" in sys.modules:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            return OptionError.from_validation(error.title, error)
    return None
