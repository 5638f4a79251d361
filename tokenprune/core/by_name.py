"""From a name, or several joined by "+", to a strategy."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from tokenprune.errors import OptionError
from tokenprune.plugins import registry
from tokenprune.utils.arguments import instance

if TYPE_CHECKING:
    from tokenprune.core.strategy import Strategy
    from tokenprune.plugins.entries import Entry


def strategy(name: str, budget: float | None = None, **options: Any) -> Strategy:
    """A strategy by name.

    Args:
        name: a name of `tokenprune.strategies()`, or several joined by "+", which run one after the other (see
            `tokenprune.Sequence`; its options are `budgets` and `parts`). A registered name that holds a "+" wins.
        budget: equivalent image tokens as a fraction of all image tokens, in (0, 1]; solved for when the strategy runs.
        options: fields of the strategy's `Options`.

    Raises:
        UnknownNameError: no such strategy.
        OptionError: no name, an unknown option, a value out of range, or an option that would have no effect.
        BudgetError: a budget out of range, or for a strategy that has nothing to move.
        PluginError: the strategy's module cannot be imported, or its class cannot be made.
    """
    parts = parts_of(instance("name", name, str, "the name of a strategy, such as 'csp'"))
    if len(parts) > 1:
        from tokenprune.core.composition import Sequence  # imports torch, as any strategy does

        joined = Sequence(*(part.name for part in parts), budget=budget, **options)
        for part in joined.parts:
            _check_effects(part)
        return joined
    (entry,) = parts
    kind = entry.load()
    with entry.running():
        made: Strategy = kind(budget=budget, **options)
        _check_effects(made)
    return made


def _check_effects(made: Strategy) -> None:
    for option, why in made.without_effect().items():
        if option in made.options.model_fields_set:
            raise OptionError(f"strategy {made.name!r}: option {option!r} has no effect {why}; leave it out")


def parts_of(name: str) -> list[Entry]:
    """The strategies that a name stands for: one, or those that a "+" joins; none is imported.

    Raises:
        UnknownNameError: no such strategy.
        PluginError: two packages register it.
    """
    known = registry.strategies()
    name = re.sub(r"\s*\+\s*", "+", name.strip())
    joined = name not in known and "+" in name
    names = (names_in(name, known) or name.split("+")) if joined else [name]
    return [registry.get("strategies", part) for part in names]


def names_in(text: str, known: Collection[str]) -> list[str] | None:
    """The registered names that "a+b" joins, where names may hold a "+" themselves; None where that cannot be."""
    if text in known:
        return [text]
    for name in sorted(known, key=len, reverse=True):
        if text.startswith(name + "+"):
            rest = names_in(text[len(name) + 1 :], known)
            if rest is not None:
                return [name, *rest]
    return None
