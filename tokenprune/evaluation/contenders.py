"""The contenders of a comparison: strategies at budgets, from names, short texts and instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenprune import api
from tokenprune.core.budget import budget_words, checked_budget
from tokenprune.core.by_name import parse_text, split_list
from tokenprune.core.strategy import Strategy
from tokenprune.errors import BudgetError, OptionError
from tokenprune.utils.arguments import instance, listed


@dataclass(frozen=True)
class Contender:
    """One row of a comparison.

    Attributes:
        strategy: ready to run.
        given: the options that the user gave.
        budget: as requested; None if the strategy takes none.
    """

    strategy: Strategy
    given: dict[str, Any] = field(default_factory=dict)
    budget: float | None = None

    @property
    def label(self) -> str:
        """For progress bars and pictures: "csp (query=seg) at 0.35"."""
        given = ", ".join(f"{key}={value}" for key, value in self.given.items())
        name = f"{self.strategy.name} ({given})" if given else self.strategy.name
        return f"{name}{budget_words(self.strategy)}"


def budgets_of(budget: float | Sequence[float]) -> list[float]:
    """One budget or several, checked.

    Raises:
        BudgetError: none, or one outside (0, 1].
    """
    found = listed(budget)
    if not found:
        raise BudgetError("budget: an empty list found, expected at least one share of the image tokens in (0, 1]")
    return [checked_budget("budget", value) for value in found]


def contenders(
    strategies: str | Strategy | Sequence[str | Strategy], budget: float | Sequence[float]
) -> list[Contender]:
    """One contender per strategy and budget; a single one for a strategy that takes no budget.

    A text is a name with options after a colon: "csp:query=seg,clustering=kmeans". A budget is an upper limit: it moves
    only options that are not given. The option `budget=` overrides the comparison's budget; `budget=none` removes it.
    An instance runs as it is. A registered preset with a budget keeps it. A single text holds one strategy, or several
    separated by commas, as on the command line.

    Raises:
        OptionError: no strategy, one that is given twice, a text that cannot be read, or an option that the
            strategy does not have.
        BudgetError: see `budgets_of`.
        UnknownNameError: no such strategy.
    """
    items = split_list(strategies) if isinstance(strategies, str) else listed(strategies)
    if not items:
        raise OptionError("strategies: an empty list found, expected at least one; `tokenprune list` shows them")
    asked = budgets_of(budget)
    found: list[Contender] = []
    for item in items:
        instance("strategies", item, (str, Strategy), "names, texts such as 'csp:query=seg', or instances")
        if isinstance(item, Strategy):
            given = item.options.model_dump(exclude_unset=True, mode="json", fallback=repr)
            found.append(Contender(item, given, item.budget))
            continue
        name, options = parse_text(item)
        if "budget" in options:
            own = _checked_budget(name, options.pop("budget"))
            found.append(Contender(api.strategy(name, own, **options), options, own))
            continue
        plain = api.strategy(name, **options)
        if plain.takes_budget() and plain.budget is None:
            found.extend(Contender(api.strategy(name, value, **options), options, value) for value in asked)
        else:
            found.append(Contender(plain, options, plain.budget))
    _refuse_twice(found)
    return found


def _refuse_twice(found: list[Contender]) -> None:
    """Raises OptionError for a strategy that is given twice with the same options: its rows would be equal."""
    seen: set[object] = set()
    for contender in found:
        key = _key(contender.strategy)
        if key in seen:
            raise OptionError(f"strategies: {contender.label} is asked for twice; leave one out, or change its options")
        seen.add(key)


def _key(strategy: Strategy) -> object:
    """Equal for strategies that run equally; an instance with further attributes equals only itself."""
    if vars(strategy).keys() - {"name", "options", "budget", "parts", "positions"}:
        return id(strategy)
    return type(strategy), strategy.name, repr(strategy), *map(_key, getattr(strategy, "parts", ()))


def _checked_budget(name: str, value: Any) -> float | None:
    if value is None or value == "none":
        return None
    try:
        return checked_budget(f"strategy {name!r}: budget", value)
    except BudgetError as error:
        raise BudgetError(f"{error}, or none") from None
