"""Strategies and options as text, "csp:query=seg,keep=0.5"; what a value means is up to the strategy's own fields."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenprune.errors import OptionError


def parse_options(given: Iterable[str]) -> dict[str, Any]:
    """Options by name from `key=value` texts.

    A value that is JSON (a number, true, false, null, a list, a quoted string) is read as such, any other is a string,
    so that `layer=3`, `keep=0.25`, `clustering=kmeans` and `segmenter=null` mean what they look like.

    Raises:
        OptionError: no `=`, an empty key, or a key given twice.
    """
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise OptionError(f"option {text!r} found, expected key=value, as in keep=0.5")
        if key in options:
            raise OptionError(f"option {key!r} is given twice; give it once")
        options[key] = _value(value.strip())
    return options


def split_list(text: str) -> list[str]:
    """A comma-separated list of strategies, whose options are separated by commas too.

    "none,csp:query=seg,reentry=delta,fastv" is none, csp:query=seg,reentry=delta and fastv: a part with "=" but no name
    of its own belongs to the strategy before it.

    Raises:
        OptionError: an empty part, or options before any strategy.
    """
    found: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            raise OptionError(f"strategies: an empty name found in {text!r}, expected names separated by commas")
        is_option = "=" in part and ":" not in part.split("=", 1)[0]
        if not is_option:
            found.append(part)
        elif not found:
            raise OptionError(f"strategies: option {part!r} found before any strategy; write name:{part}")
        else:
            found[-1] += ("," if ":" in found[-1] else ":") + part
    return found


def parse_text(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options, `budget` included, of "name:key=value,key=value"; values as `parse_options` reads them.

    Raises:
        OptionError: a part that is not key=value, or a key given twice.
    """
    name, _, rest = text.partition(":")
    try:
        return name.strip(), parse_options(part.strip() for part in rest.split(",") if part.strip())
    except OptionError as error:
        raise OptionError(f"strategy {name.strip()!r}: {error}") from error


def _value(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text
