"""Checks of arguments at the public functions; an error names the argument, in one line.

Every check returns the value, or raises OptionError or the given error class.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from numbers import Integral
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tokenprune.errors import OptionError, PluginError, TokenPruneError

LONGEST = 60  # characters of a value that a message shows
Kinds = type | tuple[type, ...]


def shown(value: object) -> str:
    """A value for a message: its `repr` if that is one short line, else its type."""
    try:
        text = repr(value)
    except Exception:  # a failing __repr__ must not hide the error
        text = ""
    if text.isprintable() and 0 < len(text) <= LONGEST and " at 0x" not in text:
        return text
    return f"a {type(value).__name__}"


def instance(
    name: str, value: Any, kinds: Kinds, expected: str, error: type[TokenPruneError] = OptionError
) -> Any:  # of one of the kinds
    """The value, if it is an instance of one of the kinds.

    Args:
        name: of the argument.
        value: the argument.
        kinds: the allowed types.
        expected: the allowed types in words.
        error: the class to raise otherwise.
    """
    if not isinstance(value, kinds):
        raise error(f"{name}={shown(value)} found, expected {expected}")
    return value


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """The value, if it is one of these strings."""
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{name}={shown(value)} found, expected {' or '.join(map(repr, choices))}")
    return value


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """The value as an int, if it is a whole number of at least `least`; bools are refused."""
    if not isinstance(value, Integral) or isinstance(value, bool) or (least is not None and value < least):
        at_least = "" if least is None else f" of at least {least}"
        raise OptionError(f"{name}: {shown(value)} found, expected a whole number{at_least}")
    return int(value)


def listed(value: Any) -> list[Any]:
    """One or several values as a list; a text is one value."""
    if isinstance(value, (str, bytes)):
        return [value]
    try:
        return list(value)
    except TypeError:
        return [value]


def unicode_problem(text: str) -> str:
    """Why a text cannot be encoded as Unicode, and what to do; empty if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])[1:-1]
        return (
            f"holds {found} at character {error.start}, half of a character or a byte that is not text; give it as "
            "proper Unicode (on a command line: in the terminal's encoding, such as UTF-8)"
        )
    return ""


def check_literals(value: object) -> None:
    """Check the attributes of an object whose type annotates them as a `Literal`.

    Raises:
        PluginError: one of them has a value that its annotation does not list.
    """
    for name, values in _literals(type(value)).items():  # type: ignore[arg-type] # mypy and hashes of classes
        if (found := getattr(value, name)) not in values:
            raise PluginError(f"{value}: {name}={found!r} is not known; expected {' or '.join(map(repr, values))}")


@cache
def _literals(kind: type) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
