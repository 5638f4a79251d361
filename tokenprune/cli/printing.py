"""Output of commands: characters that stdout cannot show are replaced, and broken pipes are no tracebacks."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from tokenprune.errors import DataWarning, InputError, PluginWarning, PruningWarning
from tokenprune.utils.files import reason

if TYPE_CHECKING:
    from rich.console import Console

BROKEN_PIPE = 1  # exit code, as in Typer and Rich
INTERRUPTED = 130  # exit code after Ctrl-C, as shells give
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE}
PLAIN = {"–": "-", "—": "-", "×": "x", "…": ".", "·": ".", "“": '"', "”": '"', "²": "2"}
NARROW_PIPE = 120  # columns of a table that does not go to a terminal


@contextmanager
def printable() -> Iterator[None]:
    """Run a program that prints to stdout.

    Characters that stdout's encoding does not have are replaced. A closed pipe (`| head`) ends the program silently,
    with exit code 1.

    Raises:
        InputError: stdout cannot be written, for example on a full disk.
    """
    with suppress(AttributeError):  # a stream of a test, or None where stdout is closed
        sys.stdout.reconfigure(errors="tokenprune")  # type: ignore[union-attr]
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _silence()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        if not is_of_output(error):
            raise
        _silence()
        raise InputError(f"standard output cannot be written ({reason(error)}); send it elsewhere") from error


@contextmanager
def short_warnings() -> Iterator[None]:
    """Print tokenprune's own warnings as one line on stderr, without a line of its source."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **others: Any) -> None:
        if issubclass(category, (DataWarning, PluginWarning, PruningWarning)):
            note(f"warning: {' '.join(str(message).split())}")
        else:
            shown(message, category, *rest, **others)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def is_of_output(error: Exception) -> bool:
    """Whether an error is from writing to stdout or stderr; one from a file has a file name."""
    return isinstance(error, OSError) and error.errno in FULL and error.filename is None


@contextmanager
def working_first(write: Callable[[str], None] = typer.echo) -> Iterator[Callable[[str], None]]:
    """A function that prints lines on stdout; if that fails, the work continues and the error is raised at its end.

    Args:
        write: prints one line; `say_json` for JSON.
    """
    failed: list[OSError] = []

    def say(text: str) -> None:
        if failed:
            return
        try:
            write(text)
        except OSError as error:
            failed.append(error)

    yield say
    if failed:
        raise failed[0]


def say_json(text: str) -> None:
    """Print JSON that can be read back with any encoding of stdout."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if not encoding.lower().startswith("utf"):
        text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    typer.echo(text)


def note(text: str) -> None:
    """Print a line on stderr; a failure to print is ignored."""
    with suppress(OSError):
        typer.echo(text, err=True)


def stopped(text: str) -> typer.Exit:
    """Print what an interrupt leaves, as the last line; returns the exit to raise."""
    warnings.showwarning = lambda *told, **more: None  # of what is left half made; `short_warnings` puts it back
    note(text)
    return typer.Exit(INTERRUPTED)


def notes_console() -> Console:
    """A Rich console on stderr that also ignores failures to print."""
    from rich.console import Console

    return Console(file=_Forgiving(), stderr=True)  # type: ignore[arg-type]


@contextmanager
def progress(time_left: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows a bar on stderr for (what, number done, number in all).

    Args:
        time_left: show the time that is left, and not the time that has passed.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    timing = TimeRemainingColumn() if time_left else TimeElapsedColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), timing)
    bar = Progress(*columns, console=notes_console())
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        bar.start()  # not earlier: an error on the first query is then a single line
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bar.stop()


class _Forgiving:
    """stderr, ignoring failures to write."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def _silence() -> None:
    """Discard pending output; otherwise Python reports the error again at exit."""
    with suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not valid text: unchanged
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return PLAIN.get(character, "?"), error.start + 1


codecs.register_error("tokenprune", _replace)
