"""Whose fault it is: what goes wrong in a plugin's code becomes an error that names the plugin.

Errors that tokenprune raises on purpose pass as they are, and so does memory that ran out, which callers may want to
catch. `sys.exit` in a plugin is a failure like any other; a keyboard interrupt is the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from tokenprune.errors import EngineError, PluginError, TokenPruneError, UnsupportedError

LONGEST = 300  # characters of another library's message that are shown


def brief(error: BaseException) -> str:
    """The error's type and its message in one line, cut where it is long."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a message that cannot be made must not hide the error
        text = ""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def blamed(refuse: Callable[[str], PluginError]) -> Iterator[None]:
    """Run a plugin's code.

    Args:
        refuse: makes the error that names the plugin from what went wrong, as `brief` says it.

    Raises:
        PluginError: the plugin's code raised something else than a TokenPruneError.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if _passes(error):
            raise
        raise refuse(brief(error)) from error


@contextmanager
def blamed_strategy(name: str, where: str) -> Iterator[None]:
    """Run a strategy's code.

    Args:
        name: of the strategy; an error about a plugin or the engine that names neither it nor a plugin is given it.
        where: what is run, as it follows the strategy's name: ": bind()".

    Raises:
        PluginError: as `blamed`.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        blame_strategy(name, where, error)


def blame_strategy(name: str, where: str, error: BaseException) -> NoReturn:
    """Raise what `blamed_strategy` makes of an error; for code that runs too often for a context of its own."""
    if isinstance(error, (PluginError, EngineError, UnsupportedError)):
        if getattr(error, "plugin", "") or repr(name) in str(error):
            raise error
        raise type(error)(f"strategy {name!r}: {error}") from error
    if _passes(error):
        raise error
    raise PluginError(f"strategy {name!r}{where} raised {brief(error)}") from error


def _passes(error: BaseException) -> bool:
    # by its name: that of PyTorch is not worth importing it
    return isinstance(error, (TokenPruneError, MemoryError)) or type(error).__name__ == "OutOfMemoryError"
