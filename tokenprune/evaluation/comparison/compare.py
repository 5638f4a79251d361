"""Compare strategies on one model and one dataset: accuracy, cost and prefill time, under the same conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from tokenprune import api
from tokenprune.core.strategy import Strategy
from tokenprune.datasets.base import Dataset
from tokenprune.datasets.files.path_dataset import PathDataset
from tokenprune.datasets.validation import check_request, scenes_of
from tokenprune.engine.interface.compatibility import check_on, declares
from tokenprune.errors import InputError, OptionError
from tokenprune.evaluation import environment
from tokenprune.evaluation.comparison.comparison_run import ComparisonRun
from tokenprune.evaluation.comparison.results import Comparison
from tokenprune.evaluation.contenders import budgets_of, contenders
from tokenprune.evaluation.measured import metrics_of
from tokenprune.evaluation.models import SegmentationModel, TurnTaking, check_model
from tokenprune.evaluation.protocols import ProtocolName
from tokenprune.utils.arguments import one_of, shown, whole_number
from tokenprune.utils.threads import ThreadChoice, checked, using

Progress = Callable[[str, int, int], None]


def compare(
    model: SegmentationModel | str | Path,
    dataset: Dataset | str,
    strategies: str | Strategy | Sequence[str | Strategy],
    budget: float | Sequence[float] = 0.35,
    split: str = "val",
    limit: int = 200,
    seed: int = 0,
    *,
    protocol: ProtocolName = "forced",
    timing_samples: int = 8,
    timing_rounds: int = 5,
    records: int = 4,
    extra_metrics: Sequence[str] | None = None,
    progress: Progress | None = None,
    threads: int | ThreadChoice | None = None,
) -> Comparison:
    """Run every strategy on the same queries and report accuracy and cost side by side.

    A strategy that cannot run at a budget gets a row with the reason; the others run.

    - Accuracy: all queries of an image run as one batch, teacher-forced; the image is encoded once. The scene's number
      is added to a strategy's option `seed`: random choices differ between images.
    - Cost: counted per query from the ledger, as if its batch row ran alone (queries that share a row, as turns of a
      conversation do, share its cost evenly), in the `exact` convention: decoder layers, attention
      rows computed for the strategy, merges of states, the strategy's own matmuls and the mask head (the last two
      measured). What depends only on the image (towers, projector) is left out: it is the same for all.
    - Time: the decoder's prefill with the strategy's own work, one query at a time, strategies interleaved (see
      `interleaved_medians`).

    Args:
        model: a segmentation model, or an argument of `tokenprune.load`.
        dataset: a dataset, its name, or the location of its class, "my_module:MyData".
        strategies: names, texts with options ("csp:query=seg"), or instances, each only once; see
            `contenders`.
        budget: equivalent image tokens as a share of all, in (0, 1]; a list gives a row for each.
        split: of the dataset.
        limit: number of queries.
        seed: of the dataset.
        protocol: how queries are asked, see `evaluation.protocols`.
        timing_samples: queries to time prefill on; 0 = no timing.
        timing_rounds: measured runs per query and strategy.
        records: samples to keep with masks and traces, for pictures.
        extra_metrics: names of metrics that plugins add; None = all installed ones.
        progress: called with (name of the phase, steps done, total steps).
        threads: processor threads, set for the whole process during the comparison; None = unchanged.

    Raises:
        UnknownNameError: no such dataset, split, strategy or metric.
        PluginError: a metric or dataset of a plugin failed, or every strategy raised an unexpected exception.
        OptionError: a limit, seed, number of threads or strategy option out of range, a strategy that is given
            twice, or an argument of another type.
        InputError: a model that does not make masks.
        BudgetError: a budget outside (0, 1], or none of the strategies can meet its own.
        CheckpointError: the model cannot be loaded.
        IncompatibleError: every strategy requires reads that the model does not provide; raised before any query runs
            if the model declares its reads.

    Examples:
        >>> import tokenprune as tp
        >>> found = tp.compare("lisa-tiny", "shapes", ["none", "fastv"], budget=0.35, limit=2, timing_samples=0)
        >>> [(row.strategy, round(row.equivalent_tokens_ratio, 2)) for row in found.rows]
        [('none', 1.0), ('fastv', 0.35)]
    """
    name = str(model) if isinstance(model, (str, Path)) else check_model(model).name
    budgets = budgets_of(budget)
    one_of("protocol", protocol, get_args(ProtocolName))
    whole_number("timing_samples", timing_samples, 0)
    whole_number("timing_rounds", timing_rounds, 1)
    whole_number("records", records, 0)
    if progress is not None and not callable(progress):
        raise OptionError(f"progress={shown(progress)} found, expected a function of (what, done, total)")
    if not isinstance(threads, ThreadChoice):
        checked(threads)
    field_of = contenders(strategies, budgets)
    data = check_request(dataset, split, limit, seed)
    added = metrics_of(extra_metrics)
    loaded = check_model(api.load(model)) if isinstance(model, (str, Path)) else model
    run = ComparisonRun(TurnTaking(loaded), field_of, timing_samples, records, added, protocol)
    if declares(loaded):
        for tally in run.tallies:
            run.attempt(tally, partial(check_on, tally.contender.strategy, loaded))
    report = progress or (lambda what, done, total: None)
    with torch.no_grad(), using(threads) as chosen:
        for scene in scenes_of(data, split, limit, seed):
            run.evaluate(scene)
            report("accuracy", run.queries, limit)
        if not run.queries:
            raise InputError(f"dataset {data.name!r}, split {split!r}: no query found; choose another split")
        if run.queries < limit:
            report("accuracy", run.queries, run.queries)
        run.count_own_work()
        run.time(timing_rounds, lambda done: report("prefill time", done, len(run.timed)))
    comparison = Comparison(
        model=name,
        dataset=data.name,
        split=split,
        samples=run.queries,
        budget=budgets[0] if len(budgets) == 1 else budgets,
        environment={
            **environment.describe(loaded.decoder, chosen),
            "seed": seed,
            "protocol": protocol,
            "data": data.place if isinstance(data, PathDataset) else data.name,
            "timing_samples": len(run.timed),
        },
        rows=[tally.row(run.untouched) for tally in run.tallies],
    )
    comparison._records.extend(run.records)
    return comparison
