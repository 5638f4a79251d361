"""CSP with the two budgets that its paper reports."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenprune.core.strategy import Strategy
from tokenprune_strategies.csp.csp import CSP


class _Preset(CSP):
    """CSP with a default budget."""

    share: ClassVar[float]

    def __init__(self, *, budget: float | None = None, **options: Any) -> None:
        """Raises OptionError or BudgetError, see Strategy."""
        super().__init__(budget=self.share if budget is None else budget, **options)

    def with_options(self, **changes: Any) -> Strategy:
        """A copy with changed options and without a budget."""
        copy = super().with_options(**changes)
        copy.budget = None
        return copy


class CSP65(_Preset):
    """CSP with 65 % fewer equivalent tokens."""

    name, share = "csp-65", 0.35


class CSP70(_Preset):
    """CSP with 70 % fewer equivalent tokens."""

    name, share = "csp-70", 0.30
