"""What commands print: whole where it can be, plainer where the other end cannot show it, and never a traceback."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from tokenprune.errors import InputError
from tokenprune.utils.files import reason

if TYPE_CHECKING:
    from rich.console import Console

BROKEN_PIPE = 1  # exit code, as Typer and Rich have it
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE}
PLAIN = {"–": "-", "—": "-", "×": "x", "…": ".", "·": ".", "“": '"', "”": '"', "²": "2"}
NARROW_PIPE = 120  # columns, where a table does not go to a terminal


@contextmanager
def printable() -> Iterator[None]:
    """Run a program that prints to stdout.

    A character that stdout's encoding does not have is replaced. A reader that went away (`| head`) ends the program
    quietly, with exit code 1.

    Raises:
        InputError: stdout cannot be written, as on a full disk.
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


def is_of_output(error: Exception) -> bool:
    """Whether an error is that of stdout or stderr, which cannot be written; that of a file names the file."""
    return isinstance(error, OSError) and error.errno in FULL and error.filename is None


@contextmanager
def working_first() -> Iterator[Callable[[str], None]]:
    """A function that prints lines on stdout; where it cannot, the work goes on, and the error comes at its end."""
    failed: list[OSError] = []

    def say(text: str) -> None:
        if failed:
            return
        try:
            typer.echo(text)
        except OSError as error:
            failed.append(error)

    yield say
    if failed:
        raise failed[0]


def say_json(text: str) -> None:
    """Print JSON, so that it can be read back whatever stdout's encoding is."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if not encoding.lower().startswith("utf"):
        text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    typer.echo(text)


def note(text: str) -> None:
    """Print a line on stderr; where nobody can read it, that ends nothing."""
    with suppress(OSError):
        typer.echo(text, err=True)


def notes_console() -> Console:
    """A Rich console on stderr that likewise ends nothing."""
    from rich.console import Console

    return Console(file=_Forgiving(), stderr=True)  # type: ignore[arg-type]


class _Forgiving:
    """stderr, where a failure to write counts as written."""

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
    """Send what is still to be printed nowhere, or Python tells of it once more at its exit."""
    with suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that is no text: as it came
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return PLAIN.get(character, "?"), error.start + 1


codecs.register_error("tokenprune", _replace)
