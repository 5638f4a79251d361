"""The strategies that the page offers: those that run on its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenprune import api
from tokenprune.core.by_name import parse_text
from tokenprune.core.strategy import Strategy
from tokenprune.engine.interface.compatibility import compatible, declares
from tokenprune.errors import OptionError, TokenPruneError
from tokenprune.plugins import registry


@dataclass(frozen=True)
class Offer:
    """A strategy that runs on the model.

    Attributes:
        name: registered name.
        summary: one line on it.
        takes_budget: whether the page's budget applies; else it takes none, or has its own.
    """

    name: str
    summary: str
    takes_budget: bool


def offers_for(model: Any) -> dict[str, Offer]:
    """The strategies that are compatible with a model, by name; broken plugins are left out."""
    found = {}
    for name, entry in registry.strategies().items():
        try:
            plain = api.strategy(name)
            runs = not declares(model) or bool(compatible(plain, model))
        except TokenPruneError:  # `tokenprune list` says what is broken
            continue
        if runs:
            found[name] = Offer(name, entry.summary, plain.takes_budget() and plain.budget is None)
    return found


def requested(offer: Offer, budget: float, options: str = "") -> Strategy:
    """The strategy of one side of the page.

    Args:
        offer: the strategy.
        budget: used if the strategy takes one.
        options: as on the command line, "query=seg,clustering=kmeans".

    Raises:
        OptionError, BudgetError, PluginError: see `tokenprune.strategy`.
    """
    _, given = parse_text(f"{offer.name}:{options}")
    if "budget" in given:
        raise OptionError(f"strategy {offer.name!r}: budget is not an option here; move the slider")
    return api.strategy(offer.name, budget if offer.takes_budget else None, **given)
