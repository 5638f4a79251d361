"""How the conformance kit says that an invariant does not hold, or says nothing of a strategy."""

from __future__ import annotations

from tokenprune.base import Strategy
from tokenprune.errors import PluginError
from tokenprune.testing.cases import Case
from tokenprune.testing.shown import show_case, show_schedule
from tokenprune.trace import Trace


class Nonconforming(AssertionError):
    """An invariant that does not hold: what, on which case, with which schedule."""


def report(problem: str, strategy: Strategy, case: Case, trace: Trace | None = None) -> Nonconforming:
    """The failure, with all that a person needs to see it."""
    ran = repr(strategy) if trace is None else trace.strategy
    parts = [problem, "", f"strategy  {ran}", show_case(case)]
    return Nonconforming("\n".join(parts if trace is None else [*parts, show_schedule(trace)]))


def refuses_batch(error: Exception) -> bool:
    """Whether a strategy only refuses to run rows of such different sizes together, as it may."""
    return isinstance(error, PluginError) and "run rows of such different sizes apart" in str(error)


class NotTested(Exception):
    """The invariant says nothing about this strategy on this case, and why."""
