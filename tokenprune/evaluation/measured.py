"""Metrics that plugins add: their argument, `Measured`, and the mean of their results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from tokenprune.core.trace import Trace
from tokenprune.datasets.base import Query
from tokenprune.plugins import registry
from tokenprune.plugins.entries import Entry
from tokenprune.utils.arguments import instance, listed


@dataclass(frozen=True, eq=False)
class Measured:
    """The result of one strategy on one query. The arrays are read-only: other strategies are measured with them too.

    Attributes:
        mask: the strategy's mask, bool [H, W].
        target: [H, W], bool, or integers as in `tokenprune.utils.masks`.
        untouched: the mask of the model without pruning, bool [H, W].
        query: the words, their kind, and the target again.
        trace: of the batch that the query was in.
        row: the query's row in that batch.
        strategy: the strategy's label, with its options and budget.
    """

    mask: NDArray[Any]
    target: NDArray[Any]
    untouched: NDArray[Any]
    query: Query
    trace: Trace
    row: int
    strategy: str

    def __post_init__(self) -> None:
        for name in ("mask", "target", "untouched"):
            object.__setattr__(self, name, _read_only(getattr(self, name)))
        object.__setattr__(self, "query", replace(self.query, mask=_read_only(self.query.mask)))


def metrics_of(names: Sequence[str] | None) -> list[Entry]:
    """The registered metrics with these names; None = all installed ones.

    Raises:
        OptionError: no names.
        UnknownNameError: there is no such metric.
        PluginError: two packages register it, or it cannot be imported.
    """
    known = registry.entries("metrics")
    if names is None:
        found = list(known.values())
    else:
        texts = [instance("extra_metrics", name, str, "names of metrics") for name in listed(names)]
        found = [registry.get("metrics", name) for name in texts]
    for entry in found:
        entry.load()
    return found


def measure(metric: Entry, measured: Measured) -> float | None:
    """The metric of one query.

    Raises:
        PluginError: it failed, or did not return a finite number or None; names the plugin and its package.
    """
    answer = metric.call(measured)
    if answer is None:
        return None
    try:
        value = float(answer)
    except Exception:  # not a number
        value = math.nan
    if isinstance(answer, str) or not math.isfinite(value):
        shape = getattr(answer, "shape", None)
        found = repr(answer) if shape in (None, ()) else f"{type(answer).__name__} of shape {list(shape)}"
        raise metric.refusal(f"gave {found} for query {measured.query.text!r}, expected a finite number or None")
    return value


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view: NDArray[Any] = array.view()
    view.flags.writeable = False
    return view


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the defined values; None if there are none."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
