"""The strategy of a request: a known name with plain options, or the server's own."""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tokenprune import api
from tokenprune.core.by_name import parse_text, parts_of
from tokenprune.core.strategy import Strategy
from tokenprune.errors import BudgetError, OptionError

LONGEST = 200  # characters of a request's strategy
PLAIN = (int, float, bool, NoneType)
ROWS = "query"
"""The only option of free text that a request may set: a name of query rows, which every strategy calls so."""


class Choices:
    """The server's own strategy, and those that requests name.

    Args:
        name, budget, options: of the server's strategy, as for `tokenprune.strategy`. It may have any options.
    """

    def __init__(self, name: str = "none", budget: float | None = None, **options: Any) -> None:
        self._name = name
        self.default = api.strategy(name, budget, **options)
        self._at = lru_cache(maxsize=64)(lambda share: api.strategy(name, share, **options))

    def of(self, text: str | None, budget: float | None) -> Strategy:
        """The strategy of a request. Equal ones are one object, so that they run together.

        Args:
            text: "name" or "name:option=value,option=value"; None = the server's own strategy.
            budget: None = the server's own, if its strategy is meant too.

        Raises:
            UnknownNameError: no such strategy.
            OptionError: an invalid option, or one that a request may not set.
            BudgetError: a budget out of range, or of a strategy that takes none.
        """
        if text is not None:
            return _named(text, budget)
        if budget is None:
            return self.default
        _refuse_idle(self._name, budget)
        return self._at(budget)


@lru_cache(maxsize=256)
def _named(text: str, budget: float | None) -> Strategy:
    if len(text) > LONGEST:
        raise OptionError(f"strategy: {len(text)} characters found, expected at most {LONGEST}")
    name, options = parse_text(text)
    parts = parts_of(name)
    _refuse_idle(name, budget)
    if "budget" in options:
        raise OptionError(f"strategy {name!r}: budget is not an option here; send it as a field of its own")
    if options and len(parts) > 1:
        raise OptionError(f"strategy {name!r}: a request cannot set options of a composition; leave them out")
    fields = parts[0].load().Options.model_fields
    for option in options.keys() & fields.keys():
        _check_plain(name, option, options[option], fields[option].annotation)
    return api.strategy(name, budget, **options)


def _refuse_idle(name: str, budget: float | None) -> None:
    if name == "none" and budget is not None:
        raise BudgetError(
            f"budget {budget:g} moves nothing for strategy 'none', which keeps all tokens; name another strategy"
        )


def _check_plain(name: str, option: str, value: Any, kind: Any) -> None:
    """Refuse what may name a file, a checkpoint or code: the server would read or run it."""
    if option == ROWS:
        if not re.fullmatch(r"\w{1,40}", str(value)):
            raise OptionError(f"strategy {name!r}: option {option!r} is no name of query rows, such as seg or last")
    elif not _is_plain(kind):
        raise OptionError(
            f"strategy {name!r}: a request cannot set option {option!r}, which may name files or code; only numbers, "
            "truth values and listed words"
        )


def _is_plain(kind: Any) -> bool:
    """Whether an option's type has only numbers, truth values and listed words."""
    origin = get_origin(kind)
    if origin is Literal or kind in PLAIN or (isinstance(kind, type) and issubclass(kind, Enum)):
        return True
    if origin is Annotated:
        return _is_plain(get_args(kind)[0])
    if origin in (Union, UnionType, tuple, list):
        return all(_is_plain(part) for part in get_args(kind) if part is not Ellipsis)
    return False
