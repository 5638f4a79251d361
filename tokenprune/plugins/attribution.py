"""Attribution: an exception in a plugin's code becomes an error that names the plugin.

Not converted are tokenprune's own errors, out-of-memory errors, which callers may want to catch, and keyboard
interrupts. `sys.exit` in a plugin is a failure like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from tokenprune.errors import EngineError, PluginError, TokenPruneError, UnsupportedError

LONGEST = 300  # characters of another library's message that are shown


def brief(error: BaseException) -> str:
    """The error's type and message in one line, shortened if it is long."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a failing __str__ must not hide the error
        text = ""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def blamed(refuse: Callable[[str], PluginError]) -> Iterator[None]:
    """Run a plugin's code.

    Args:
        refuse: makes the error that names the plugin, from the `brief` text of the exception.

    Raises:
        PluginError: the plugin's code raised something other than a TokenPruneError.
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
        name: of the strategy; it is added to errors of plugins and the engine that name neither it nor a plugin.
        where: what runs, as it follows the strategy's name: ": bind()".

    Raises:
        PluginError: as `blamed`.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        blame_strategy(name, where, error)


def blame_strategy(name: str, where: str, error: BaseException) -> NoReturn:
    """Raise the error that `blamed_strategy` would raise; for code that runs too often for a context manager."""
    if isinstance(error, (PluginError, EngineError, UnsupportedError)):
        if getattr(error, "plugin", "") or repr(name) in str(error):
            raise error
        raise type(error)(f"strategy {name!r}: {error}") from error
    if _passes(error):
        raise error
    raise PluginError(f"strategy {name!r}{where} raised {brief(error)}") from error


def _passes(error: BaseException) -> bool:
    # by name: this must not import torch
    return isinstance(error, (TokenPruneError, MemoryError)) or type(error).__name__ == "OutOfMemoryError"
