"""Values to search as texts: `key=lo..hi` is a range, `key=a,b,c` a choice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from tokenprune.core.by_name import parse_options, split_at_commas
from tokenprune.core.strategy import Strategy
from tokenprune.errors import OptionError
from tokenprune.sweeps.tuning.search_space import Choices, Domain, Range

RANGE = re.compile(r"\s*(-?[\d.]*\d)\s*\.\.\s*(-?\d[\d.]*|-?\.\d+)\s*")
FORM = "expected key=lo..hi, as in layer=1..5, or key=a,b,c, as in query=mask_query,last"


def parse_search(strategy: Strategy, given: Iterable[str]) -> dict[str, Domain]:
    """The values of options by name.

    A list is written as JSON: `layers=[1,3],[2,4]`.

    Args:
        strategy: whose options they are.
        given: texts.

    Raises:
        OptionError: a text that cannot be read, an option that the strategy does not have or that is given twice, or a
            value that it cannot take.
    """
    found: dict[str, Domain] = {}
    for text in given:
        key, equals, values = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier() or not values.strip():
            raise OptionError(f"--search {text!r} found, {FORM}")
        if key in found:
            raise OptionError(f"--search: option {key!r} is given twice; give it once")
        found[key] = domain = _domain(text, values)
        ends = (domain.low, domain.high) if isinstance(domain, Range) else domain.values
        for value in ends:
            _check(strategy, key, value)
    return found


def _domain(text: str, values: str) -> Domain:
    span = RANGE.fullmatch(values)
    if span is not None:
        low, high = (_number(text, part) for part in span.groups())
        if low >= high:
            raise OptionError(f"--search {text!r}: found a range from {low} to {high}, expected lo..hi with lo < hi")
        return Range(low, high) if isinstance(low, int) and isinstance(high, int) else Range(float(low), float(high))
    if ".." in values:
        raise OptionError(f"--search {text!r}: a range is of numbers, {FORM}")
    try:
        several = json.loads(f"[{values}]")
    except ValueError:
        several = [parse_options([f"value={part}"])["value"] for part in split_at_commas(values)]
    if len(several) < 2 or any(one in several[:number] for number, one in enumerate(several)) or "" in several:
        raise OptionError(f"--search {text!r}: expected at least two different values; fix a single one with -o")
    return Choices(tuple(several))


def _number(text: str, part: str) -> int | float:
    try:
        return float(part) if "." in part else int(part)
    except ValueError:
        raise OptionError(f"--search {text!r}: {part!r} is not a number, {FORM}") from None


def _check(strategy: Strategy, key: str, value: Any) -> None:
    try:
        strategy.Options(**{key: value})
    except ValidationError as error:
        told = OptionError.from_validation(f"strategy {strategy.name!r}", error, strategy.Options.model_fields)
        raise OptionError(f"--search: {told}") from None
