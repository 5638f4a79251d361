"""The records of a sweep as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.errors import InputError
from tokenprune.evaluation.records import unpacked_json, unpacked_mask
from tokenprune.sweeps.store import Store, decoding, reading
from tokenprune.utils.arguments import instance
from tokenprune.utils.extras import install_extra

if TYPE_CHECKING:
    import numpy as np
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


def read_results(run: str | Path, *, every: bool = False) -> pd.DataFrame:
    """The records of a sweep, a row for each configuration and sample; also while it runs.

    Among the columns are `model, dataset, split, strategy, options, budget, seed, sample, kind, intersection, union,
    iou, equivalent_tokens, flops, kv_bytes`. `options` and `given` are JSON texts: the options that the strategy ran
    with on the first query, and those that the user gave. `layers`, `flops_by_part`, `milliseconds` and `metrics` are
    lists and mappings. `flops` follow the convention of `tokenprune.compare`; `milliseconds` are of a batch of all
    queries of a scene, divided by their number.

    Args:
        run: folder of the sweep.
        every: also configurations and queries that the sweep was not last called with.

    Raises:
        InputError: there is no such store, it cannot be read, or pandas is not installed.
        OptionError: `every` is neither True nor False.

    Example:
        >>> import tempfile, tokenprune as tp
        >>> config = {"models": "lisa-tiny", "datasets": "shapes", "strategies": ["none", "fastv"], "limit": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = tp.sweep(config, folder)
        ...     table = tp.read_results(folder)
        >>> table.groupby("strategy").equivalent_tokens.mean().round(1).to_dict()
        {'fastv': 89.3, 'none': 256.0}
    """
    instance("every", every, bool, "True or False")
    try:
        import pandas as pd
    except ImportError:
        raise InputError(f"pandas, which tables are made of, is not installed; {install_extra('report')}") from None
    with reading(run) as store:
        meta = store.meta()
        order = {hashed: number for number, hashed in enumerate(meta.get("planned", []))}
        limit = None if every else meta.get("config", {}).get("limit")
        query = f"SELECT {COLUMNS} FROM records r JOIN configurations c ON c.hash = r.configuration"
        asked = "" if limit is None else "JOIN scenes s USING (source, scene) WHERE s.queries_before + r.query < ?"
        given = () if limit is None else (limit,)
        names, rows = store.named_rows(f"{query} {asked} ORDER BY r.configuration, r.scene, r.query", given)
        table = pd.DataFrame.from_records(rows, columns=names)
    if not every:
        table = table[table.configuration.isin(order)]
    for column in JSON_COLUMNS:
        with decoding(store.folder):
            table[column] = [json.loads(text) for text in table[column]]
    for column in ("budget", "coverage"):
        table[column] = table[column].astype("float64")
    place = table.configuration.map(order).fillna(len(order))
    ordered: pd.DataFrame = table.iloc[place.argsort(kind="stable")].reset_index(drop=True)
    return ordered


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
