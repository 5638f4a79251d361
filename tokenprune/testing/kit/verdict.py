"""The outcomes of an invariant in the conformance kit: it does not hold, or it does not apply."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from tokenprune.core.strategy import Strategy
from tokenprune.core.trace import Trace
from tokenprune.errors import TokenPruneError
from tokenprune.testing.kit.cases import Case
from tokenprune.testing.kit.printing import show_case, show_schedule


class Nonconforming(AssertionError):
    """An invariant that does not hold: which one, on which case, with which schedule."""


def report(problem: str, strategy: Strategy, case: Case, trace: Trace | None = None) -> Nonconforming:
    """The failure, with everything needed to understand it."""
    ran = repr(strategy) if trace is None else trace.strategy
    parts = [problem, "", f"strategy  {ran}", show_case(case)]
    return Nonconforming("\n".join(parts if trace is None else [*parts, show_schedule(trace)]))


def raised(error: BaseException, strategy: Strategy | None = None) -> str:
    """The error of a run, with the lines of the strategy's own package in its traceback.

    Args:
        error: what was raised.
        strategy: None if it could not be made.
    """
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    kind = "" if isinstance(error, TokenPruneError) else f"{type(error).__name__}: "
    home = _home(strategy)
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if home and frame.filename.startswith(home)]
    here = f"{Path.cwd()}{os.sep}"
    lines = [f"  {f.filename.removeprefix(here)}:{f.lineno}, in {f.name}: {f.line}" for f in frames[-3:]]
    return "\n".join([f"the run fails: {kind}{error}", *(["raised at", *lines] if lines else [])])


def _home(strategy: Strategy | None) -> str:
    """The folder of the strategy's package, or its file if it has none."""
    if strategy is None:
        return ""
    top = type(strategy).__module__.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return str(Path(file).parent) if Path(file).name == "__init__.py" else file


class NotTested(Exception):
    """The invariant does not apply to this strategy on this case; with the reason."""


class Tied(NotTested):
    """The strategy's choice is a tie; another case may be conclusive."""
