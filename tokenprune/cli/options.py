"""Reading `key=value` options from the command line; what a value means is up to the strategy's own fields."""

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


def _value(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text
