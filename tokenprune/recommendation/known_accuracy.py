"""The accuracy that is known of strategies: from results that bundled models come with, or from a user's own run.

A bundled model's folder may hold `results.json`, as `tokenprune compare --out` writes it. An accuracy is that of one
model on one dataset: it is always reported with both, and never taken for another model's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenprune.errors import InputError, PluginWarning, TokenPruneError
from tokenprune.evaluation.comparison.results import Comparison
from tokenprune.evaluation.contenders import Contender
from tokenprune.plugins import registry
from tokenprune.recommendation.results import Accuracy
from tokenprune.utils.files import path_given, reason

FILE = "results.json"


@dataclass
class KnownAccuracies:
    """Accuracies by strategy, options and budget.

    Attributes:
        found: for each, those of all models and datasets.
    """

    found: dict[str, list[Accuracy]] = field(default_factory=dict)

    def add(self, strategy: str, given: dict[str, Any], budget: float | None, accuracy: Accuracy) -> None:
        """Remember one."""
        self.found.setdefault(_key(strategy, given, budget), []).append(accuracy)

    def of(self, contender: Contender, model: str) -> list[Accuracy]:
        """Those of a contender with exactly these options and this budget: on this model, else on others."""
        all_of_it = self.found.get(_key(contender.strategy.name, contender.given, contender.budget), [])
        return [one for one in all_of_it if one.model == model] or all_of_it


def bundled_accuracies() -> KnownAccuracies:
    """From the results that bundled models come with; a warning names those that cannot be read."""
    known = KnownAccuracies()
    for entry in registry.models().values():
        try:
            path = Path(entry.call()) / FILE
            if path.is_file():
                _add_comparison(known, _read_comparison(path))
        except (TokenPruneError, TypeError) as error:
            warnings.warn(f"accuracies of model {entry.name!r} are unknown: {error}", PluginWarning, stacklevel=2)
    return known


def accuracies_in(run: str | Path) -> KnownAccuracies:
    """From a user's own run.

    Args:
        run: folder of a sweep, or a folder or JSON file that `tokenprune compare --out` wrote.

    Raises:
        InputError: it is neither, it cannot be read, or pandas is not installed.
    """
    known, path = KnownAccuracies(), path_given("results", run)
    file = path / FILE if path.is_dir() and (path / FILE).is_file() else path
    if file.is_file() and file.suffix == ".json":
        _add_comparison(known, _read_comparison(file))
    else:
        _add_sweep(known, path)
    return known


def _read_comparison(path: Path) -> Comparison:
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"results {str(path)!r} cannot be read ({reason(error)}); check the path") from error
    except ValidationError as error:
        raise InputError(
            f"results {str(path)!r} are not those of a comparison ({error.error_count()} errors); give what "
            "`tokenprune compare --out` wrote, or the folder of a sweep"
        ) from error


def _add_comparison(known: KnownAccuracies, found: Comparison) -> None:
    for row in found.rows:
        if row.giou is not None:
            accuracy = Accuracy(
                model=found.model,
                dataset=found.dataset,
                split=found.split,
                samples=found.samples,
                giou=row.giou,
                agreement=row.agreement,
            )
            known.add(row.strategy, row.given, row.budget, accuracy)


def _add_sweep(known: KnownAccuracies, run: Path) -> None:
    from tokenprune.sweeps.results import read_results

    table = read_results(run)
    groups = ["model", "dataset", "split", "strategy", "given", "budget"]
    for values, records in table.groupby(groups, sort=False, dropna=False):
        found: Any = values
        model, dataset, split, strategy, given, budget = found
        accuracy = Accuracy(
            model=str(model),
            dataset=str(dataset),
            split=str(split),
            samples=int(records["sample"].nunique()),
            giou=float(records["iou"].mean()),
            agreement=_mean_iou(zip(records["agreement_intersection"], records["agreement_union"], strict=True)),
        )
        known.add(str(strategy), json.loads(str(given)), None if budget != budget else float(budget), accuracy)


def _mean_iou(overlaps: Iterable[tuple[float, float]]) -> float:
    from tokenprune.evaluation.metrics import giou

    return giou([(int(both), int(either)) for both, either in overlaps])


def _key(strategy: str, given: dict[str, Any], budget: float | None) -> str:
    plain = {key: str(value) for key, value in given.items()}  # on the command line all are texts
    return json.dumps([strategy, plain, None if budget is None else f"{budget:g}"], sort_keys=True)
