"""The records of a sweep as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenprune.core.reads import PositionPrior
from tokenprune.errors import InputError
from tokenprune.evaluation.records import unpacked_json, unpacked_mask
from tokenprune.sweeps.store import Store, decoding, reading
from tokenprune.utils.arguments import instance
from tokenprune.utils.extras import install_extra

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

# What a table has, in order; the rest of the store is for galleries.
COLUMNS = """
    c.model, c.dataset, c.split, c.protocol, c.strategy, c.label, c.given, c.options, c.budget, c.seed,
    r.sample, r.scene, r.query, r.scene_name, r.text, r.kind, r.size,
    r.intersection, r."union", r.predicted, r.iou, r.agreement_intersection, r.agreement_union, r.coverage,
    r.image_tokens, r.equivalent_tokens, r.layers, r.flops, r.flops_by_part, r.kv_bytes, r.milliseconds, r.metrics,
    r.scene_digest, r.environment, r.configuration
"""
JSON_COLUMNS = ("layers", "flops_by_part", "milliseconds", "metrics")


def read_results(run: str | Path, *, every: bool = False, stages: bool = False) -> pd.DataFrame:
    """The records of a sweep, a row for each configuration and sample; also while it runs.

    Among the columns are `model, dataset, split, strategy, options, budget, seed, sample, kind, intersection, union,
    iou, equivalent_tokens, flops, kv_bytes`. `options` and `given` are JSON texts: the options that the strategy ran
    with on the first query, and those that the user gave. `layers`, `flops_by_part`, `milliseconds` and `metrics` are
    lists and mappings. `flops` follow the convention of `tokenprune.compare`; `milliseconds` are of a batch of all
    queries of a scene, divided by their number.

    Args:
        run: folder of the sweep.
        every: also configurations and queries that the sweep was not last called with.
        stages: one more column, `stages`, with the tokens that each stage kept, as `evaluation.records.stages_of` says;
            None for records without (`--no-masks`).

    Raises:
        InputError: there is no such store, it cannot be read, or pandas is not installed.
        OptionError: `every` or `stages` is neither True nor False.

    Examples:
        >>> import tempfile, tokenprune as tp
        >>> config = {"models": "lisa-tiny", "datasets": "shapes", "strategies": ["none", "fastv"], "limit": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = tp.sweep(config, folder)
        ...     table = tp.read_results(folder)
        >>> table.groupby("strategy").equivalent_tokens.mean().round(1).to_dict()
        {'fastv': 89.3, 'none': 256.0}
    """
    for name, value in (("every", every), ("stages", stages)):
        instance(name, value, bool, "True or False")
    with reading(run) as store:
        meta = store.meta()
        order = {hashed: number for number, hashed in enumerate(meta.get("planned", []))}
        limit = None if every else meta.get("config", {}).get("limit")
        columns = f"{COLUMNS}, r.stages" if stages else COLUMNS
        query = f"SELECT {columns} FROM records r JOIN configurations c ON c.hash = r.configuration"
        asked = "" if limit is None else "JOIN scenes s USING (source, scene) WHERE s.queries_before + r.query < ?"
        given = () if limit is None else (limit,)
        table = table_of(store, f"{query} {asked} ORDER BY r.configuration, r.scene, r.query", given)
    if not every:
        table = table[table.configuration.isin(order)]
    if stages:
        with decoding(store.folder):
            table["stages"] = [None if packed is None else unpacked_json(packed) for packed in table["stages"]]
    for column in ("budget", "coverage"):
        table[column] = table[column].astype("float64")
    place = table.configuration.map(order).fillna(len(order))
    ordered: pd.DataFrame = table.iloc[place.argsort(kind="stable")].reset_index(drop=True)
    return ordered


def table_of(store: Store, query: str, values: Sequence[Any] = ()) -> pd.DataFrame:
    """The rows that a SELECT gives, with `JSON_COLUMNS` as lists and mappings.

    Raises:
        InputError: pandas is not installed, or a value is damaged.
    """
    try:
        import pandas as pd
    except ImportError:
        raise InputError(f"pandas, which tables are made of, is not installed; {install_extra('report')}") from None
    names, rows = store.named_rows(query, values)
    table: pd.DataFrame = pd.DataFrame.from_records(rows, columns=names)
    for column in JSON_COLUMNS:
        with decoding(store.folder):
            table[column] = [json.loads(text) for text in table[column]]
    return table


def keep_rates(run: str | Path, *, stage: str | None = None) -> dict[tuple[str, str], PositionPrior]:
    """How often a sweep kept the token of each place: by model and label, the mean over all records.

    A place counts as kept if an active token has it. Only the first image of a query counts, and only configurations
    with stages, so not `none`.

    Args:
        run: folder of the sweep.
        stage: name of the stage that is counted; default: the last one of each record.

    Raises:
        InputError: as `read_results`; there is no such stage, its tokens have no grid cells, or none were stored.
        OptionError: `stage` is no text.

    Examples:
        >>> import tempfile, tokenprune as tp
        >>> from tokenprune.sweeps.results import keep_rates
        >>> config = {"models": "lisa-tiny", "datasets": "shapes", "strategies": "uniform", "limit": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = tp.sweep(config, folder)
        ...     rates = keep_rates(folder)
        >>> rates
        {('lisa-tiny', 'uniform at 0.35'): PositionPrior(16 × 16)}
    """
    instance("stage", stage, (str, type(None)), "the name of a stage")
    table = read_results(run, stages=True)
    kept: dict[tuple[str, str], list[NDArray[np.bool_]]] = {}
    known: set[str] = set()
    for model, label, stages in zip(table.model, table.label, table.stages, strict=True):
        known.update(one["name"] for one in stages or ())
        wanted = [one for one in stages or () if stage in (None, one["name"])]
        if wanted:
            kept.setdefault((model, label), []).append(_kept_cells(run, label, wanted[-1]))
    if not known:
        raise InputError(f"{str(run)!r} holds no stages; run a strategy that has some, without --no-masks")
    if not kept:
        raise InputError(f"{str(run)!r} holds no stage {stage!r}; known: {', '.join(sorted(known))}")
    return {key: PositionPrior.mean(maps) for key, maps in kept.items()}


def _kept_cells(run: str | Path, label: str, stage: dict[str, Any]) -> NDArray[np.bool_]:
    """bool [rows, columns]: the cells of the grid that a stage kept."""
    rows, columns = stage["grid"]
    if not rows:
        raise InputError(f"{str(run)!r}: {label}: image tokens without grid cells; a keep rate needs them")
    found = np.zeros(rows * columns, dtype=np.bool_)
    found[stage["kept"] if stage["cells"] is None else stage["cells"]] = True
    return found.reshape(rows, columns)


def reasons_of(store: Store, planned: Sequence[str]) -> dict[str, str]:
    """Why configurations could not run, by strategy, model and dataset.

    Args:
        store: open.
        planned: hashes of the configurations that count, in order.
    """
    found = {
        hashed: (f"{label}, {model} on {dataset} ({split}, {protocol}{f', seed {seed}' if seed else ''})", reason)
        for hashed, label, model, dataset, split, protocol, seed, reason in store.rows(
            "SELECT hash, label, model, dataset, split, protocol, seed, reason FROM configurations"
        )
        if reason is not None
    }
    return dict(found[hashed] for hashed in planned if hashed in found)


def stored_masks(
    store: Store, scene: int, query: int, source_configurations: list[str]
) -> dict[str, tuple[NDArray[np.bool_], list[dict[str, Any]]]]:
    """Masks and stages of one query by configuration, of those that were stored with them.

    Args:
        store: open for reading.
        scene, query: numbers, as in the table.
        source_configurations: hashes of configurations.

    Raises:
        InputError: one of them is damaged.
    """
    places = ", ".join("?" * len(source_configurations))
    rows = store.rows(
        f"SELECT configuration, mask, height, width, stages FROM records WHERE scene = ? AND query = ? AND mask IS NOT "
        f"NULL AND configuration IN ({places})",
        (scene, query, *source_configurations),
    )
    with decoding(store.folder):
        return {
            hashed: (unpacked_mask(mask, height, width), unpacked_json(stages))
            for hashed, mask, height, width, stages in rows
        }
